"""Dynamic Gaussian Anchoring (DyGA): the paper's main idea, section 3.2, Algorithms 2 and 3.

It sits between the extractor, which turns an image into N latent units of D numbers, and the
denoiser. A unit that means one factor (wall hue, say) should take one group of values per attribute
(per hue). DyGA finds such groups and sharpens them:

    fit     once an epoch: a Gaussian mixture for each unit, over many images. Its means are the
            unit's ANCHORS. How many there are is found as well (Algorithm 2).
    align   in every training step: each unit moves a little towards its anchor (Algorithm 3). The
            denoiser sees the result, and its gradient teaches the extractor to make clear groups.

    python dyga.py      # fits toy units, prints the anchors found beside the truth, draws out/dyga.png

How to use it in another model, whatever its latent units and its loss are:

    dyga = DyGA(n_units=10, dim=32)              # a submodule with buffers and no parameters
    c = encoder(images)                          # (B, 10, 32)
    c_tilde = dyga.align(c)                      # for the decoder; c itself before the first fit
    loss = distance(decoder(c_tilde), images)    # its gradient reaches the encoder through align
    dyga.fit(many_c)                             # once an epoch: (n, 10, 32), n some thousands
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

# The fit sees NORMALISED units: minus the unit's mean, divided by ONE scale per unit, the root mean
# square deviation of its numbers. So the thresholds below and in DyGA mean the same for every unit.
# Paper: thresholds, but no word on scale; the released code normalises each batch by itself.
FLOOR = 1e-3  # least variance, 3% of the scale squared: a curve is thin, its Gaussian singular without
LIMIT = 1e3  # outliers beyond this many scales are put there, so that their squares fit into float32


class DyGA(nn.Module):
    """Anchors for n_units latent units of dim numbers each.

    Args:
        n_units: N, 1 or more.
        dim: D, how many numbers a unit has, 2 or more.
        k_init: 1 to k_max, anchors a unit starts with in every fit (released settings: 8).
        k_max: 1 or more, anchors a unit has at most (released settings: 32).
        max_iter: 1 or more, EM iterations of one run at most (released settings: 30).
        lam: lambda of equation 6, 0 to 1, the largest step to the anchor; 0 switches alignment off.
        accept: "always" keeps each split, like the paper; "bic" tries to split every cluster and keeps
            what improves the Bayesian information criterion: with k_init 1 it finds the levels.
        d_max: 1 or more, largest d_k. Paper: no limit; a unit is a curve, 8 hold its bends too.
        spread: psi, 0 or more, in scales of the unit: wider clusters are split (accept always).
        split_odds: 0 to 1, the chance of any other cluster to be split once (accept always).
        min_samples: 1 or more: clusters of fewer samples are dropped.
        min_fraction: 0 to 1: clusters of a smaller share of the samples are dropped.
        tol: 0 or more: EM ends when a sample's mean log-likelihood rises by no more than this.
    """

    def __init__(self, n_units, dim=32, k_init=8, k_max=32, max_iter=30, lam=0.1, accept="always",
                 d_max=8, spread=0.5, split_odds=0.5, min_samples=10, min_fraction=1e-3, tol=1e-4):
        super().__init__()
        if accept not in ("always", "bic"):
            raise ValueError(f"accept is {accept!r}; expected 'always' or 'bic'")
        if not 1 <= k_init <= k_max or dim < 2 or max_iter < 1 or d_max < 1:
            raise ValueError(f"k_init {k_init}, k_max {k_max}, dim {dim}, max_iter {max_iter}, d_max "
                             f"{d_max}: expected 1 <= k_init <= k_max, 2 <= dim, the others >= 1")
        self.k_init, self.k_max, self.d_max = k_init, k_max, min(d_max, dim)
        self.max_iter, self.tol, self.lam, self.accept = max_iter, tol, lam, accept
        self.spread, self.split_odds = spread, split_odds
        self.min_samples, self.min_fraction = min_samples, min_fraction
        self.report = {}  # what the last fit did
        N, K, D, J = n_units, k_max, dim, self.d_max
        # Buffers move with .to(device) and travel in the checkpoint. Their shapes never change: a unit
        # has k_max slots, and mask says which of them hold an anchor.
        self.register_buffer("centre", torch.zeros(N, D))  # normalised x = (c - centre) / scale
        self.register_buffer("scale", torch.ones(N))
        self.register_buffer("live", torch.zeros(N, dtype=torch.bool))  # fitted, and not constant
        self.register_buffer("anchors", torch.zeros(N, K, D))  # in the unit's own space, like c
        self.register_buffer("mask", torch.zeros(N, K, dtype=torch.bool))
        self.register_buffer("log_pi", torch.zeros(N, K))  # this and the rest: see Mixture
        self.register_buffer("q", torch.zeros(N, K, D, J))
        self.register_buffer("a", torch.ones(N, K, J))
        self.register_buffer("b", torch.ones(N, K))
        self.register_buffer("d", torch.ones(N, K, dtype=torch.int64))

    def align(self, c, return_delta=False):
        """Algorithm 3: move each unit towards its anchor. c (B, N, D) -> c~ (B, N, D), equation 6:

            c~ = c + delta (mu_k - c),     mu_k the anchor of highest responsibility,
            delta = lambda exp(-mean_j |c_j - mu_kj| / s_j),     s_j = max(|c_j|, scale / 10).

        delta is one number per sample and unit: lambda on the anchor, less away from it. Far away it
        need not be 0: if every |c_j| is much larger than |mu_kj|, it is lambda / e. It goes to 0 where
        the c_j are small beside their distance from mu_k.

        Gradient, where k and mu_k are constants:

            d c~ / d c = (1 - delta) I + (mu_k - c) (d delta / d c)^T
            d delta / d c_j = -delta / D (sign(c_j - mu_kj) / s_j - |c_j - mu_kj| s_j' / s_j^2)
            s_j' = sign(c_j) if |c_j| > scale / 10, else 0

        In words: the loss reaches the unit as if there were no anchor, times 1 - delta. The second term
        is what c changes about the length of the step. No gradient reaches the anchors.

        return_delta: return (c~, delta (B, N)). Log its mean: near 0, the anchors do nothing.
        Constant units, and all units before the first fit, come back unchanged, with delta 0.
        """
        anchor, _ = self.nearest(c)
        x = c.float()  # what follows is elementwise, which autocast leaves in float32
        # Paper: divides by c_j. Where one c_j is 0, common after a ReLU, delta would be 0 whatever the
        # unit's other numbers say: so s_j. The released code has ONE delta for the whole batch, where
        # one such c_j switches alignment off for everybody.
        s = torch.maximum(x.abs(), 0.1 * self.scale[:, None])  # (B, N, D)
        ratio = (x - anchor).abs() / s  # (B, N, D)
        delta = self.lam * (-ratio.mean(-1)).exp() * self.live  # (B, N)
        c_tilde = (x + delta[..., None] * (anchor - x)).to(c.dtype)  # (B, N, D)
        return (c_tilde, delta) if return_delta else c_tilde

    def delta(self, c):
        """delta of equation 6 per sample and unit. c (B, N, D) -> (B, N), from 0 to lambda."""
        return self.align(c, return_delta=True)[1]

    def nearest(self, c):
        """The anchor of highest responsibility. It carries no gradient.

        c (B, N, D) -> anchor (B, N, D), in c's own space, and its number (B, N), int64 below k_max.
        Before the first fit both are 0, and self.live (N,) is false. So a loss that pulls c to anchors
        is ((c - dyga.nearest(c)[0]) * dyga.live[:, None]).abs().mean().
        """
        # Paper: Gumbel noise on r, then softmax at temperature 1e-4. As r is in [0, 1], such noise
        # picks the right one of K anchors with chance e / (e + K - 1) only, even where r is 1. But the
        # text wants the highest r: argmax. (Noise on log r would pick k with chance r_k.) A softmax at
        # 1e-4 is a step, its gradient 0 almost everywhere: a constant choice loses nothing.
        number = self.responsibilities(c).argmax(-1)  # (B, N)
        unit = torch.arange(len(self.anchors), device=c.device)  # (N,)
        return self.anchors[unit, number], number

    @torch.no_grad()
    def responsibilities(self, c):
        """Equation 4. c (B, N, D) -> (B, N, K) float32; 0 for absent anchors, the others sum to 1."""
        with torch.autocast(c.device.type, enabled=False):
            x = normalise(c.float(), self.centre, self.scale[:, None]).transpose(0, 1)  # (N, B, D)
            mu = normalise(self.anchors, self.centre[:, None], self.scale[:, None, None])
            m = Mixture(self.log_pi, mu, self.q, self.a, self.b, self.d)  # N mixtures at a time
            energy = (-0.5 * cost(x, m)).masked_fill(~self.mask[..., None], -1e30)  # (N, K, B)
            return energy.softmax(1).permute(2, 0, 1) * self.mask  # (B, N, K)

    @torch.no_grad()
    def fit(self, features, generator=None):
        """Find new anchors for all units. features: (n, N, D) floats, n >= 1. Returns self.

        generator: a torch.Generator for starts and random splits; without one, a new one of seed 0.
        Then self.report has "anchors" {step: N counts}, "log_likelihood" {EM run: N lists, a number an
        iteration} and "converged" (N bools, of the last run). ValueError on a wrong shape, NaN or Inf.

        It works on the CPU, unit by unit, wherever features and buffers are: a fit is many thousand
        small operations, one after the other, which would leave a GPU idle. (We have not timed it on
        one.) The anchors are needed once an epoch, so it costs little.
        """
        self._check(features)
        n, N, D = features.shape
        generator = generator or torch.Generator().manual_seed(0)
        # As many random numbers for each unit, so that units have no influence on each other.
        draws = torch.rand(N, self.k_init + self.k_max, generator=generator, device=generator.device)
        steps = ("hddc", "split", "filter", "refit")
        self.report = {"anchors": {step: [] for step in steps}, "converged": [],
                       "log_likelihood": {"hddc": [], "refit": []}}
        with torch.autocast("cpu", enabled=False):  # half precision is too coarse for covariances
            for i in range(N):
                x = features[:, i].cpu().float()  # (n, D)
                centre, scale, live = measure(x)
                x = normalise(x, centre, scale) * live  # all 0 if constant, which gives one anchor
                m = self.select_anchors(x, draws[i].cpu())
                K, J = len(m.mu), self.d_max
                self.centre[i], self.scale[i], self.live[i] = centre, scale, live
                self.mask[i] = torch.arange(self.k_max, device=self.mask.device) < K
                self.anchors[i] = 0
                self.anchors[i, :K] = centre + scale * m.mu
                self.log_pi[i, :K], self.b[i, :K], self.d[i, :K] = m.log_pi, m.b, m.d
                self.q[i, :K], self.a[i, :K] = m.q[..., :J], m.a[:, :J]
        return self

    def select_anchors(self, x, draws):
        """Algorithm 2 for one unit: x (n, D), normalised. Returns a Mixture, notes in the report.

        draws: (k_init + k_max,) random numbers, 0 to 1. An anchor disappears in three ways: EM leaves
        its component no samples (m_step); a split puts two others in its place; its cluster is too
        small, and filtered. And each fit begins anew: the last one's anchors and numbers are forgotten.
        """
        anchors, em_options = self.report["anchors"], (self.max_iter, self.tol, self.d_max)
        # Initialise; HDDC: E-step, M-step, update subspaces, at most max_iter times.
        m = hard_m_step(x, plus_plus(x, draws[:self.k_init]), self.k_init, 1, self.d_max)
        m, first, _ = em(x, m, *em_options)
        anchors["hddc"].append(len(m.mu))

        # While there are clusters to split: choose one, split it, fit the halves to its samples.
        # Paper: also splits "arbitrarily", no odds given. Each cluster of the first run has one chance.
        lucky = {k for k in range(len(m.mu)) if draws[self.k_init + k] < self.split_odds}
        closed = set()  # tried, and not worth it
        while len(m.mu) < self.k_max:
            parts = clusters(x, m)
            wanted = [k for k, part in enumerate(parts) if len(part) > 1 and k not in closed]
            if self.accept == "always":
                wanted = [k for k in wanted if k in lucky or spread(parts[k]) > self.spread]
            if not wanted:
                break
            k = max(wanted, key=lambda k: spread(parts[k]))  # widest first, as k_max may end the loop
            halves = self.halve(parts[k], len(x))
            lucky.discard(k)
            if halves is None:
                closed.add(k)
            else:
                m = replace(m, k, halves)
        anchors["split"].append(len(m.mu))

        # Remove small Gaussians: their samples are outliers. The largest always stays.
        sizes = [len(part) for part in clusters(x, m)]
        least = min(max(self.min_samples, self.min_fraction * len(x)), max(sizes))
        m = m.of([k for k, size in enumerate(sizes) if size >= least])
        anchors["filter"].append(len(m.mu))
        # HDDC again.
        m, last, converged = em(x, m, *em_options)
        anchors["refit"].append(len(m.mu))
        self.report["log_likelihood"]["hddc"].append(first)
        self.report["log_likelihood"]["refit"].append(last)
        self.report["converged"].append(converged)
        return m

    def halve(self, part, n):
        """Split a cluster: part (n_k, D) of the unit's n samples. Returns a Mixture of two, or None if
        a half comes out empty or (accept bic) one Gaussian describes the cluster better."""
        one = hard_m_step(part, part.new_zeros(len(part)), 1, 1, self.d_max)
        # Start: cut across the longest direction, where the variance between the two sides is largest.
        # A cut at the mean might go through the middle of a level.
        along = (part - one.mu) @ one.q[0, :, 0]  # (n_k,), of mean 0
        ordered = along.sort().values
        left = torch.arange(1, len(part))  # (n_k - 1,): how many samples are left of each cut
        between = ordered.cumsum(0)[:-1].square() * (1 / left + 1 / left.flip(0))  # flip: how many right
        label = along > ordered[between.argmax()]  # (n_k,)
        # The halves keep d_k, or BIC would count new directions of mere noise against a good split.
        d = int(one.d)
        two, _, _ = em(part, hard_m_step(part, label, 2, d, d), self.max_iter, self.tol, d)
        # Other clusters' densities vanish here, so the BIC of the unit changes as that of the part.
        if len(two.mu) < 2 or self.accept == "bic" and bic(part, two, n) >= bic(part, one, n):
            return None
        return two

    def _check(self, features):
        shape, (N, D) = tuple(features.shape), self.centre.shape
        if shape[1:] != (N, D) or shape[0] < 1 or not features.is_floating_point():
            raise ValueError(f"features are {features.dtype} {shape}; expected floats of shape "
                             f"(n >= 1, {N}, {D})")
        bad = (~features.isfinite()).any(0).any(-1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"features of unit {', '.join(map(str, bad))} hold NaN or Inf; has the "
                             "training diverged?")


# ---- The parts of Algorithm 2, for one unit: x (n, D) normalised, m its mixture ----


class Mixture(NamedTuple):
    """K Gaussians, HDDC's model [a_kj b_k Q_k d_k]: component k has a variance a_kj along each of d_k
    main directions q_kj, and ONE variance b_k along the D - d_k others: few numbers, so few samples are
    enough. d_k = D - 1 is a full covariance. (The released code finds directions and never uses them.)
    """

    log_pi: torch.Tensor  # (K,) log of the weights
    mu: torch.Tensor  # (K, D) means
    q: torch.Tensor  # (K, D, D) orthonormal directions as columns, the main ones first
    a: torch.Tensor  # (K, D) variances along them; b_k from the (d_k + 1)-th on
    b: torch.Tensor  # (K,) variance along each direction that is not a main one
    d: torch.Tensor  # (K,) int64, how many directions are main ones: see scree

    def of(self, components):
        return Mixture(*(t[components] for t in self))


def measure(x):
    """Centre (D,) and scale of a unit x (n, D), and whether it is live. Outliers set neither: of ten
    samples or more, the farthest 0.1% (one at least) are left out."""
    n = len(x)
    distance = (x - x.median(0).values).double().norm(dim=1)  # (n,)
    kept = distance.argsort()[:n - 1 - n // 1000 if n >= 10 else n]
    x = x[kept].double()
    centre = x.mean(0)
    scale = (x - centre).square().mean().sqrt()
    # What varies by a millionth of its size is rounding: such a unit is constant, and never moved. (A
    # unit of pure noise varies: it is fitted and moved like any other.)
    live = scale > 1e-6 * centre.square().mean().sqrt()
    return centre.float(), torch.where(live, scale, 1).float(), live


def normalise(x, centre, scale):
    return ((x - centre) / scale).clamp(-LIMIT, LIMIT)


def cost(x, m):
    """HDDC's cost, -2 log(pi_k N(x; mu_k, Sigma_k)) - D log(2 pi). With y_j = q_kj . (x - mu_k) it is

        sum_j y_j^2 / a_kj + (|x - mu_k|^2 - sum_j y_j^2) / b_k
        + sum_j log a_kj + (D - d_k) log b_k - 2 log pi_k,    j = 1..d_k.

    x (n, D) -> (K, n); or N units at a time, x (N, n, D) and a mixture (N, K, ...) -> (N, K, n).
    """
    D, J = m.q.shape[-2:]  # the J directions given; all others have variance b
    constant = m.a.log().sum(-1) + (D - J) * m.b.log() - 2 * m.log_pi  # (K,)
    # |x - mu|^2 = |x|^2 - 2 mu . x + |mu|^2 needs no tensor of size K n D.
    square = x.square().sum(-1)[..., None, :] - 2 * m.mu @ x.mT  # (K, n)
    square += m.mu.square().sum(-1)[..., None]
    out = square / m.b[..., None] + constant[..., None]
    for j in range(J):
        q = m.q[..., j]  # (K, D)
        y = q @ x.mT - (q * m.mu).sum(-1)[..., None]  # (K, n)
        out += y.square() * (1 / m.a[..., j] - 1 / m.b)[..., None]
    return out


def e_step(x, m):
    """Responsibilities r (K, n), equation 4, and the log-likelihood, a float."""
    J = int(m.d.max())  # usually 1 to 3: the other directions have variance b, and need no work
    energy = -0.5 * cost(x, m._replace(q=m.q[..., :J], a=m.a[:, :J]))  # (K, n)
    likelihood = energy.logsumexp(0).sum(dtype=torch.float64).item()
    return energy.softmax(0), likelihood - x.numel() / 2 * math.log(2 * math.pi)


def m_step(x, r, d_least, d_max, floor=FLOOR):
    """The mixture that is most likely under responsibilities r (K, n). The scree test chooses d_k, from
    d_least (K,) to d_max. A component without samples is gone: an anchor's first way to disappear."""
    share = r > torch.finfo(r.dtype).eps  # (K, n): most are 0 up to rounding, and need no work
    alive = share.any(1)  # (K,)
    count, mu, cov = [], [], []
    for k in alive.nonzero()[:, 0]:
        own = share[k].nonzero()[:, 0]  # (n_k,)
        weight, z = r[k, own], x[own]  # (n_k,), (n_k, D)
        count.append(weight.sum())
        mu.append(weight @ z / count[-1])  # (D,)
        z = z - mu[-1]
        cov.append((weight * z.T) @ z / count[-1])  # (D, D)
    count = torch.stack(count)  # (K,)
    values, q = torch.linalg.eigh(torch.stack(cov).double())
    values, q = values.flip(-1), q.flip(-1)  # falling (K, D), and the directions (K, D, D)
    d = scree(values).clamp(max=d_max).maximum(d_least[alive])
    main = torch.arange(x.shape[1]) < d[:, None]  # (K, D)
    # At the floor they are still the most likely ones of all allowed: EM keeps its guarantee.
    b = ((values * ~main).sum(-1) / (~main).sum(-1)).clamp(min=floor)  # (K,)
    a = torch.where(main, values.clamp(min=floor), b[:, None])  # (K, D)
    log_pi = (count / count.sum()).log()
    return Mixture(log_pi, torch.stack(mu), q.to(x.dtype), a.to(x.dtype), b.to(x.dtype), d)


def hard_m_step(x, label, K, d_least, d_max):
    """The mixture of a hard assignment label (n,), from which EM starts."""
    r = (label == torch.arange(K)[:, None]).to(x.dtype)  # (K, n)
    return m_step(x, r, torch.full((K,), d_least), d_max)


def scree(eigenvalues, threshold=0.2):
    """Cattell's scree test, which chooses d_k: among eigenvalues (..., D), given falling, find the last
    step down above threshold times the largest, and count those before it. (...) from 1 to D - 1."""
    step = eigenvalues[..., :-1] - eigenvalues[..., 1:]  # (..., D - 1)
    large = step > threshold * step.amax(-1, keepdim=True)
    return (large * torch.arange(1, eigenvalues.shape[-1])).amax(-1).clamp(min=1)


def em(x, m, max_iter=30, tol=1e-4, d_max=8, floor=FLOOR):
    """HDDC (Bouveyron, Girard, Schmid 2007): expectation maximisation from the mixture m, until the
    mean log-likelihood of a sample rises by tol or less. Returns the mixture, the log-likelihood before
    each iteration (a list), and whether it converged.

    The log-likelihood never falls. HDDC as published repeats the scree test in every iteration, and a
    smaller d_k can fit worse. Here d_k only grows within a run: the model with d_k directions is
    contained in the one with d_k + 1, so the M-step still finds one at least as good.
    """
    history = []
    for _ in range(max_iter):
        r, likelihood = e_step(x, m)
        m = m_step(x, r, m.d, d_max, floor)
        history.append(likelihood)
        if len(history) > 1 and history[-1] - history[-2] <= tol * len(x):
            return m, history, True
    return m, history, False


def plus_plus(x, draws):
    """k-means++: each next start is a sample drawn with odds (distance to the nearest start)^2.

    draws: K random numbers. Returns the nearest start of each sample (n,). Equal samples share a start,
    so fewer than K different samples give fewer components.
    """
    label = torch.zeros(len(x), dtype=torch.int64)
    nearest = torch.full((len(x),), math.inf, dtype=torch.float64)  # squared distance
    odds = torch.ones_like(nearest)  # of the first: any sample
    for k, draw in enumerate(draws):
        total = odds.cumsum(0)
        start = (total <= draw * total[-1]).sum().clamp(max=len(x) - 1)
        distance = (x - x[start]).square().sum(1).double()
        label[distance < nearest] = k
        nearest = nearest.minimum(distance)
        odds = nearest
    return label


def clusters(x, m):
    """The paper's clusters: for each component the samples with responsibility > 0.5, (n_k, D)."""
    best, owner = e_step(x, m)[0].max(0)  # (n,), (n,)
    return [x[(owner == k) & (best > 0.5)] for k in range(len(m.mu))]


def spread(part):
    """Equation 5 for a cluster (n_k, D). The paper calls it density; it is the mean distance to the
    cluster's centre."""
    return (part - part.mean(0)).norm(dim=1).mean().item()


def bic(x, m, n):
    """Bayesian information criterion of mixture m on samples x, which are some of n: less is better."""
    D, d = x.shape[1], m.d
    free = 2 + D + d + d * (D - (d + 1) / 2)  # (K,): weight, b, mean, the a_j, orthonormal directions
    return free.sum().item() * math.log(n) - 2 * e_step(x, m)[1]


def replace(m, k, halves):
    """One half in the place of component k, the other in a new last place; they share its weight."""
    halves = halves._replace(log_pi=halves.log_pi + m.log_pi[k])
    m = m.of([*range(len(m.mu)), k])
    for slots, half in zip(m, halves):
        slots[[k, -1]] = half
    return m


# ---- Toy units: python dyga.py ----


def toy_units(levels, n, generator, dim=32, noise=0.05, jitter=0.0):
    """Units (n, N, dim) like the extractor's: a scalar with levels[i] equally likely values (0:
    continuous) goes through a random MLP. Also returns which value it was, (n, N).

    noise: of the unit, in its scales; jitter: of the scalar, in steps between levels.
    """
    N, count = len(levels), torch.tensor(levels)
    u = torch.rand(n, N, generator=generator)
    level = (u * count).long()
    s = (level + 0.5 + jitter * torch.randn(n, N, generator=generator)) / count
    s = torch.where(count > 0, s, u) * 4 - 2
    h = s.T[..., None]  # (N, n, 1)
    for d_in, d_out in ((1, 64), (64, 64), (64, dim)):
        w = torch.randn(N, d_in, d_out, generator=generator) * (2 / d_in) ** 0.5
        h = torch.relu(h @ w + torch.randn(N, 1, d_out, generator=generator))  # (N, n, d_out)
    scale = h.var(1).mean(-1).sqrt().clamp(min=0.1)[:, None, None]  # (N, 1, 1)
    h = h + noise * scale * torch.randn(h.shape, generator=generator)
    return h.transpose(0, 1), level


def main():
    """Fit toy units by both rules, print the anchors found, and draw one unit around alignment."""
    from PIL import Image, ImageDraw
    levels = [1, 2, 3, 5, 8, 12, 0]
    c, _ = toy_units(levels, 4_000, torch.Generator().manual_seed(0), noise=0.03, jitter=0.02)
    c[:, 0] = c[0, 0]
    paper = DyGA(len(levels)).fit(c)
    grown = DyGA(len(levels), k_init=1, accept="bic", lam=0.5).fit(c)
    print("levels (1: constant, 0: continuous)   anchors: default   accept bic, k_init 1")
    for row in zip(levels, paper.mask.sum(1).tolist(), grown.mask.sum(1).tolist()):
        print("{:<38}{:<19}{}".format(*row))

    unit = 3  # of 5 levels
    before, after = c[:, unit], grown.align(c)[:, unit]  # (n, D)
    anchors = grown.anchors[unit][grown.mask[unit]]  # (K, D)
    axes = torch.linalg.svd(before - before.mean(0), full_matrices=False).Vh[:2].T  # (D, 2)
    low, high = (before @ axes).amin(0), (before @ axes).amax(0)
    hues = 360 * grown.nearest(c)[1][:, unit] // len(anchors)  # (n,)
    dots = [(f"hsl({hue}, 75%, 45%)", 1) for hue in hues.tolist()] + [("black", 4)] * len(anchors)
    image = Image.new("RGB", (840, 450), "white")
    draw = ImageDraw.Draw(image)
    for left, title, points in ((20, "5 levels in 2-D, by accept bic, k_init 1; black: anchors", before),
                                (430, "after align with lam 0.5 (its default is 0.1)", after)):
        draw.text((left, 14), title, "black")
        place = (torch.cat([points, anchors]) @ axes - low) / (high - low) * 360  # (n + K, 2)
        place = place + torch.tensor([left + 15, 54])
        for (px, py), (colour, radius) in zip(place.tolist(), dots):
            draw.ellipse((px - radius, py - radius, px + radius, py + radius), colour)
    Path("out").mkdir(exist_ok=True)
    image.save("out/dyga.png")


if __name__ == "__main__":
    main()
