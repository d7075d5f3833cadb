"""Dynamic Gaussian Anchoring (DyGA): the paper's main idea, sections 3.2.1 and 3.2.2, Algorithms 2 and 3.

It sits between the extractor, which turns an image into N latent units of D numbers, and the denoiser. A unit that
means one factor (wall hue, say) should take one group of values per attribute (per hue). DyGA finds such groups:

    fit     after every r epochs, to the units of a fixed sample of images: a Gaussian mixture per unit. Its means are
            the unit's ANCHORS; their number is found too. HDDC, then split clusters, then drop tiny ones, then
            HDDC again (Algorithm 2).
    align   in every training step: move each unit a little towards its anchor (equation 6). The denoiser sees the
            result, works better with sharp groups, and so teaches the extractor to make them.

    python dyga.py      # fits toy units, prints the anchors found beside the truth, draws out/dyga.png
It knows nothing of diffusion: any model with latent units can use it. First reading: DyGA.align and DyGA.fit, near the
end, then upwards what fit calls; Moments is only a fast way to add up second moments.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

# The fit works in NORMALISED units: minus the unit's mean, divided by ONE scale per unit, the root mean square
# deviation of a coordinate. So the spread threshold and this floor mean the same for every unit.
FLOOR = 1e-3  # least variance: off its curve a unit's is 0, its Gaussian singular. sqrt(1e-3) is 3% of the scale
LIMIT = 1e3  # outliers beyond this many scales are put there, so that their squares fit into float32
EMPTY = 1e-6  # a component with fewer samples than this is gone
BLOCK = 64  # rows of one block in Moments
CHUNK = 2**18  # responsibilities that are in memory at a time: 1 MB


class Mixture(NamedTuple):
    """N Gaussian mixtures of up to K components, HDDC's model [a_kj b_k Q_k d_k]: component k has variance a_kj along
    its d_k main directions q_kj, and one variance b_k along the D - d_k others. The data choose d_k: see scree."""

    mask: torch.Tensor  # (N, K) bool: the component is present
    log_pi: torch.Tensor  # (N, K) log of its weight
    mu: torch.Tensor  # (N, K, D) mean
    q: torch.Tensor  # (N, K, D, J) orthonormal main directions; J is the largest d allowed
    a: torch.Tensor  # (N, K, J) variances along them, falling; b_k where j >= d_k
    b: torch.Tensor  # (N, K) variance along each other direction
    d: torch.Tensor  # (N, K) int64: how many directions are main ones

    def of(self, index):
        """Some of the mixtures, or of their components: every tensor at an index of its first one or two dimensions."""
        return Mixture(*(t[index] for t in self))


def front(m):
    """The mixture with its present components first, and no more slots than the fullest unit needs."""
    order = (~m.mask).long().argsort(dim=1, stable=True)[:, :int(m.mask.sum(1).max())]  # (N, K')
    unit = torch.arange(len(order), device=order.device)[:, None]
    return m.of((unit, order))


# ---- HDDC (Bouveyron, Girard, Schmid 2007): EM for all units and components as one batch, no loop over either ----

def cost(x, m):
    """HDDC's cost: -2 log(pi_k N(x; mu_k, Sigma_k)) - D log(2 pi), and 1e30 for absent components.

    x: (N, n, D) in normalised units. Returns (N, K, n). With P_k(x) the projection on the main directions, it is
    sum_j (q_kj . (x - mu_k))^2 / a_kj + |x - P_k(x)|^2 / b_k + sum_j log a_kj + (D - d_k) log b_k - 2 log pi_k.
    """
    N, K, D, J = m.q.shape
    # Pythagoras: |x - P(x)|^2 = |x - mu|^2 - sum_j (q_j . (x - mu))^2. That leaves matrix products with x, for mu and
    # for each main direction; nothing of size (n, K, D) is ever made.
    constant = m.a.log().sum(-1) + (D - J) * m.b.log() - 2 * m.log_pi + m.mu.square().sum(-1) / m.b  # (N, K)
    constant = constant.masked_fill(~m.mask, 1e30)
    out = torch.baddbmm(constant[..., None], m.mu / m.b[..., None], x.mT, alpha=-2)  # (N, K, n)
    out = out.addcmul_(x.square().sum(-1)[:, None], 1 / m.b[..., None])
    # a >= b, so a main direction only lowers the cost of being off the mean: by y^2, y = q . (x - mu) sqrt(1/b - 1/a).
    q = m.q * (1 / m.b[..., None] - 1 / m.a).clamp(min=0).sqrt()[:, :, None]  # (N, K, D, J)
    shift = -(q * m.mu[..., None]).sum(2, keepdim=True)  # (N, K, 1, J)
    for j in range(J):
        y = torch.baddbmm(shift[..., j], q[..., j], x.mT)  # (N, K, n)
        out.addcmul_(y, y, value=-1)
    return out


class Moments:
    """Weighted sums of 1, x - about and (x - about)(x - about)^T: all that the M-step needs to know of the data.

    about: (N, K, D), a guess of the means; sums about a point near the mean lose few digits, so float32 is enough.
    sums: float64 (N, K), (N, K, D) and (N, K, D, D).
    """

    def __init__(self, about):
        N, K, D = about.shape
        self.about = about
        self.sums = [about.new_zeros(shape, dtype=torch.float64) for shape in ((N, K), (N, K, D), (N, K, D, D))]

    def add(self, x, r, units=slice(None)):
        """Add samples x (N, n, D) with responsibilities r (N, K, n), of all units or of a slice of them.

        Most responsibilities are 0 up to rounding: a sample belongs to one component or two. So only the other pairs
        (sample, component) are gathered, sorted by component, and cut into blocks of BLOCK rows of one component, the
        last one padded with weight 0. A batched product squares all blocks: work of about n D^2 a unit, where a dense
        one needs n K D^2.
        """
        (N, n, D), K = x.shape, r.shape[1]
        pair = (r.flatten() > torch.finfo(r.dtype).eps).nonzero()[:, 0]  # (pairs,), sorted by unit, then component
        group = torch.arange(N * K, device=x.device)  # unit * K + component
        end = torch.searchsorted(pair, (group + 1) * n)  # (N*K,) where the pairs of a group end
        size = end.diff(prepend=end.new_zeros(1))  # (N*K,)
        blocks = (size + BLOCK - 1) // BLOCK  # (N*K,) blocks of a group; in the shapes below, of all groups
        padding = BLOCK * (blocks.cumsum(0) - blocks) - (end - size)  # (N*K,) rows of padding before a group
        row = torch.arange(len(pair), device=x.device) + padding.repeat_interleave(size)  # (pairs,)
        owner = group.repeat_interleave(blocks)  # (blocks,) the group of a block
        sample = pair - ((group - group // K) * n).repeat_interleave(size)  # (pairs,) row of x as (N*n, D)
        source = row.new_zeros(len(owner) * BLOCK).index_copy_(0, row, sample)
        weight = x.new_zeros(len(owner) * BLOCK).index_copy_(0, row, r.take(pair)).view(-1, 1, BLOCK)
        root = weight.sqrt()
        z = x.flatten(0, 1).index_select(0, source).view(-1, BLOCK, D)
        z = z.sub_(self.about[units].flatten(0, 1)[owner, None]).mul_(root.mT)  # (blocks, BLOCK, D)

        # Sums within one call are made in the data's precision, sums over calls in float64.
        for total, part in zip(self.sums, (weight.sum((1, 2)), (root @ z)[:, 0], z.mT @ z)):  # (blocks, ...)
            total = total[units]
            total += part.new_zeros(N * K, *part.shape[1:]).index_add_(0, owner, part).view_as(total)


def chunks(x, K):
    """Slices of units and of samples, so small that responsibilities fit the cache and memory does not grow with n.
    Rather few units than few samples: then a component has many samples in a chunk, and Moments little to pad."""
    N, n, _ = x.shape
    samples = min(n, max(1, CHUNK // K))
    units = max(1, CHUNK // (samples * K))
    return [(slice(u, u + units), slice(i, i + samples)) for u in range(0, N, units) for i in range(0, n, samples)]


def e_step(x, m, weight):
    """One pass over the data: responsibilities (equation 4), and from them the moments for the M-step.

    x: (N, n, D); weight: (N, n), 0 for padding, else 1. Returns Moments and the log-likelihood (N,) float64.
    """
    J = int(m.d.max())  # usually 1 to 3: most of the columns of q are not in use
    m = m._replace(q=m.q[..., :J], a=m.a[..., :J])
    moments, likelihood = Moments(m.mu), -x.shape[-1] / 2 * math.log(2 * math.pi) * weight.sum(1, dtype=torch.float64)
    for u, s in chunks(x, m.mask.shape[1]):
        energy = cost(x[u, s], m.of(u)).mul_(-0.5)  # (N', K, n'): the chunk's units and samples
        r = energy.softmax(1)  # (N', K, n')
        # log sum_k exp(energy_k) is energy_k - log r_k, for any k: here the likeliest.
        likelihood[u] += ((energy.amax(1) - r.amax(1).log()) * weight[u, s]).sum(1, dtype=torch.float64)
        moments.add(x[u, s], r.mul_(weight[u, None, s]), u)
    return moments, likelihood


def scree(eigenvalues, threshold=0.2):
    """Cattell's scree test, which chooses d_k: find the last step down between neighbouring eigenvalues (..., D), given
    falling, that is above threshold times the largest step; count those before it. Returns (...) int64, 1 to D - 1."""
    drop = eigenvalues[..., :-1] - eigenvalues[..., 1:]  # (..., D-1)
    large = drop > threshold * drop.amax(-1, keepdim=True)
    return (large * torch.arange(1, eigenvalues.shape[-1], device=drop.device)).amax(-1).clamp(min=1)


def m_step(moments, mask, d_max, d=None, d_least=1, floor=FLOOR):
    """The mixture that is most likely under the E-step's responsibilities.

    mask: (N, K) bool, components present. d: (N, K) int64 fixes the d_k; else the scree test, from d_least to d_max.
    """
    D, (count, first, second) = moments.about.shape[-1], moments.sums
    mask, count = mask & (count > EMPTY), count.clamp(min=EMPTY)  # (N, K)
    offset = first / count[..., None]  # (N, K, D)
    cov = second / count[..., None, None] - offset[..., :, None] * offset[..., None, :]  # (N, K, D, D)
    # N*K eigenproblems of 32 x 32 in float64, 0.09 ms each on a CPU core: cheap beside the pass over the data.
    values, vectors = torch.linalg.eigh(cov)  # rising
    values, vectors = values.flip(-1), vectors.flip(-1)  # (N, K, D), (N, K, D, D)
    if d is None:
        d = scree(values).clamp(max=d_max).clamp(min=d_least)
    main = torch.arange(D, device=d.device) < d[..., None]  # (N, K, D)
    b = (values * ~main).sum(-1) / (D - d).clamp(min=1)  # (N, K)
    # Clamped, they are still the most likely ones among all variances above the floor: EM keeps its guarantee.
    b = torch.where(d < D, b, values[..., -1]).clamp(min=floor)
    a = torch.where(main, values.clamp(min=floor), b[..., None])[..., :d_max]  # (N, K, J)
    log_pi = (count / (count * mask).sum(1, keepdim=True)).log()
    floats = (log_pi, moments.about + offset, vectors[..., :d_max], a, b)
    return Mixture(mask, *(t.to(moments.about.dtype) for t in floats), d)


def hard_m_step(x, label, K, d_max, weight, d=None):
    """The mixture of a hard assignment label (N, n) int64, from which EM starts."""
    moments = Moments(x.new_zeros(x.shape[0], K, x.shape[2]))
    for u, s in chunks(x, K):
        r = label[u, None, s] == torch.arange(K, device=x.device)[:, None]  # (N', K, n')
        moments.add(x[u, s], r * weight[u, None, s], u)
    return m_step(moments, torch.ones(x.shape[0], K, dtype=torch.bool, device=x.device), d_max, d)


def em(x, m, max_iter=30, tol=1e-4, d=None, floor=FLOOR, weight=None):
    """Expectation maximisation from the mixture m; a unit stops when its mean log-likelihood rises by tol or less.

    x, weight: see e_step; d, floor: see m_step. Returns the mixture, the log-likelihood before each iteration
    (iterations, N), and which units converged (N,) bool. Units do not influence each other.

    The log-likelihood never falls. HDDC as published repeats the scree test in every iteration, and a smaller d_k can
    fit worse. Here d_k only grows within a run: the model with d_k directions is contained in the one with d_k + 1, so
    the M-step still finds one at least as good. New components, of a split, start with the d_k of the scree test.
    """
    weight = torch.ones_like(x[..., 0]) if weight is None else weight
    running = torch.arange(len(x), device=x.device)  # a converged unit leaves the batch, and the rest goes faster
    final, history = Mixture(*(t.clone() for t in m)), []
    for i in range(max_iter):
        moments, likelihood = e_step(x, m, weight)
        m = m_step(moments, m.mask, m.q.shape[-1], d if d is None else d[running], m.d, floor)
        for whole, part in zip(final, m):
            whole[running] = part
        history.append(likelihood if i == 0 else history[-1].index_copy(0, running, likelihood))
        rising = (likelihood - history[i - 1][running] > tol * weight.sum(1)) | (i == 0)
        if not rising.all():
            running, x, weight, m = running[rising], x[rising], weight[rising], m.of(rising)
        if len(running) == 0:
            break
    converged = torch.ones_like(history[0], dtype=torch.bool).index_fill_(0, running, False)
    return final, torch.stack(history), converged


def plus_plus(x, K, generator):
    """k-means++ in all units at once: each next start is a sample drawn with odds (distance to the nearest start)^2.

    x: (N, n, D). Returns the nearest start of each sample, (N, n) int64. Equal samples share a start, so fewer than K
    different samples give fewer components. (The loop is over starts: each draw depends on the last.)
    """
    N, n, D = x.shape
    nearest = torch.zeros(N, n, dtype=torch.int64, device=x.device)
    odds = torch.full((N, n), math.inf, dtype=torch.float64, device=x.device)
    for k in range(K):
        total = (odds if k else torch.ones_like(odds)).cumsum(1)  # (N, n)
        u = torch.rand(N, 1, dtype=torch.float64, generator=generator, device=generator.device).to(x.device)
        start = torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=n - 1)  # (N, 1)
        distance = (x - x.gather(1, start[..., None].expand(N, 1, D))).square().sum(-1).double()  # (N, n)
        nearest = torch.where(distance < odds, k, nearest)
        odds = torch.minimum(distance, odds)
    return nearest


class DyGA(nn.Module):
    """Anchors for n_units latent units of dim numbers each. Before the first fit, align returns its input.

    Args:
        n_units: N.
        dim: D, the length of one unit's vector; at least 2.
        k_init: anchors per unit to start with (released settings: 8).
        k_max: anchors per unit at most (released settings: 32).
        max_iter: EM iterations of one run at most (released settings: 30).
        lam: lambda of equation 6, how far a unit moves to its anchor at most; 0 switches alignment off, exactly.
        accept: always: split as the paper does. bic: try every cluster, and keep a split only if it improves the
            Bayesian information criterion; with k_init 1 this grows to the number of levels.
        d_max: largest d_k. The paper has no limit; a unit is a curve, and 8 directions hold its bend too.
        spread: a cluster wider than this is split (the paper's psi), in scales of its unit.
        split_odds: probability of any other cluster to be split once, with accept always.
        min_samples: clusters of fewer samples are dropped.
        min_fraction: clusters of a smaller share of the samples are dropped.
        tol: EM has converged when the mean log-likelihood of a sample rises by less.
    """

    def __init__(self, n_units, dim=32, k_init=8, k_max=32, max_iter=30, lam=0.1, accept="always", d_max=8,
                 spread=0.5, split_odds=0.5, min_samples=10, min_fraction=1e-3, tol=1e-4):
        super().__init__()
        if accept not in ("always", "bic") or not 1 <= k_init <= k_max or dim < 2 or min(max_iter, d_max) < 1:
            raise ValueError(f"accept {accept!r}, k_init {k_init}, k_max {k_max}, dim {dim}, max_iter {max_iter}, "
                             f"d_max {d_max}: expected 'always' or 'bic', 1 <= k_init <= k_max, 2 <= dim, the others "
                             "at least 1")
        self.k_init, self.k_max, self.max_iter, self.lam, self.accept = k_init, k_max, max_iter, lam, accept
        self.d_max, self.spread, self.split_odds, self.tol = min(d_max, dim), spread, split_odds, tol
        self.min_samples, self.min_fraction = min_samples, min_fraction
        N, K, D, J = n_units, k_max, dim, self.d_max
        # Buffers move with .to(device) and travel in the checkpoint. Shapes never change; mask says what is there.
        self.register_buffer("centre", torch.zeros(N, D))  # normalised x = (c - centre) / scale
        self.register_buffer("scale", torch.ones(N))
        self.register_buffer("live", torch.zeros(N, dtype=torch.bool))  # the unit is not constant, so it may be moved
        self.register_buffer("anchors", torch.zeros(N, K, D))  # mu in the unit's own space; the rest is normalised
        self.register_buffer("mask", torch.zeros(N, K, dtype=torch.bool))
        self.register_buffer("log_pi", torch.zeros(N, K))
        self.register_buffer("q", torch.zeros(N, K, D, J))
        self.register_buffer("a", torch.ones(N, K, J))
        self.register_buffer("b", torch.ones(N, K))
        self.register_buffer("d", torch.ones(N, K, dtype=torch.int64))
        self.report = {}

    @torch.no_grad()
    def fit(self, features, generator=None):
        """Anchor selection (section 3.2.1, Algorithm 2). features: (n, N, D) floats, n >= 1. Returns self.

        generator: a torch.Generator for starts and random splits; without one, a new one of seed 0. Then self.report
        has, for the log, "anchors" {step: N counts}, and of the EM runs on all samples "log_likelihood"
        {step: (iterations, N)} and "converged" (N bools, of the last). ValueError on a wrong shape, NaN or Inf.
        Time goes into the passes over the data, one per EM iteration: half into costs, half into moments.
        """
        self._check(features)
        generator = generator or torch.Generator().manual_seed(0)
        self.report = {"anchors": {}, "log_likelihood": {}}
        with torch.autocast(features.device.type, enabled=False):  # half precision is too coarse for second moments
            dtype = torch.promote_types(features.dtype, torch.float32)
            x = features.to(dtype).transpose(0, 1).contiguous()  # (N, n, D)
            self._measure(x)
            x = self._normalise(x) * self.live[:, None, None]
            start = plus_plus(x, self.k_init, generator)
            m = self._run("hddc", x, hard_m_step(x, start, self.k_init, self.d_max, torch.ones_like(x[..., 0])))
            m = self._filter(x, self._split(x, m, generator))
            self._store(self._run("refit", x, m))
        return self

    def _check(self, features):
        shape, expected = tuple(features.shape), tuple(self.centre.shape)
        if len(shape) != 3 or shape[0] < 1 or shape[1:] != expected or not features.is_floating_point():
            raise ValueError(f"features are {features.dtype} {shape}; expected floats of shape (n >= 1, *{expected})")
        bad = (~features.isfinite()).any(0).any(-1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"features of unit {', '.join(map(str, bad))} hold NaN or Inf; has the training diverged?")

    def _measure(self, x):
        """Centre and scale of each unit. Outliers set neither: the farthest 0.1% of samples (of ten or more, one at
        least) are left out."""
        N, n, D = x.shape
        distance = (x.double() - x.median(1, keepdim=True).values.double()).square().sum(-1)  # (N, n)
        kept = distance.topk(n - 1 - n // 1000 if n >= 10 else n, dim=1, largest=False).indices  # (N, kept)
        kept = x.gather(1, kept[..., None].expand(-1, -1, D)).double()  # (N, kept, D)
        centre = kept.mean(1)  # (N, D)
        scale = (kept - centre[:, None]).square().mean((1, 2)).sqrt()  # (N,)
        # What varies by a millionth of its size is rounding: such a unit is constant, and never moved. (A unit of pure
        # noise varies: it is fitted and moved like any other.)
        self.live.copy_(scale > 1e-6 * centre.square().mean(1).sqrt())
        self.scale.copy_(torch.where(self.live, scale, 1))
        self.centre.copy_(centre)

    def _normalise(self, x):
        return ((x - self.centre[:, None]) / self.scale[:, None, None]).clamp(-LIMIT, LIMIT)

    def _run(self, step, x, m):
        """One EM run on all samples, noted in the report."""
        m, history, converged = em(x, m, self.max_iter, self.tol)
        self.report["anchors"][step], self.report["log_likelihood"][step] = m.mask.sum(1).tolist(), history.cpu()
        self.report["converged"] = converged.tolist()
        return m

    def _clusters(self, x, m):
        """The paper's clusters: owner (N, n) int64, the component with responsibility > 0.5 or else -1; the clusters'
        sizes (N, K) and spreads (N, K). Equation 5 calls spread density; it is the mean distance to the centre."""
        K = m.mask.shape[1]
        owner = torch.full_like(x[..., 0], -1, dtype=torch.int64)  # (N, n)
        for u, s in chunks(x, K):
            r, k = (-0.5 * cost(x[u, s], m.of(u))).softmax(1).max(1)  # (N', n')
            owner[u, s] = torch.where(r > 0.5, k, -1)
        hot = (owner[:, None] == torch.arange(K, device=x.device)[:, None]).to(x.dtype)  # (N, K, n)
        size = hot.sum(2)  # (N, K)
        centre = hot @ x / size.clamp(min=1)[..., None]  # (N, K, D)
        own = centre.gather(1, owner.clamp(min=0)[..., None].expand_as(x))  # (N, n, D)
        distance = torch.linalg.vector_norm(x - own, dim=-1, keepdim=True)  # (N, n, 1)
        return owner, size.long(), (hot @ distance)[..., 0] / size.clamp(min=1)

    def _split(self, x, m, generator):
        """Rounds of splits, until no cluster is to be split or k_max is reached. Returns a mixture of k_max slots."""
        m, N, K = front(m), len(x), self.k_max
        used = m.mask.shape[1]
        m = m.of((slice(None), torch.arange(K, device=x.device).clamp(max=used - 1)))
        m.mask[:, used:] = False
        # Paper: also splits "arbitrarily", no odds given. Here each cluster of the first run has one chance, not more.
        lucky = torch.rand(N, K, generator=generator, device=generator.device).to(x.device) < self.split_odds
        lucky, closed = lucky & m.mask, torch.zeros_like(m.mask)  # closed: tried, and not worth it
        while True:
            owner, size, spread = self._clusters(x, m)
            wanted = m.mask if self.accept == "bic" else m.mask & ((spread > self.spread) | lucky)
            wanted = wanted & ~closed & (size > 1) & self.live[:, None]
            # Every split takes a free slot; too few, and the widest clusters go first.
            rank = torch.where(wanted, spread, -1).argsort(dim=1, descending=True, stable=True).argsort(1)  # (N, K)
            wanted = wanted & (rank < (~m.mask).sum(1, keepdim=True))
            if not wanted.any():
                break
            # The largest first, which saves padding in _halve, and not more than the memory of x takes; the rest waits.
            order = (size * wanted).flatten().argsort(descending=True, stable=True)[:int(wanted.sum())]
            order = order[:x.shape[1] * N // int(size.flatten()[order[0]])]
            unit, k = order // K, order % K  # (S,) the clusters to split
            halves, accepted = self._halve(x, owner, size, unit, k)
            lucky[unit, k], closed[unit, k] = False, ~accepted
            unit, k, halves = unit[accepted], k[accepted], halves.of(accepted)
            halves.log_pi.add_(m.log_pi[unit, k, None])  # they share the weight of the cluster
            # One half keeps the cluster's slot, the other takes a free one: free slots are always the last ones.
            split = torch.zeros_like(m.mask).index_put_((unit, k), torch.tensor(True, device=x.device))
            free = (m.mask.sum(1, keepdim=True) + split.cumsum(1) - 1)[unit, k]  # (S,)
            for whole, part in zip(m, halves):
                whole[unit, k], whole[unit, free] = part[:, 0], part[:, 1]
        self.report["anchors"]["split"] = m.mask.sum(1).tolist()
        return m

    def _halve(self, x, owner, size, unit, k):
        """Split cluster k[i] of unit[i] (S,). Returns the halves, a Mixture (S, 2, ...), and accepted (S,) bool.

        A sample is in one cluster at most, so all splits of a round are ONE EM: S mixtures of two components, each on
        its cluster's samples, padded to the longest.
        """
        (_, n, D), u, k = x.shape, unit[:, None], k[:, None]  # (S, 1)
        by_owner = owner.argsort(dim=1, stable=True)  # (N, n): samples of no cluster, of cluster 0, of cluster 1, ...
        first = n - size.sum(1, keepdim=True) + size.cumsum(1) - size  # (N, K): where a cluster begins
        row = torch.arange(size[u, k].max(), device=x.device)
        weight = (row < size[u, k]).to(x.dtype)  # (S, longest)
        x = x[u, by_owner[u, (first[u, k] + row).clamp(max=n - 1)]]  # (S, longest, D)
        # Start: the cut across the widest direction with most variance between its sides. The mean may split a level.
        one = hard_m_step(x, torch.zeros_like(weight), 1, self.d_max, weight)
        along, order = (((x - one.mu) @ one.q[:, 0, :, :1])[..., 0] * weight).sort(dim=1, stable=True)  # (S, longest)
        left = weight.gather(1, order).cumsum(1)  # (S, longest): samples up to here
        right = weight.sum(1, keepdim=True) - left
        between = along.cumsum(1).square() * (1 / left.clamp(min=1) + 1 / right.clamp(min=1)) * (right > 0)
        above = torch.zeros_like(order).scatter_(1, order, (row > between.argmax(1, keepdim=True)).long())
        # BIC: the halves keep their cluster's d_k, or new directions of mere noise would count against a good split.
        d = one.d.expand(-1, 2) if self.accept == "bic" else None
        two = em(x, hard_m_step(x, above, 2, self.d_max, weight, d), self.max_iter, self.tol, d, weight=weight)[0]
        accepted = two.mask.all(1)
        if self.accept == "bic":
            # Free numbers of a component: weight, mean, b, the a_j, d orthonormal directions. The unit's BIC improves
            # by gain - (what is added) log n, as far as other clusters' densities vanish on these samples.
            one_free, two_free = ((2 + D + m.d + m.d * (D - (m.d + 1) / 2)).sum(1) for m in (one, two))
            gain = 2 * (e_step(x, two, weight)[1] - e_step(x, one, weight)[1])  # (S,)
            accepted = accepted & (gain > (two_free - one_free) * math.log(n))
        return two, accepted

    def _filter(self, x, m):
        """Drop clusters of too few samples, which are outliers; the largest always stays."""
        size = torch.where(m.mask, self._clusters(x, m)[1], -1)
        keep = size >= max(self.min_samples, self.min_fraction * x.shape[1])
        m = front(m._replace(mask=keep.scatter(1, size.argmax(1, keepdim=True), True)))
        self.report["anchors"]["filter"] = m.mask.sum(1).tolist()
        return m

    def _store(self, m):
        """Write the mixture into the buffers, its means in the units' own space."""
        K = m.mask.shape[1]
        self.mask.zero_()
        for name in ("mask", "log_pi", "q", "a", "b", "d"):
            getattr(self, name)[:, :K] = getattr(m, name)
        self.anchors.zero_()
        self.anchors[:, :K] = (self.centre[:, None] + self.scale[:, None, None] * m.mu) * m.mask[..., None]

    @torch.no_grad()
    def responsibilities(self, c):
        """Equation 4. c: (B, N, D) -> (B, N, K) float32; absent components get 0, a fitted unit's rows sum to 1."""
        with torch.autocast(c.device.type, enabled=False):
            mu = (self.anchors - self.centre[:, None]) / self.scale[:, None, None]  # (N, K, D)
            m = Mixture(self.mask, self.log_pi, mu, self.q, self.a, self.b, self.d)
            energy = -0.5 * cost(self._normalise(c.float().transpose(0, 1)), m)  # (N, K, B)
            return energy.permute(2, 0, 1).softmax(-1) * self.mask

    def align(self, c, gumbel=None, return_delta=False):
        """Feature alignment (section 3.2.2, Algorithm 3): c (B, N, D) -> c~ = c + delta (mu_k - c), equation 6.

        delta = lambda exp(-mean_j |c_j - mu_kj| / |c_j|) is a number per sample and unit, from 0 to lambda.
        mu_k is the anchor of highest responsibility. gumbel: a torch.Generator on c's device; the anchor is then drawn
        with its responsibility as probability. return_delta: also return delta (B, N), from 0 to lambda; log its mean,
        near 0 the anchors do nothing. Constant units, and all units before the first fit, come back unchanged.
        """
        # Paper: Gumbel noise on r, then softmax(r / 1e-4). As r is in [0, 1], noise of size 1 finds the right of K
        # anchors with chance e / (e + K - 1) only, even where r is 1; but the text wants the highest r. Here: argmax,
        # and noise on log r as an option. A softmax at 1e-4 is a step, with gradient 0, so the choice and the anchor
        # are constants here: no gradient reaches them. The unit gets it through c itself and through delta.
        r = self.responsibilities(c)  # (B, N, K)
        if gumbel is not None:
            u = torch.rand(r.shape, generator=gumbel, device=r.device)
            r = r.log() - (-u.clamp(min=1e-20).log()).log()
        k = r.argmax(-1)  # (B, N)
        anchor = self.anchors[torch.arange(k.shape[1], device=k.device), k]  # (B, N, D), in c's own space
        x = c.float()  # what follows is elementwise, which autocast leaves in float32
        # Paper: divides by c_j. Where one c_j is 0, common after a ReLU, delta would be 0 whatever the unit's other
        # numbers say; here a tenth of the unit's scale is the least denominator.
        # And delta is per sample and unit: the released code has one delta for the whole batch, where one such c_j
        # switches alignment off for everybody.
        size = torch.maximum(x.abs(), 0.1 * self.scale[:, None])  # (B, N, D)
        delta = self.lam * (-((x - anchor).abs() / size).mean(-1)).exp() * self.live  # (B, N)
        out = (x + delta[..., None] * (anchor - x)).to(c.dtype)
        return (out, delta) if return_delta else out

    def delta(self, c):
        """delta of equation 6 per sample and unit. c: (B, N, D) -> (B, N), from 0 to lambda."""
        return self.align(c, return_delta=True)[1]


def toy_units(levels, n, generator, dim=32, noise=0.05, jitter=0.0):
    """Units (n, N, dim) like the extractor's, a scalar of levels[i] equally likely values (0: continuous) through a
    random MLP, and which value it was (n, N). noise: of the unit, in its scales; jitter: of the scalar, in steps."""
    N, count = len(levels), torch.tensor(levels)
    u = torch.rand(n, N, generator=generator)
    level = (u * count).long()
    s = torch.where(count > 0, (level + 0.5 + jitter * torch.randn(n, N, generator=generator)) / count, u) * 4 - 2
    h = s.T[..., None]  # (N, n, 1)
    for d_in, d_out in ((1, 64), (64, 64), (64, dim)):
        w = torch.randn(N, d_in, d_out, generator=generator) * (2 / d_in) ** 0.5
        h = torch.relu(h @ w + torch.randn(N, 1, d_out, generator=generator))  # (N, n, d_out)
    scale = h.var(1).mean(-1).sqrt().clamp(min=0.1)[:, None, None]  # (N, 1, 1)
    return (h + noise * scale * torch.randn(h.shape, generator=generator)).transpose(0, 1), level


def main():
    """Fit toy units by both rules, print the anchors found, and draw one unit before and after alignment."""
    from PIL import Image, ImageDraw
    names = ["constant", "2 levels", "3 levels", "5 levels", "8 levels", "12 levels", "continuous"]
    c = toy_units([1, 2, 3, 5, 8, 12, 0], 4_000, torch.Generator().manual_seed(0), noise=0.03, jitter=0.02)[0]
    c[:, 0] = c[0, 0]
    paper, bic = DyGA(len(names)).fit(c), DyGA(len(names), k_init=1, accept="bic", lam=0.5).fit(c)
    print("unit          anchors, the paper's rule     anchors, k_init 1 and accept bic")
    for name, always, grown in zip(names, paper.mask.sum(1).tolist(), bic.mask.sum(1).tolist()):
        print(f"{name:14}{always:<30}{grown}")

    unit = names.index("5 levels")
    owner, anchors = bic.responsibilities(c)[:, unit].argmax(-1).tolist(), bic.anchors[unit][bic.mask[unit]]  # (K, D)
    before, after = c[:, unit], bic.align(c)[:, unit]  # (n, D)
    axes = torch.linalg.svd(before - before.mean(0), full_matrices=False).Vh[:2].T  # (D, 2): the widest directions
    low, high = (before @ axes).amin(0), (before @ axes).amax(0)
    image = Image.new("RGB", (840, 450), "white")
    draw = ImageDraw.Draw(image)
    for left, title, points in ((20, "before", before), (430, "after, lambda = 0.5", after)):
        draw.text((left, 14), f"{names[unit]} in 2-D, {len(anchors)} anchors (+), coloured by anchor; {title}", "black")
        draw.rectangle((left, 34, left + 390, 434), outline="grey")
        place = torch.cat([points, anchors]) @ axes  # (n + K, 2)
        place = ((place - low) / (high - low) * 360 + torch.tensor([left + 15, 54])).tolist()
        for (px, py), k in zip(place, owner):
            draw.ellipse((px - 1, py - 1, px + 1, py + 1), f"hsl({360 * k // len(anchors)}, 75%, 45%)")
        for px, py in place[len(points):]:
            draw.line((px - 6, py, px, py, px, py - 6, px, py + 6, px, py, px + 6, py), "black", 2)
    Path("out").mkdir(exist_ok=True)
    image.save("out/dyga.png")


if __name__ == "__main__":
    main()
