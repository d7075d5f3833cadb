"""Dynamic Gaussian Anchoring (DyGA): the paper's main idea, section 3.2, Algorithms 2 and 3.

The extractor turns an image into N latent units of D numbers. If a unit is to mean one factor (say, wall hue) its values
should fall into one group per attribute (per hue). DyGA finds such groups and sharpens them:
  fit    after an epoch: a Gaussian mixture per unit. Its means are the unit's ANCHORS, their number is found on the way.
         HDDC, then split wide clusters, then drop tiny ones, then HDDC again (Algorithm 2, all N units as one batch).
  align  in every training step: move each unit a little towards its nearest anchor (equation 6), then condition the
         denoiser on the result. The denoiser works better with sharp groups, so the extractor learns to make them.

    python dyga.py      # some toy units: anchors found against the truth, and a picture, out/dyga.png

The file needs nothing but torch and knows nothing of diffusion: any model with latent units can use it.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

# Everything below the module works in NORMALISED units: minus the unit's mean, divided by ONE scale per unit (the root mean
# square deviation of a coordinate), so 0.5 and the variance floor mean the same for every unit.
FLOOR = 1e-3    # least variance along any direction. A unit is a curve in D dimensions: off the curve the variance is 0,
                # its Gaussian singular. sqrt(1e-3) = 3% of the unit's scale: anchors closer than that are not told apart.
LIMIT = 1e3     # an outlier farther than this many scales is put at this distance, so that squares fit in float32
EMPTY = 1e-6    # a component that holds fewer samples than this is gone


class Mixture(NamedTuple):
    """N Gaussian mixtures of up to K components: HDDC's model [a_kj b_k Q_k d_k]. Fields of absent components are unused.

    The covariance of component k has variance a_kj along its d_k main directions q_kj and one variance b_k along all
    the others. With d_k = D it is a full covariance.
    """
    mask: torch.Tensor      # (N, K) bool: the component is present
    log_pi: torch.Tensor    # (N, K) log of the weights
    mu: torch.Tensor        # (N, K, D) means
    q: torch.Tensor         # (N, K, D, J) main directions, J = largest d allowed
    a: torch.Tensor         # (N, K, J) variances along them, largest first; a_kj = b_k for j >= d_k
    b: torch.Tensor         # (N, K) variance along each of the other D - d_k directions
    d: torch.Tensor         # (N, K) int64: main directions in use


def select(m, index):
    """The mixture whose component k of unit i is component index[i, k] of m. index: (N, K') int64."""
    def pick(t):
        shape = index.shape + t.shape[2:]
        return t.gather(1, index.reshape(index.shape + (1,) * (t.dim() - 2)).expand(shape))
    return Mixture(*map(pick, m))


def where(condition, m1, m2):
    """Component k of unit i from m1 if condition[i, k] (N, K), else from m2."""
    return Mixture(*(torch.where(condition.reshape(condition.shape + (1,) * (t1.dim() - 2)), t1, t2)
                     for t1, t2 in zip(m1, m2)))


# ---------------------------------------------------------------------------------------------------------------------
# HDDC: expectation maximisation for all units and components at once (Bouveyron, Girard, Schmid 2007)

def cost_terms(m):
    """What cost() needs and does not depend on x: compute it once per pass over the data."""
    N, K, D, J = m.q.shape
    # a >= b, so the kept directions only ever lower the cost |x - mu|^2 / b; their factor goes into q, under the square.
    q = m.q * (1 / m.b[..., None] - 1 / m.a).clamp(min=0).sqrt()[..., None, :]                      # (N, K, D, J)
    shift = -torch.einsum("nkd,nkdj->nkj", m.mu, q).reshape(N, 1, K * J)                             # (N, 1, K*J)
    q = q.permute(0, 2, 1, 3).reshape(N, D, K * J)                                                  # (N, D, K*J)
    constant = m.a.log().sum(-1) + (D - J) * m.b.log() - 2 * m.log_pi                               # (N, K)
    constant = constant + m.mu.square().sum(-1) / m.b
    return q, shift, m.mu.mT / m.b[:, None, :], 1 / m.b[:, None, :], constant[:, None, :], m.mask[:, None, :]


def cost(x, terms):
    """HDDC's cost: minus twice log(pi_k times the density of component k), without D log(2 pi). Absent: 1e30.

    x: (N, n, D) in normalised units. Returns (N, n, K). As the paper of HDDC has it, P_k the projection on the main directions:
    sum_j (q_kj . (x - mu_k))^2 / a_kj + |x - P_k(x)|^2 / b_k + sum_j log a_kj + (D - d_k) log b_k - 2 log pi_k.
    By Pythagoras |x - P_k(x)|^2 = |x - mu_k|^2 - sum_j (q_kj . (x - mu_k))^2, so two matrix products with x give all
    of it; nothing of size (n, K, D) is ever made.
    """
    q, shift, mu_b, inv_b, constant, mask = terms
    N, n, D = x.shape
    K = mask.shape[-1]
    y = torch.baddbmm(shift, x, q).reshape(N, n, K, q.shape[-1] // K)                               # (N, n, K, J)
    out = x.square().sum(-1, keepdim=True) * inv_b - 2 * (x @ mu_b) + constant                      # (N, n, K)
    out = out - y.square().sum(-1)
    return out.masked_fill(~mask, 1e30)


def chunks(x, K):
    """Slices of the sample axis: a pass holds at most 2^20 numbers r x at once (a CPU's cache), or 2^26 on a GPU."""
    N, n, D = x.shape
    step = max(1, 2 ** (20 if x.device.type == "cpu" else 26) // (N * K * D))
    return [slice(i, i + step) for i in range(0, n, step)]


class Moments:
    """Running sums of r, r x and r x x^T for every unit and component: all that the M-step has to know of the data."""

    def __init__(self, N, K, D, device):
        # Chunks are summed in their own precision, the chunks among each other in float64.
        self.n = torch.zeros(N, K, dtype=torch.float64, device=device)
        self.x = torch.zeros(N, K, D, dtype=torch.float64, device=device)
        self.xx = torch.zeros(N, K, D, D, dtype=torch.float64, device=device)

    def add(self, x, r):
        """x: (N, n, D), r: (N, n, K). All components of a unit are one matrix product, the bulk of an iteration's work."""
        rx = (r[..., None] * x[..., None, :]).flatten(2)                                            # (N, n, K*D)
        self.n += r.sum(1)
        self.x += rx.sum(1).view(self.x.shape)                                                      # (N, K, D)
        self.xx += (rx.mT @ x).view(self.xx.shape)                                                  # (N, K, D, D)


def e_step(x, m, owner=None, parent=None):
    """One pass over the data: responsibilities (equation 4), chunk by chunk, and the moments they weight.

    x: (N, n, D). Returns Moments and the log-likelihood per sample (N, n). For a split (see DyGA.split) owner (N, n) and
    parent (N, K) restrict sample i to the components whose parent it is owned by; owner -1: the sample takes no part.
    """
    N, n, D = x.shape
    K = m.mask.shape[1]
    moments, likelihood, terms = Moments(N, K, D, x.device), [], cost_terms(m)
    for s in chunks(x, K):
        energy = cost(x[:, s], terms).mul_(-0.5)                                                    # (N, n, K)
        if owner is not None:
            energy = energy.masked_fill_(owner[:, s, None] != parent[:, None, :], -1e30)
        top = energy.amax(-1, keepdim=True)
        r = (energy - top).exp_()
        total = r.sum(-1, keepdim=True)
        taking_part = top > -1e29
        r = r / total * taking_part                                                                 # (N, n, K)
        moments.add(x[:, s], r)
        likelihood.append(torch.where(taking_part, top + total.log() - D / 2 * math.log(2 * math.pi), 0)[..., 0])
    return moments, torch.cat(likelihood, 1)


def scree(eigenvalues, threshold=0.2):
    """Cattell's scree test: the last drop in the sorted eigenvalues above `threshold` times the largest drop.

    eigenvalues: (..., D), largest first. Returns (...) int64, the number of eigenvalues before that drop, 1 to D - 1.
    """
    drop = eigenvalues[..., :-1] - eigenvalues[..., 1:]                                             # (..., D-1)
    big = drop > threshold * drop.amax(-1, keepdim=True)
    return (big * torch.arange(1, eigenvalues.shape[-1], device=drop.device)).amax(-1).clamp(min=1)


def m_step(moments, mask, d_max, d=None, d_least=None, floor=FLOOR, dtype=torch.float32):
    """The most likely mixture given the responsibilities. Returns a Mixture.

    d (N, K) fixes the d_k; otherwise the scree test chooses them, at least d_least and at most d_max.
    The eigenvectors are a batch of N*K matrices D x D: 0.08 ms each on a CPU, 5% to 10% of an iteration at 20,000 samples.
    """
    n = moments.n.clamp(min=EMPTY)
    N, K, D = moments.x.shape
    mu = moments.x / n[..., None]                                                                   # (N, K, D)
    cov = moments.xx / n[..., None, None] - mu[..., :, None] * mu[..., None, :]
    values, vectors = torch.linalg.eigh(cov)                                                        # ascending
    values, vectors = values.flip(-1), vectors.flip(-1)                                             # (N, K, D), (N, K, D, D)
    if d is None:
        d = scree(values).clamp(max=d_max)
        if d_least is not None:
            d = torch.maximum(d, d_least)
    kept = torch.arange(D, device=n.device) < d[..., None]                                          # (N, K, D)
    b = (values * ~kept).sum(-1) / (D - d).clamp(min=1)                                             # (N, K)
    # Of all variances above the floor, these are the most likely ones: clamping does not break EM's guarantee.
    b = torch.where(d < D, b, values[..., -1]).clamp(min=floor)
    a = torch.where(kept, values.clamp(min=floor), b[..., None])[..., :d_max]                       # (N, K, J)
    mask = mask & (moments.n > EMPTY)
    log_pi = (n / (n * mask).sum(1, keepdim=True)).log()
    return Mixture(mask, log_pi.to(dtype), mu.to(dtype), vectors[..., :d_max].to(dtype), a.to(dtype), b.to(dtype), d)


def hard_m_step(x, label, K, d_max, **options):
    """The mixture of a hard assignment, where EM starts. label: (N, n) int64, the component of each sample, -1 for none."""
    moments = Moments(x.shape[0], K, x.shape[2], x.device)
    for s in chunks(x, K):
        moments.add(x[:, s], (label[:, s, None] == torch.arange(K, device=x.device)).to(x.dtype))
    mask = torch.ones(x.shape[0], K, dtype=torch.bool, device=x.device)
    return m_step(moments, mask, d_max, dtype=x.dtype, **options)


def em(x, m, max_iter=30, tol=1e-4, d=None, floor=FLOOR, owner=None, parent=None):
    """Expectation maximisation from the mixture m, until no unit's mean log-likelihood rises by more than tol.

    x: (N, n, D). d (N, K) fixes the d_k. owner, parent: see e_step. Returns the mixture, the log-likelihood per iteration
    and unit (iterations, N), and which units converged (N,) bool.

    The log-likelihood never falls. HDDC as published repeats the scree test in every iteration, and a smaller d_k may fit
    worse. Here d_k may only grow within one run: the model of d_k directions is contained in that of d_k + 1, so the
    M-step still finds something at least as good. Each new run (after a split, after the filter) tests anew.
    """
    history = []
    converged = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for _ in range(max_iter):
        # Only the directions in use are projected on; usually 1 to 3 of d_max.
        J = m.q.shape[-1]
        used = int(m.d.amax())
        moments, likelihood = e_step(x, m._replace(q=m.q[..., :used], a=m.a[..., :used]), owner, parent)
        history.append(likelihood.sum(1, dtype=torch.float64))
        if len(history) > 1:
            converged = history[-1] - history[-2] <= tol * x.shape[1]
            if converged.all():
                break
        m = m_step(moments, m.mask, J, d, m.d, floor, x.dtype)
    return m, torch.stack(history), converged


def farthest_starts(x, K, generator):
    """k-means++ for all units at once: each next start is a sample drawn with odds (distance to the nearest start)^2.

    x: (N, n, D). Returns the index of the nearest start per sample, (N, n) int64. Identical samples share a start, so a unit
    of fewer than K different samples gets fewer components. (The loop is over starts: each draw depends on the last.)
    """
    N, n, D = x.shape
    odds = torch.ones(N, n, dtype=torch.float64, device=x.device)
    nearest = torch.zeros(N, n, dtype=torch.int64, device=x.device)
    for k in range(K):
        total = odds.cumsum(1)                                                                      # (N, n)
        u = torch.rand(N, 1, dtype=torch.float64, generator=generator, device=generator.device).to(x.device)
        i = torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=n - 1)               # (N, 1)
        distance = (x - x.gather(1, i[..., None].expand(N, 1, D))).square().sum(-1).double()        # (N, n)
        closer = distance < odds if k else torch.ones_like(nearest, dtype=torch.bool)
        nearest = torch.where(closer, k, nearest)
        odds = torch.where(closer, distance, odds)
    return nearest


# ---------------------------------------------------------------------------------------------------------------------

class DyGA(nn.Module):
    """Anchors for n_units latent units of `dim` numbers. Before the first fit, align is the identity.

    k_init, k_max   components to start with, and at most (the released settings: 8, 32)
    max_iter        EM iterations per run (30)
    lam             lambda of equation 6 (0.1); 0 switches alignment off, exactly
    accept          "always": split as the paper does. "bic": try to split every cluster and keep a split if the Bayesian
                    information criterion improves; with k_init=1 this grows to the number of levels.
    d_max           upper limit of every d_k. Paper: none. A unit is a curve, which a few directions describe; 8 keep
                    align cheap and buffers small.
    """

    def __init__(self, n_units, dim=32, k_init=8, k_max=32, max_iter=30, lam=0.1, accept="always", d_max=8,
                 spread=0.5, split_odds=0.5, min_samples=10, min_fraction=1e-3, tol=1e-4):
        super().__init__()
        if accept not in ("always", "bic"):
            raise ValueError(f"accept is {accept!r}; it must be 'always' or 'bic'")
        if not 1 <= k_init <= k_max or dim < 2:
            raise ValueError(f"k_init is {k_init}, k_max {k_max}, dim {dim}; needed: 1 <= k_init <= k_max and dim >= 2")
        self.k_init, self.k_max, self.max_iter, self.lam, self.accept = k_init, k_max, max_iter, lam, accept
        self.d_max, self.spread, self.split_odds, self.tol = min(d_max, dim), spread, split_odds, tol
        self.min_samples, self.min_fraction = min_samples, min_fraction
        N, K, D, J = n_units, k_max, dim, self.d_max
        # Buffers: they move with .to(device) and travel in the checkpoint. Shapes never change, absent components are masked.
        self.register_buffer("centre", torch.zeros(N, D))                       # normalised x = (c - centre) / scale
        self.register_buffer("scale", torch.ones(N))
        self.register_buffer("live", torch.zeros(N, dtype=torch.bool))          # the unit varies, so it may be moved
        self.register_buffer("anchors", torch.zeros(N, K, D))                   # mu, in the unit's own space
        self.register_buffer("mask", torch.zeros(N, K, dtype=torch.bool))
        self.register_buffer("log_pi", torch.zeros(N, K))
        self.register_buffer("q", torch.zeros(N, K, D, J))
        self.register_buffer("a", torch.ones(N, K, J))
        self.register_buffer("b", torch.ones(N, K))
        self.register_buffer("d", torch.ones(N, K, dtype=torch.int64))
        self.report = {}                                                        # filled by fit, for the log

    # -- anchor selection (section 3.2.1, Algorithm 2) --

    @torch.no_grad()
    def fit(self, features, generator=None):
        """Select the anchors of all units. features: (n, N, D), any float type, n >= 1. Returns self.

        generator: torch.Generator for starts and random splits; None: a new one with seed 0. Global random state is not used.
        self.report holds "anchors": {step: list of N counts}, "log_likelihood": {step: (iterations, N)} (of one EM run each)
        and "converged": list of N bool. Raises ValueError on a wrong shape and on NaN or Inf, naming the units.

        Time goes into the passes over the data, one per EM iteration: 20 units x 20,000 samples take 0.5 s for 8 components.
        """
        n, N, D = self._check(features)
        generator = generator or torch.Generator().manual_seed(0)
        x = features.transpose(0, 1)
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()         # (N, n, D)
        self.report = {"anchors": {}, "log_likelihood": {}}
        with torch.autocast(x.device.type, enabled=False):          # half precision is too coarse for second moments
            self._measure(x)
            x = self._normalise(x) * self.live[:, None, None]
            label = farthest_starts(x, self.k_init, generator)
            m = self._run("hddc", x, hard_m_step(x, label, self.k_init, self.d_max))
            m = self._split(x, m, generator)
            m = self._filter(x, m)
            m = self._run("refit", x, m)
            self._store(m)
        return self

    def _check(self, features):
        N, D = self.centre.shape
        if features.dim() != 3 or features.shape[1:] != (N, D) or not features.is_floating_point() or not len(features):
            raise ValueError(f"features are {features.dtype} {tuple(features.shape)}; expected floats (n, {N}, {D}), n >= 1")
        bad = (~features.isfinite()).any(0).any(-1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"features of unit {', '.join(map(str, bad))} hold NaN or Inf; DyGA needs finite features "
                             "(has the training diverged?)")
        return features.shape[0], N, D

    def _measure(self, x):
        """Centre and scale of each unit, without its farthest 0.1% of samples (one at least), so that outliers set neither."""
        N, n, D = x.shape
        distance = (x.double() - x.median(1, keepdim=True).values.double()).square().sum(-1)        # (N, n)
        dropped = 1 + n // 1000 if n >= 10 else 0
        kept = distance.topk(n - dropped, dim=1, largest=False).indices                             # (N, kept)
        kept = x.gather(1, kept[..., None].expand(-1, -1, D)).double()                              # (N, kept, D)
        centre = kept.mean(1)                                                                       # (N, D)
        scale = (kept - centre[:, None]).square().mean((1, 2)).sqrt()                               # (N,)
        # Below a millionth of its own size, what a unit does is float32 rounding: it carries nothing, and is never moved.
        self.live.copy_(scale > 1e-6 * centre.square().mean(1).sqrt())
        self.scale.copy_(torch.where(self.live, scale, 1))
        self.centre.copy_(centre)

    def _normalise(self, x):
        """(N, n, D) in the units' own space to normalised units."""
        return ((x - self.centre[:, None].to(x.dtype)) / self.scale[:, None, None].to(x.dtype)).clamp(-LIMIT, LIMIT)

    def _run(self, step, x, m):
        """One EM run on everything, noted in the report."""
        m, history, converged = em(x, m, self.max_iter, self.tol)
        self.report["anchors"][step] = m.mask.sum(1).tolist()
        self.report["log_likelihood"][step] = history.cpu()
        self.report["converged"] = converged.tolist()
        return m

    def _clusters(self, x, m):
        """The paper's clusters: owner (N, n) int64, the component with responsibility > 0.5, or -1; their sizes (N, K) and
        spreads (N, K), equation 5. (The paper calls it density; it is the mean distance to the cluster's own centre.)"""
        K, terms = m.mask.shape[1], cost_terms(m)
        top = [(-0.5 * cost(x[:, s], terms)).softmax(-1).max(-1) for s in chunks(x, K)]
        owner = torch.cat([torch.where(t.values > 0.5, t.indices, -1) for t in top], 1)             # (N, n)
        # Sums as products with a one-hot matrix: unlike scatter_add they come out the same each time on a GPU, too.
        hot = (owner[..., None] == torch.arange(K, device=x.device)).to(x.dtype)                    # (N, n, K)
        size = hot.sum(1)                                                                           # (N, K)
        centre = hot.mT @ x / size.clamp(min=1)[..., None]                                          # (N, K, D)
        own_centre = centre.gather(1, owner.clamp(min=0)[..., None].expand_as(x))                   # (N, n, D)
        distance = torch.linalg.vector_norm(x - own_centre, dim=-1, keepdim=True)                   # (N, n, 1)
        return owner, size, (hot.mT @ distance)[..., 0] / size.clamp(min=1)

    def _split(self, x, m, generator):
        """Rounds of splits. One round is ONE EM for all splits of all units: each sample belongs to at most one cluster,
        so it has two candidates, the halves of its own cluster. Returns a mixture of up to k_max components."""
        N, n, D = x.shape
        closed = torch.zeros(N, self.k_max, dtype=torch.bool, device=x.device)      # tried and not worth it
        for round in range(self.k_max):
            # A round can at most double the components: so many slots, and no more, cost time.
            before = m.mask.shape[1]
            K = min(self.k_max, max(before, 2 * int(m.mask.sum(1).max())))
            slots = torch.arange(K, device=x.device).expand(N, K)
            m = select(m, slots.clamp(max=before - 1))
            m = m._replace(mask=m.mask & (slots < before))

            owner, size, spread = self._clusters(x, m)
            wanted = m.mask if self.accept == "bic" else spread > self.spread
            if self.accept == "always" and round == 0:
                # Once, not every round, or every unit would end at k_max.
                # Paper: "the split is also performed arbitrarily"; probability and moment are not said.
                coin = torch.rand(N, K, generator=generator, device=generator.device).to(x.device)
                wanted = wanted | (coin < self.split_odds)
            wanted = wanted & m.mask & ~closed[:, :K] & (size >= 2) & self.live[:, None]
            # Each split takes a slot; if k_max leaves too few, the widest clusters go first.
            rank = torch.where(wanted, spread, -1).argsort(dim=1, descending=True, stable=True).argsort(1)      # (N, K)
            wanted = wanted & (rank < K - m.mask.sum(1, keepdim=True))
            if not wanted.any():
                break

            # The i-th widest wanted cluster keeps its slot for one half and gives the i-th free slot to the other.
            free = m.mask.to(torch.int8).argsort(dim=1, stable=True)                                # (N, K), free first
            twin = torch.where(wanted, free.gather(1, rank), slots)                                 # (N, K) parent -> slot
            # The inverse. A component without a twin writes into an extra slot K, which is cut off.
            parent = torch.cat([slots, slots[:, :1]], 1)
            parent = parent.scatter(1, torch.where(wanted, twin, K), slots)[:, :K]                  # (N, K) slot -> parent
            half = wanted.gather(1, parent)                                                         # (N, K) is a half
            owner = torch.where(wanted.gather(1, owner.clamp(min=0)), owner, -1)                    # (N, n)
            halves = self._halve(x, m, owner, twin)
            halves, _, _ = em(x, halves, self.max_iter, self.tol, owner=owner, parent=parent)
            # The two share the weight of their parent.
            weight = halves.log_pi.exp() * halves.mask                                              # (N, K)
            both = weight + weight.gather(1, twin)                                                  # (N, K) of a parent
            share = (weight / both.gather(1, parent).clamp(min=1e-30)).clamp(min=1e-30).log()
            halves = halves._replace(log_pi=m.log_pi.gather(1, parent) + share)

            accepted = wanted & halves.mask & halves.mask.gather(1, twin)                           # (N, K) parents
            if self.accept == "bic":
                accepted = accepted & (self._bic_gain(x, m, halves, owner, parent, twin) > 0)
            closed[:, :K] |= wanted & ~accepted
            m = where(half & accepted.gather(1, parent), halves, m)
        self.report["anchors"]["split"] = m.mask.sum(1).tolist()
        return m

    def _halve(self, x, m, owner, twin):
        """Cut each cluster at its mean, across its widest direction: the start of its split."""
        label = []
        offset = (m.mu * m.q[..., 0]).sum(-1)[:, None, :]                                           # (N, 1, K)
        for s in chunks(x, m.mask.shape[1]):
            own = owner[:, s].clamp(min=0)                                                          # (N, n)
            along = x[:, s] @ m.q[..., 0].mT - offset                                               # (N, n, K)
            above = along.gather(2, own[..., None])[..., 0] > 0                                     # (N, n)
            label.append(torch.where(owner[:, s] < 0, -1, torch.where(above, twin.gather(1, own), own)))
        return hard_m_step(x, torch.cat(label, 1), m.mask.shape[1], self.d_max)

    def _bic_gain(self, x, m, halves, owner, parent, twin):
        """By how much each split lowers the unit's BIC, (N, K), parents' slots. A split changes the density of its own
        cluster's samples; that of others, where its components weigh little, is taken as unchanged."""
        N, n, D = x.shape
        slots = torch.arange(m.mask.shape[1], device=x.device)
        _, before = e_step(x, m, owner, slots.expand(N, -1))                                        # (N, n)
        _, after = e_step(x, halves, owner, parent)
        hot = (owner[..., None] == slots).double()                                                  # (N, n, K)
        gain = (hot.mT @ (after - before).double()[..., None])[..., 0]                              # (N, K)

        def parameters(d):      # weight, mean, a, b, and the orthonormal directions
            return 1 + D + d + 1 + d * (D - (d + 1) / 2)
        added = parameters(halves.d) + parameters(halves.d).gather(1, twin) - parameters(m.d)
        return 2 * gain - added * math.log(n)

    def _filter(self, x, m):
        """Drop clusters of too few samples (outliers); the largest always stays. Present components move to the front."""
        _, size, _ = self._clusters(x, m)
        size = torch.where(m.mask, size, -1)
        keep = size >= max(self.min_samples, self.min_fraction * x.shape[1])
        keep = keep | torch.zeros_like(keep).scatter(1, size.argmax(1, keepdim=True), True)
        order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :int(keep.sum(1).max())]          # (N, K')
        m = select(m._replace(mask=keep), order)
        self.report["anchors"]["filter"] = m.mask.sum(1).tolist()
        return m

    def _store(self, m):
        """Write the mixture into the buffers, anchors in the units' own space."""
        K = m.mask.shape[1]
        self.mask.zero_()
        for name in ("mask", "log_pi", "q", "a", "b", "d"):
            getattr(self, name)[:, :K] = getattr(m, name).to(getattr(self, name).dtype)
        anchors = self.centre[:, None] + self.scale[:, None, None] * m.mu
        self.anchors.zero_()
        self.anchors[:, :K] = anchors * m.mask[..., None]

    # -- feature alignment (section 3.2.2, Algorithm 3) --

    def _cost(self, c):
        """(B, N, D) to the cost of each anchor, (N, B, K)."""
        mu = (self.anchors - self.centre[:, None]) / self.scale[:, None, None]
        m = Mixture(self.mask, self.log_pi, mu, self.q, self.a, self.b, self.d)
        return cost(self._normalise(c.transpose(0, 1)), cost_terms(m))

    @torch.no_grad()
    def responsibilities(self, c):
        """Equation 4. c: (B, N, D). Returns (B, N, K) float32; 0 for absent components, a fitted unit's rows sum to 1."""
        with torch.autocast(c.device.type, enabled=False):
            r = (-0.5 * self._cost(c.float())).softmax(-1) * self.mask[:, None]                     # (N, B, K)
        return r.transpose(0, 1)

    def align(self, c, gumbel=None, return_delta=False):
        """Equation 6: c + delta (mu_k - c), mu_k the anchor of highest responsibility. c: (B, N, D); same shape and type back.

        gumbel: a torch.Generator on c's device: draw the anchor with its responsibility as probability instead.
        return_delta: also return delta (B, N), between 0 and lambda; log its mean, near 0 means that anchors do nothing.
        Units that do not vary, and all units before the first fit, come back unchanged.
        """
        with torch.autocast(c.device.type, enabled=False):
            x = c.to(torch.promote_types(c.dtype, torch.float32))
            with torch.no_grad():
                # Paper: Gumbel noise on r, then softmax(r / 1e-4). Noise of size 1 on r in [0, 1] picks the right one of K
                # anchors with chance e / (e + K - 1) even when r is 1 for it, while the text wants the highest responsibility.
                # So: argmax, and noise only on log r, as an option. At 1e-4 the softmax is one-hot and its gradient 0, hence
                # the choice is a constant here too; gradients reach c through c and delta.
                score = -0.5 * self._cost(x.float())                                                     # (N, B, K)
                if gumbel is not None:
                    u = torch.rand(score.shape, generator=gumbel, device=score.device)
                    score = score - (-u.clamp(min=1e-20).log()).log()
                k = score.argmax(-1)                                                                # (N, B)
                mu = self.anchors.gather(1, k[..., None].expand(-1, -1, x.shape[-1])).transpose(0, 1)   # (B, N, D)
            # Paper: divides by c_j. Where c_j = 0 (common after a ReLU) that makes delta 0, whatever the other coordinates
            # say; a tenth of the unit's scale as least denominator keeps the formula alive.
            size = torch.maximum(x.abs(), 0.1 * self.scale[:, None])                                # (B, N, D)
            delta = self.lam * (-((x - mu).abs() / size).mean(-1)).exp() * self.live                # (B, N)
            out = (x + delta[..., None] * (mu - x)).to(c.dtype)                                     # (B, N, D)
        return (out, delta) if return_delta else out

    def delta(self, c):
        """delta of equation 6, per sample and unit. c: (B, N, D). Returns (B, N), between 0 and lambda."""
        return self.align(c, return_delta=True)[1]

    forward = align
