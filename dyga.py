"""Dynamic Gaussian Anchoring (DyGA): the paper's main idea, section 3.2, Algorithms 2 and 3.

It sits between the extractor, which turns an image into N latent units (each a scalar through an
MLP, so a curve in D dimensions), and the denoiser. A unit that means one factor (wall hue, say)
should take one group of values per attribute (per hue). DyGA finds such groups and shows them to
the denoiser more compact:

    fit    once an epoch, or in several: a Gaussian mixture for each unit, over many images. Its
           means are the unit's ANCHORS. How many there are is found as well (Algorithm 2).
    align  in every step, and to sample: each unit moves a little to its anchor (Algorithm 3), and
           the denoiser sees the result. Nothing pulls c itself to an anchor; the paper's hope is
           that a denoiser which sees clear groups teaches the extractor to make them.

    python dyga.py    # fits toy units, prints how many anchors each got beside the truth

In another model, whatever its latent units and its loss are:

    dyga = DyGA(n_units=10, dim=32)              # a submodule with buffers and no parameters
    c = encoder(images)                          # (B, 10, 32)
    c_tilde = dyga.align(c)                      # for the decoder; c itself before the first fit
    loss = distance(decoder(c_tilde), images)    # its gradient reaches the encoder through align
    dyga.fit(many_c)                             # once an epoch: (n, 10, 32), n some thousands
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import nn

# The fit sees NORMALISED units, minus their mean and divided by ONE scale each, the root mean
# square deviation of a unit's numbers: so a threshold means the same for every unit.
# Paper: no word on scale; the released code normalises every batch by itself.
FLOOR = 1e-3  # least variance: a unit is a thin curve, whose Gaussian is singular without a floor
EMPTY = 1e-6  # a component whose responsibilities sum to less than this is gone
TOL = 1e-4  # EM ends when the mean log-likelihood of a sample rises by no more than this
LIMIT = 1e3  # outliers beyond this many scales are put there: their squares would drown the rest

class DyGA(nn.Module):
    """Anchors for n_units latent units of dim numbers each."""
    def __init__(
        self,
        n_units,  # N, 1 or more
        dim=32,  # D, how many numbers a unit has, 2 or more
        k_init=8,  # 1 or more: anchors a unit starts with in every fit (released settings: 8)
        k_max=32,  # 1 or more: anchors a unit has at most (released settings: 32)
        max_iter=30,  # 1 or more: EM iterations of one run at most (released settings: 30)
        lam=0.1,  # 0 to 1: lambda of equation 6, the largest step to the anchor; 0: no alignment
        accept="always",  # "always" keeps each split, like the paper; "bic" tries to split all, and
        # keeps what improves the Bayesian information criterion: with k_init 1 it finds the levels
        d_max=8,  # 1 or more: largest d_k. Paper: no limit; a unit is a curve, 8 hold its bends too
        spread=0.5,  # 0 or more: psi; with "always" a cluster is split if samples' mean distance
        # to its mean exceeds it, in scales (a whole unit's is about root D)
        split_odds=0.5,  # 0 to 1: with "always", chance of a cluster of the first run (k_init of
        # them) to be split once, whatever its spread
        min_samples=10,  # 1 or more: clusters of fewer samples are dropped
    ):
        super().__init__()
        if accept not in ("always", "bic"):
            raise ValueError(f"{accept=}; expected always or bic")
        self.k_init = min(k_init, k_max)
        self.k_max = k_max
        self.max_iter = max_iter
        self.lam = lam
        self.accept = accept
        self.d_max = min(d_max, dim)
        self.spread = spread
        self.split_odds = split_odds
        self.min_samples = min_samples
        # Buffers move with .to(device) and travel in the checkpoint. Their shapes never change: a
        # unit has k_max slots, and mask says which of them hold an anchor.
        self.register_buffer("centre", torch.zeros(n_units, dim))  # x = (c - centre) / scale
        self.register_buffer("scale", torch.ones(n_units))
        self.register_buffer("live", torch.zeros(n_units, dtype=torch.bool))  # fitted, not constant
        self.register_buffer("anchors", torch.zeros(n_units, k_max, dim))  # in c's space
        self.register_buffer("mask", torch.zeros(n_units, k_max, dtype=torch.bool))
        self.register_buffer("log_pi", torch.zeros(n_units, k_max))  # from here on: a Mixture's
        self.register_buffer("q", torch.zeros(n_units, k_max, dim, self.d_max))
        self.register_buffer("a", torch.ones(n_units, k_max, self.d_max))
        self.register_buffer("b", torch.ones(n_units, k_max))
        self.register_buffer("d", torch.ones(n_units, k_max, dtype=torch.int64))

    def align(self, c, return_delta=False):
        """Algorithm 3: move each unit to its anchor a little. c (B, N, D) -> c~ (B, N, D), by (6):

            c~ = c + delta (mu_k - c),     mu_k the anchor of highest responsibility,
            delta = lambda exp(-mean_j |c_j - mu_kj| / s_j),     s_j = max(|c_j|, scale / 10).

        delta is one number per sample and unit: lambda on the anchor, towards 0 where the c_j are
        small beside their distance from mu_k, but lambda / e where all |c_j| far exceed |mu_kj|.
        The gradient of a loss L, with k and mu_k as constants, and g = d L / d c~:

            d L / d c = (1 - delta) g + ((mu_k - c) . g) d delta / d c
            d delta / d c_j = -(delta / D) (sign(c_j - mu_kj) / s_j - |c_j - mu_kj| s_j' / s_j^2)
            s_j' = sign(c_j) if |c_j| > scale / 10, else 0

        The first term is the gradient without an anchor, shrunk; the second, how c changes delta.
        No gradient reaches the anchors.
        return_delta: return (c~, delta (B, N)). Record its mean: near 0, anchors do nothing.
        Units constant at the last fit, and all before the first, come back as they are, delta 0."""
        anchor, _ = self.nearest(c)
        c32 = c.float()  # autocast leaves what follows in float32
        # Paper: divides by c_j. Where one c_j is 0, common after a ReLU, delta would be 0 whatever
        # the unit's other numbers say: hence s.
        s = torch.maximum(c32.abs(), 0.1 * self.scale[:, None])  # (B, N, D)
        ratio = (c32 - anchor).abs() / s  # (B, N, D)
        delta = self.lam * (-ratio.mean(-1)).exp() * self.live  # (B, N)
        c_tilde = (c32 + delta[..., None] * (anchor - c32)).to(c.dtype)  # (B, N, D)
        return (c_tilde, delta) if return_delta else c_tilde

    def nearest(self, c):
        """The anchor of highest responsibility, without gradient: c (B, N, D) -> anchor (B, N, D),
        in c's own space, and its number (B, N), int64 below k_max. Before the first fit both are 0,
        and self.live (N,) is false: a loss that pulls c to anchors (add it in Model.forward) is
        ((c - dyga.nearest(c)[0]) * dyga.live[:, None]).abs().mean()."""
        # Paper: Gumbel noise on r, then softmax at temperature 1e-4. As r is in [0, 1], such noise
        # picks the right one of K anchors with chance e / (e + K - 1) only, even where r is 1. The
        # text wants the highest r: argmax. (Noise on log r would pick k with chance r_k.) And a
        # softmax at 1e-4 is a step, with gradient 0 almost everywhere: constants lose nothing.
        number = self.responsibilities(c).argmax(-1)  # (B, N)
        unit = torch.arange(len(self.anchors), device=c.device)  # (N,)
        return self.anchors[unit, number], number

    @torch.no_grad()
    def responsibilities(self, c):
        """Equation 4. c (B, N, D) -> (B, N, K) float32, 0 if absent; a fitted unit sums to 1."""
        with torch.autocast(c.device.type, enabled=False):
            x = normalise(c.float(), self.centre, self.scale[:, None])  # (B, N, D)
            mu = normalise(self.anchors, self.centre[:, None], self.scale[:, None, None])
            m = Mixture(self.log_pi, mu, self.q, self.a, self.b, self.d)  # N mixtures at a time
            log_density = -0.5 * cost(x.transpose(0, 1), m, self.d_max)  # (N, K, B)
            r = log_density.masked_fill(~self.mask[..., None], -1e30).softmax(1)
            return r.permute(2, 0, 1) * self.mask  # (B, N, K)

    @torch.no_grad()
    def fit(self, features, generator=None):
        """Find new anchors for all units. features: (n, N, D) floats, n >= 1. Returns self.
        generator: a CPU torch.Generator for starts and random splits; without, a new one of seed 0.
        self.report then has "anchors", N dicts {step: how many}, and "log_likelihood", N pairs of
        lists (both EM runs, a number an iteration). ValueError on a wrong shape, NaN or Inf. Works
        on the CPU, wherever its input is: small steps would leave a GPU idle (a guess)."""
        N, D = self.centre.shape
        if features.shape[1:] != (N, D) or not len(features) or not features.is_floating_point():
            raise ValueError(f"features are {features.dtype} {tuple(features.shape)}; expected "
                             f"floats of shape (n >= 1, {N}, {D})")
        if not features.isfinite().all():
            raise ValueError("features hold NaN or Inf; has the training diverged?")
        generator = generator or torch.Generator().manual_seed(0)
        self.report = {"anchors": [], "log_likelihood": []}
        for i in range(N):
            x = features[:, i].cpu()  # (n, D)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            centre, scale, live = measure(x)
            x = normalise(x, centre, scale) * live  # a constant unit: all 0, so one anchor
            m = self.select_anchors(x, generator)
            K = len(m.mu)
            self.centre[i] = centre
            self.scale[i] = scale
            self.live[i] = live
            self.mask[i] = torch.arange(self.k_max) < K
            self.anchors[i, :K] = centre + scale * m.mu
            self.log_pi[i, :K] = m.log_pi
            self.q[i, :K] = m.q[..., :self.d_max]
            self.a[i, :K] = m.a[:, :self.d_max]
            self.b[i, :K] = m.b
            self.d[i, :K] = m.d
        return self

    def select_anchors(self, x, generator):
        """Algorithm 2 for one unit: x (n, D), normalised. Returns a Mixture; adds to self.report.
        An anchor disappears in three ways: its component has no samples left (m_step); a split
        puts two in its place; its cluster is too small and filtered out."""
        count = {}  # anchors after each step, for the report
        # Initialise. HDDC: E-step, M-step, update subspaces, at most max_iter times.
        m = m_step(x, plus_plus(x, self.k_init, generator), 1, self.d_max)
        m, first = em(x, m, self.max_iter, TOL, self.d_max)
        count["hddc"] = len(m.mu)
        # While there are clusters to split: choose one, split it, fit the halves to its samples.
        # Paper: also splits "arbitrarily". Here each cluster of the first run has one chance.
        chance = torch.rand(self.k_init, generator=generator)  # (k_init,); fewer may be left
        lucky = {k for k in range(len(m.mu)) if chance[k] < self.split_odds}
        closed = set()  # tried, and not worth it. Both hold places in m, and a split moves none
        while len(m.mu) < self.k_max:
            parts, spreads = clusters(x, m)
            wanted = [k for k, part in enumerate(parts) if len(part) > 1 and k not in closed
                      and (self.accept == "bic" or k in lucky or spreads[k] > self.spread)]
            if not wanted:
                break
            k = max(wanted, key=lambda k: spreads[k])  # the widest, as k_max may end the loop
            halves = self.halve(parts[k], len(x))
            lucky.discard(k)
            if halves is None:
                closed.add(k)
                continue
            # One half takes place k, the other goes to the end. They share the weight of k.
            halves = halves._replace(log_pi=halves.log_pi + m.log_pi[k])
            rows = []
            for row, half in zip(m, halves):
                rows.append(torch.cat([row[:k], half[:1], row[k + 1:], half[1:]]))
            m = Mixture(*rows)
        count["split"] = len(m.mu)
        # Remove small Gaussians: their samples are outliers. The largest always stays.
        sizes = [len(part) for part in clusters(x, m)[0]]
        least = min(self.min_samples, max(sizes))
        m = m.of([k for k, size in enumerate(sizes) if size >= least])
        count["filter"] = len(m.mu)
        m, last = em(x, m, self.max_iter, TOL, self.d_max)
        count["refit"] = len(m.mu)
        self.report["anchors"].append(count)
        self.report["log_likelihood"].append((first, last))
        return m

    def halve(self, part, n):
        """Split a cluster, part (n_k, D) of a unit's n samples. Returns a Mixture of two, or None:
        a half came out empty, or (accept bic) one Gaussian describes the cluster better."""
        one = m_step(part, part.new_ones(1, len(part)), 1, self.d_max)
        # Start: cut across the longest direction, where the variance between both sides is largest.
        # A cut at the mean might go through the middle of a level.
        along = (part - one.mu) @ one.q[0, :, 0]  # (n_k,), of mean 0
        ordered = along.sort().values
        left = torch.arange(1, len(part))  # (n_k - 1,): how many samples lie left of each cut
        right = left.flip(0)
        total = ordered.cumsum(0)[:-1]  # (n_k - 1,): their sum; on the right it is -total
        between = total.square() * (1 / left + 1 / right)  # sum n_side mean_side^2
        above = along > ordered[between.argmax()]  # (n_k,)
        # Both halves keep the d_k of `one`: one direction more would cost BIC about D numbers.
        d = int(one.d)
        two = m_step(part, torch.stack([~above, above]).to(part.dtype), d, d)
        two, _ = em(part, two, self.max_iter, TOL, d)
        if len(two.mu) < 2:
            return None
        if self.accept == "bic":
            # If other clusters have no density here, the unit's log-likelihood rises as much as
            # this part's. BIC's price of a second Gaussian: log(n) / 2 for each of its numbers.
            gain = e_step(part, two)[1] - e_step(part, one)[1]
            D = part.shape[1]
            # Direction j: D, less one for its length, less j - 1 for right angles to those before.
            directions = d * (D - (d + 1) / 2)
            numbers = 2 + D + d + directions  # weight and b, mean, all a_j, and these
            if 2 * gain <= numbers * math.log(n):
                return None
        return two

# ---- The parts of Algorithm 2, for one unit: x (n, D) normalised, m its mixture ------------------
class Mixture(NamedTuple):
    """K Gaussians, HDDC's model [a_kj b_k Q_k d_k]: component k has variances a_kj along d_k main
    directions q_kj, and ONE variance b_k along all others: few numbers, so few samples are enough.
    d_k = D - 1 is a full covariance. In a fit W is D; DyGA's buffers keep d_max of them."""
    log_pi: torch.Tensor  # (K,) log of the weights
    mu: torch.Tensor  # (K, D) means
    q: torch.Tensor  # (K, D, W) orthonormal directions as columns, the main ones first
    a: torch.Tensor  # (K, W) variances along them; filled up with b_k beyond d_k
    b: torch.Tensor  # (K,) variance along each direction that is not a main one
    d: torch.Tensor  # (K,) int64, how many directions are main ones: see scree

    def of(self, components):
        return Mixture(*(t[components] for t in self))

def measure(x):
    """Centre (D,) and scale of a unit x (n, D), and whether it is live. The farthest 0.1% of
    samples (usually at least one) may be outliers: they set neither."""
    distance = (x - x.median(0).values).norm(dim=1)  # (n,)
    x = x[distance <= distance.quantile(0.999)].double()
    centre = x.mean(0)
    scale = (x - centre).square().mean().sqrt()
    # What varies by a millionth of its size is rounding: such a unit is constant and never moved.
    live = scale > 1e-6 * centre.square().mean().sqrt()
    return centre.float(), torch.where(live, scale, 1).float(), live

def normalise(x, centre, scale):
    """x - centre in units of scale, within +-LIMIT; all three must broadcast, x any shape."""
    return ((x - centre) / scale).clamp(-LIMIT, LIMIT)

def cost(x, m, d_most):
    """HDDC's cost, -2 log(pi_k N(x; mu_k, Sigma_k)): how badly component k explains a sample x.
    With y_j = q_kj . (x - mu_k), its coordinate along main direction j = 1..d_k:

        sum_j y_j^2 / a_kj + (|x - mu_k|^2 - sum_j y_j^2) / b_k     the distance, in variances
        + sum_j log a_kj + (D - d_k) log b_k                        log det Sigma_k
        + D log(2 pi) - 2 log pi_k

    x (n, D) -> (K, n). d_most: the largest d_k, or more. (responsibilities() asks for N units at
    once: then each tensor has N in front, x (N, n, D), m.mu (N, K, D), and so on.)"""
    D, W = m.q.shape[-2:]
    # a_kj is b_k beyond d_k: so this is exact, and in the loop such a j adds (1/a - 1/b) = 0.
    log_det = m.a.log().sum(-1) + (D - W) * m.b.log()  # (K,)
    constant = log_det - 2 * m.log_pi + D * math.log(2 * math.pi)  # (K,)
    # |x - mu|^2 = |x|^2 - 2 mu . x + |mu|^2 needs no tensor of size K n D.
    square = x.square().sum(-1)[..., None, :] - 2 * m.mu @ x.mT  # (K, n)
    square += m.mu.square().sum(-1)[..., None]
    out = square / m.b[..., None] + constant[..., None]  # distance as if none were main
    for j in range(d_most):
        q = m.q[..., j]  # (K, D)
        y = q @ x.mT - (q * m.mu).sum(-1)[..., None]  # (K, n)
        out += (1 / m.a[..., j] - 1 / m.b)[..., None] * y.square()  # y^2 / a in place of y^2 / b
    return out

def e_step(x, m):
    """Responsibilities r (K, n), equation 4, and the log-likelihood, a float."""
    log_density = -0.5 * cost(x, m, int(m.d.max()))  # (K, n)
    likelihood = log_density.logsumexp(0)  # (n,)
    return log_density.softmax(0), likelihood.sum(dtype=torch.float64).item()

def m_step(x, r, d_least, d_max):
    """The mixture that is most likely under responsibilities r (K, n). The scree test chooses d_k,
    from d_least (a number, or (K,)) to d_max. A component that has no samples left is gone."""
    count = r.sum(1)  # (K,)
    some = count.clamp(min=EMPTY)
    mu = r @ x / some[:, None]  # (K, D)
    cov = []
    for k in range(len(r)):
        own = (r[k] > torch.finfo(r.dtype).eps).nonzero()[:, 0]  # most others are 0 up to rounding
        z = x[own] - mu[k]  # (n_k, D)
        weighted = r[k, own] * z.T  # (D, n_k)
        cov.append(weighted @ z / some[k])  # (D, D)
    values, q = torch.linalg.eigh(torch.stack(cov).double())
    values = values.flip(-1).to(x.dtype)  # (K, D), falling
    q = q.flip(-1).to(x.dtype)  # (K, D, D)
    d = scree(values).clamp(max=d_max).clamp(min=d_least)
    rest = torch.arange(x.shape[1]) >= d[:, None]  # (K, D)
    # Variances lifted to the floor are the most likely of all allowed: EM keeps its guarantee.
    b = ((values * rest).sum(1) / rest.sum(1)).clamp(min=FLOOR)  # (K,)
    a = torch.where(rest, b[:, None], values.clamp(min=FLOOR))  # (K, D)
    return Mixture((count / count.sum()).log(), mu, q, a, b, d).of(count > EMPTY)

def scree(eigenvalues):
    """Cattell's scree test, which chooses d_k: among eigenvalues (..., D), given falling, find the
    last step down above a fifth of the largest step; how many come before it, 1 to D - 1."""
    step = eigenvalues[..., :-1] - eigenvalues[..., 1:]  # (..., D - 1)
    large = step > 0.2 * step.amax(-1, keepdim=True)
    place = torch.arange(1, eigenvalues.shape[-1])  # (D - 1,)
    return (large * place).amax(-1).clamp(min=1)

def em(x, m, max_iter, tol, d_max):
    """HDDC (Bouveyron, Girard, Schmid 2007): expectation maximisation, until the mean
    log-likelihood of a sample rises by tol or less. Returns the mixture, and a list, the
    log-likelihood before each iteration. It never falls: within a run d_k never falls (m.d is
    d_least; in HDDC as published it may), and the model with d_k directions is contained in the one
    with d_k + 1: the M-step finds one at least as good."""
    history = []
    for _ in range(max_iter):
        r, likelihood = e_step(x, m)
        m = m_step(x, r, m.d, d_max)
        history.append(likelihood)
        if len(history) > 1 and history[-1] - history[-2] <= tol * len(x):
            break
    return m, history

def plus_plus(x, K, generator):
    """k-means++: each next start is a sample drawn with odds (distance to the nearest start)^2.
    Returns r (K, n), 1 for the nearest start. Equal samples share one, so rows can stay empty."""
    squares = []
    odds = torch.ones(len(x))  # the first start: any sample
    for _ in range(K):
        start = torch.multinomial(odds, 1, generator=generator)
        squares.append((x - x[start]).square().sum(1))  # (n,)
        odds = torch.stack(squares).amin(0) + 1e-12  # not all 0, even if all samples are starts
    label = torch.stack(squares).argmin(0)  # (n,)
    return (label == torch.arange(K)[:, None]).to(x.dtype)  # (K, n)

def clusters(x, m):
    """The paper's clusters, lists of K: the samples (n_k, D) for which component k has
    responsibility > 0.5, and their spread, which equation 5 calls density."""
    best, owner = e_step(x, m)[0].max(0)  # (n,), (n,)
    parts = [x[(owner == k) & (best > 0.5)] for k in range(len(m.mu))]
    spreads = [(part - part.mean(0)).norm(dim=1).mean().item() for part in parts]
    return parts, spreads

# ---- Beyond the paper: which units to keep, and how to part two that mix -------------------------
def informative_units(s, least, most=0.3, bins=20):
    """Which units are not redundant. s: scalars (n, N), n 1,000 or more -> their indices, sorted.
    train.py silences the others for good, in the hope that what only they told moves to these.

    Training often spreads one hue over three units, as nothing asks for fewer: each is another
    READING of it, and readings, such as its sine and cosine, need not correlate. So a unit EXPLAINS
    the share of a variance that a step function of its scalar predicts, of `bins` steps with as
    many images in each; several units, what the best sum of theirs predicts. Of a candidate,

        gain     by how much it raises the explained share of all scalars' variance (large ones
                 count more), times its contrast (below)
        known    the share of its own steps that kept units explain: 1 for a copy, and by chance
                 U * bins / n if U are kept
        depends  the share of the variance of |error| that kept units explain, where error is s less
                 what they predict of s. A cosine leaves open the sine's sign, not its size: where
                 depends is high, s is another reading, no new factor
        value    gain * (1 - (depends / most)^2): negative, so never enough, if depends > most

    Forward selection, by a rule found by trial: in turn, the unit of largest value is kept, if
    value >= least * known: the more of it was known, the more it must add."""
    rank = s.argsort(0).argsort(0)  # (n, N), 0 for the smallest
    steps = nn.functional.one_hot(rank * bins // len(s), bins) - 1 / bins  # (n, N, bins)
    s = s - s.mean(0)
    # A unit that mixes factors explains a part of each, and would come first. But sums are nearer
    # to a Gaussian: weight by how far mean log(2 cosh x) is from a Gaussian's. (Power by trial.)
    x = s / s.std(0)
    contrast = (torch.logaddexp(x, -x).mean(0) - 1.06772).abs() ** 0.25  # (N,)

    def predict(y, units):
        """The sum of step functions of these units that is nearest to y (n, Y)."""
        x = steps[:, units].flatten(1)  # (n, U, bins) -> (n, U*bins)
        gram = x.T @ x  # (U*bins, U*bins)
        gram.diagonal().add_(1)  # a ridge: a unit's steps sum to 0, so gram is singular
        return x @ torch.linalg.solve(gram, x.T @ y)  # (n, Y)

    def explained(y, units, dim=None):
        """The share of the variance of y (n, Y) that these units explain; dim=0: of each column."""
        return (y * predict(y, units)).sum(dim) / y.square().sum(dim)

    kept = []
    candidates = s.any(0).nonzero().flatten().tolist()  # not the silenced ones
    while candidates:
        size = (s - predict(s, kept)).abs()  # (n, N), |error|
        depends = explained(size - size.mean(0), kept, dim=0)  # (N,)
        before = explained(s, kept)
        value = {}
        for u in candidates:
            gain = (explained(s, [*kept, u]) - before) * contrast[u]
            value[u] = gain * (1 - (depends[u] / most) ** 2)
        best = max(value, key=value.get)
        candidates.remove(best)  # also if redundant: its case hardly improves later
        known = explained(steps[:, best], kept)
        if value[best] >= least * known:
            kept.append(best)
    return sorted(kept)

def unmixing(s):
    """Scalars (n, U) -> turn (U, U): mean + turn (s - mean) are about as independent as a linear
    map can make them, of the same means and deviations. (RADICAL, Learned-Miller and Fisher 2003.)

    Two factors may lie at an angle on two units: one tells size + shape, the other size - shape.
    The loss does not mind. So scalars are made uncorrelated, then each pair is turned by the angle,
    at most 45 degrees, at which the sum of their two entropies is least. No rotation changes their
    joint entropy, and the sum less that is what each tells of the other. Weights up to 0.05 (of
    standardised scalars, in a direction of length 1) are dropped as noise."""
    n, U = s.shape
    sd = s.std(0)  # (U,)
    x = ((s - s.mean(0)) / sd).double()  # (n, U)
    values, axes = torch.linalg.eigh(x.T @ x / n)
    w = axes / values.sqrt() @ axes.T  # (U, U), rows: uncorrelated directions, changed least
    angle = torch.arange(-45, 46, 3).double().deg2rad()  # (A,)
    cos, sin = angle.cos(), angle.sin()
    rotations = torch.stack([cos, sin, -sin, cos], -1).view(-1, 2, 2)  # (A, 4) -> (A, 2, 2)
    m = round(n ** 0.5)
    for i, j in 2 * list(combinations(range(U), 2)):  # twice: each turn changes others
        y = (rotations @ w[[i, j]] @ x.T).sort().values  # (A, 2, n), each of both sorted
        # Vasicek's estimate of entropy, up to a constant: how far apart are samples m ranks apart?
        entropy = (y[..., m:] - y[..., :-m] + 1e-9).log().mean(-1).sum(-1)  # (A,)
        w[[i, j]] = rotations[entropy.argmin()] @ w[[i, j]]
    turn = nn.functional.normalize(w)  # (U, U), of standardised scalars
    turn = turn * (turn.abs() > 0.05)
    sd_turned = (x @ turn.T).std(0)  # (U,)
    return (turn * (sd / sd_turned)[:, None] / sd).float()

# ---- Toy units: python dyga.py -------------------------------------------------------------------
def toy_units(levels, n, generator, dim=32, noise=0.05):
    """Units (n, N, dim) like the extractor's, a scalar of levels[i] equally likely values through a
    random MLP, and which value it was (n, N). noise: its deviation, in scales of the unit."""
    N = len(levels)
    count = torch.tensor(levels)
    level = (torch.rand(n, N, generator=generator) * count).long()
    s = (level + 0.5) / count * 4 - 2  # (n, N)
    h = s.T[..., None]  # (N, n, 1)
    for d_in, d_out in ((1, 64), (64, 64), (64, dim)):
        w = torch.randn(N, d_in, d_out, generator=generator) * (2 / d_in) ** 0.5
        h = torch.relu(h @ w + torch.randn(N, 1, d_out, generator=generator))  # (N, n, d_out)
    scale = h.var(1).mean(-1).sqrt().clamp(min=0.1)[:, None, None]  # (N, 1, 1)
    h = h + noise * scale * torch.randn(h.shape, generator=generator)
    return h.transpose(0, 1), level

def main():
    """Fit toy units by both rules, and print how many anchors each got."""
    levels = [1, 2, 3, 5, 8, 12, 10**6]
    c, _ = toy_units(levels, 4_000, torch.Generator().manual_seed(0), noise=0.06)
    c[:, 0] = c[0, 0]
    print(f"levels  {levels}, from a constant unit to a continuous one")
    for options in (dict(), dict(k_init=1, accept="bic")):
        model = DyGA(len(levels), **options).fit(c)
        print(f"anchors {model.mask.sum(1).tolist()} with {options or 'the default settings'}")

if __name__ == "__main__":
    main()
