"""Facts about DyGA: HDDC against closed forms, scikit-learn and SciPy; splits and filter; alignment (equation 6)."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import nn

import dyga
from dyga import DyGA, Moments, cost, em, hard_m_step, m_step, scree, toy_units


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def overlapping(N=3, n=1500, D=6, K=4, seed=0):
    """Float64 data (N, n, D) of K overlapping Gaussians, and random labels (N, n) to start from."""
    g = generator(seed)
    centres = torch.randn(N, K, D, generator=g, dtype=torch.float64)
    x = torch.randn(N, n, D, generator=g, dtype=torch.float64)
    x = x + 1.5 * centres[:, torch.randint(0, K, (n,), generator=g)]
    return x, torch.randint(0, K, (N, n), generator=g)


def start(x, label, K, d=None, d_max=None):
    """The mixture of a hard assignment, without a floor on the variances."""
    moments = Moments(x.new_zeros(len(x), K, x.shape[-1]))
    moments.add(x, (label[:, None] == torch.arange(K)[:, None]).to(x.dtype))
    return m_step(moments, torch.ones(len(x), K, dtype=torch.bool), d_max or x.shape[-1], d=d, floor=0.0)


def covariance(m):
    """(N, K, D, D) from the main directions and the one variance of all the others."""
    D = m.q.shape[-2]
    extra = torch.diag_embed(m.a - m.b[..., None])
    return m.b[..., None, None] * torch.eye(D, dtype=m.b.dtype) + m.q @ extra @ m.q.mT


def purity(owner, level):
    """Share of the samples whose anchor's commonest level is their own."""
    table = np.zeros((owner.max() + 1, level.max() + 1))
    np.add.at(table, (owner, level), 1)
    return table.max(1).sum() / len(owner)


def fitted(levels=(3, 5, 0), n=2000, seed=0, noise=0.05, **options):
    c, level = toy_units(list(levels), n, generator(seed), noise=noise)
    return DyGA(len(levels), **options).fit(c), c, level


# ---- HDDC ----


def test_with_every_direction_kept_em_is_scikit_learns_full_gaussian_mixture():
    x, label = overlapping()
    N, n, D = x.shape
    K, iterations = 4, 7
    d = torch.full((N, K), D)
    m = start(x, label, K, d=d)
    found, history, _ = em(x, m, iterations, tol=-1, d=d, floor=0.0)
    r = (-0.5 * cost(x, found)).softmax(1).mT  # (N, n, K)
    for i in range(N):
        reference = GaussianMixture(K, tol=0, reg_covar=0, max_iter=iterations, weights_init=m.log_pi[i].exp().numpy(),
                                    means_init=m.mu[i].numpy(), precisions_init=covariance(m)[i].inverse().numpy())
        with pytest.warns(Warning):  # it warns that it has not converged
            reference.fit(x[i].numpy())
        assert reference.n_iter_ == len(history) == iterations
        probabilities = reference.predict_proba(x[i].numpy())
        for ours, theirs in ((found.mu[i], reference.means_), (covariance(found)[i], reference.covariances_),
                             (found.log_pi[i].exp(), reference.weights_), (r[i], probabilities)):
            assert np.abs(ours.numpy() - theirs).max() < 1e-6
        moments, likelihood = dyga.e_step(x, found, torch.ones_like(x[..., 0]))
        assert math.isclose(likelihood[i] / n, reference.score(x[i].numpy()), rel_tol=1e-9)


def test_the_cost_is_the_gaussian_density_with_the_tied_covariance():
    x, label = overlapping(D=9)
    m = start(x, label, 4, d=torch.tensor([[1, 2, 5, 8]] * 3), d_max=8)
    sigma = covariance(m)
    for i in range(3):
        for k in range(4):
            log_density = multivariate_normal(m.mu[i, k].numpy(), sigma[i, k].numpy()).logpdf(x[i].numpy())
            expected = -2 * (log_density + m.log_pi[i, k].item()) - 9 * math.log(2 * math.pi)
            assert np.abs(cost(x, m)[i, k].numpy() / expected - 1).max() < 1e-8


def test_the_tied_covariance_keeps_the_d_largest_eigenvalues_and_the_mean_of_the_rest():
    x, label = overlapping(N=1, K=1)
    m = start(x, 0 * label, 1, d=torch.tensor([[2]]), d_max=4)
    values = np.linalg.eigvalsh(np.cov(x[0].numpy().T, bias=True))[::-1]
    assert np.allclose(m.a[0, 0].numpy(), [values[0], values[1], *[values[2:].mean()] * 2])
    assert np.allclose(m.b[0, 0], values[2:].mean())


def test_moments_equal_a_direct_sum_for_soft_and_for_sparse_responsibilities():
    g = generator()
    x, about = (torch.randn(2, size, 5, generator=g, dtype=torch.float64) for size in (301, 3))
    for sharpness in (1.0, 60.0):  # soft: every pair counts; sharp: most responsibilities are below rounding
        r = (sharpness * torch.randn(2, 3, 301, generator=g, dtype=torch.float64)).softmax(1)
        moments = Moments(about)
        moments.add(x[:, :100], r[..., :100])
        moments.add(x[:, 100:], r[..., 100:])
        z = x[:, None] - about[:, :, None]  # (N, K, n, D)
        direct = r.sum(-1), (r[..., None] * z).sum(2), torch.einsum("nki,nkid,nkie->nkde", r, z, z)
        assert all(torch.allclose(a, b) for a, b in zip(moments.sums, direct))


def test_scree_stops_after_the_last_drop_above_a_fifth_of_the_largest():
    spectra = torch.tensor([[10.0, 1, 0.9, 0.8], [10, 9, 8, 0], [10, 10, 10, 10], [10, 4, 3, 2.9]])
    assert scree(spectra).tolist() == [1, 3, 1, 1]
    assert scree(spectra, threshold=0.1).tolist() == [1, 3, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_the_likelihood_never_falls_within_a_run_although_d_is_chosen_anew(seed):
    x, label = overlapping(D=8, seed=seed)
    m = hard_m_step(x, label, 4, 5, torch.ones_like(x[..., 0]))
    found, history, _ = em(x, m, 40, tol=-1)
    assert (history.diff(dim=0) >= -1e-10 * history[:-1].abs()).all()
    assert (found.d >= m.d).all()


def test_the_reported_likelihood_of_a_float32_fit_falls_by_rounding_at_most():
    model, c, _ = fitted((1, 4, 12, 0), tol=-1)
    # A cost is a difference of numbers of the size D / FLOOR = 32,000, which float32 rounds to 1e-3 or so.
    for history in model.report["log_likelihood"].values():
        assert len(history) == model.max_iter and (history.diff(dim=0) >= -1e-3 * len(c)).all()


def test_a_unit_is_fitted_alike_alone_and_among_others_and_converges_by_itself():
    x, label = overlapping()
    together, _, converged = em(x, hard_m_step(x, label, 4, 5, torch.ones_like(x[..., 0])), 60, tol=1e-3)
    alone, _, _ = em(x[1:2], hard_m_step(x[1:2], label[1:2], 4, 5, torch.ones_like(x[1:2, :, 0])), 60, tol=1e-3)
    assert torch.allclose(together.mu[1], alone.mu[0]) and converged.all()
    assert not em(x, hard_m_step(x, label, 4, 5, torch.ones_like(x[..., 0])), 3, tol=1e-9)[2].any()


def test_a_component_without_samples_is_gone():
    x, label = overlapping(K=4)
    m = hard_m_step(x, label.clamp(max=2), 5, 4, torch.ones_like(x[..., 0]))
    assert m.mask.tolist() == [[True, True, True, False, False]] * 3
    assert (cost(x, m)[:, 3:] == 1e30).all() and all(t.isfinite().all() for t in m)


# ---- how many anchors: split and filter ----


def table(accept, k_init, seed, n=5000):
    """20 units of 1-12 levels: (levels, anchors, purity, adjusted Rand index), see assets/results/dyga_levels.txt."""
    levels = [1 + i % 12 for i in range(20)]
    c, level = toy_units(levels, n, generator(seed))
    model = DyGA(20, k_init=k_init, accept=accept).fit(c, generator(seed))
    owner = model.responsibilities(c).argmax(-1).numpy()
    return [(k, int(model.mask[i].sum()), purity(owner[:, i], level[:, i].numpy()),
             adjusted_rand_score(level[:, i].numpy(), owner[:, i])) for i, k in enumerate(levels)]


def test_the_papers_rule_finds_pure_anchors():
    assert sum(pure >= 0.99 for _, _, pure, _ in table("always", 8, seed=0, n=2500)) >= 19


def test_growing_from_one_anchor_by_bic_finds_the_number_of_levels():
    rows = table("bic", 1, seed=0)
    assert sum(found == k and rand > 0.95 for k, found, _, rand in rows) >= 18


def test_wide_clusters_are_split_without_the_random_splits_and_narrow_ones_are_not():
    c, level = toy_units([2, 6], 2000, generator(3))
    coarse = DyGA(2, k_init=1, split_odds=0.0, spread=100.0).fit(c)
    assert coarse.mask.sum(1).tolist() == [1, 1]  # nothing is wide
    fine = DyGA(2, k_init=1, split_odds=0.0).fit(c)
    assert fine.mask.sum(1).tolist() == [2, 6]
    assert fine.report["anchors"]["hddc"] == [1, 1] and fine.report["anchors"]["split"] == [2, 6]
    certain = DyGA(2, k_init=1, split_odds=1.0, spread=100.0).fit(c)
    assert certain.mask.sum(1).tolist() == [2, 2]  # each cluster once, by chance


def test_never_more_than_k_max_anchors():
    model, _, _ = fitted((12, 0), k_init=4, k_max=6)
    assert model.mask.sum(1).tolist() == [6, 6]  # both units would take more
    assert torch.allclose((model.log_pi.exp() * model.mask).sum(1), torch.ones(2))


def test_spread_is_the_mean_distance_to_the_clusters_own_mean():
    model, c, _ = fitted((4,))
    x = model._normalise(c.transpose(0, 1))
    m = dyga.Mixture(model.mask, model.log_pi, (model.anchors - model.centre[:, None]) / model.scale[:, None, None],
                     model.q, model.a, model.b, model.d)
    owner, size, spread = model._clusters(x, m)
    for k in model.mask[0].nonzero()[:, 0].tolist():
        part = x[0, owner[0] == k]
        assert len(part) == size[0, k] and torch.isclose(spread[0, k], (part - part.mean(0)).norm(dim=1).mean())


def test_small_clusters_are_dropped_and_the_rest_refitted():
    c, _ = toy_units([3], 2000, generator(), noise=0.02)
    c[:6] += 40.0  # six samples far away, and of one kind
    model = DyGA(1, k_init=6).fit(c)
    steps = model.report["anchors"]
    assert list(steps) == ["hddc", "split", "filter", "refit"] and steps["filter"][0] < steps["split"][0]
    size = model.responsibilities(c)[:, 0].argmax(-1).bincount()
    assert (model.anchors[0][model.mask[0]] - c[0, 0]).norm(dim=1).min() > 20 and size.min() >= 10


# ---- hard input ----


def hard_inputs():
    units, _ = toy_units([3, 0], 400, generator(), dim=8)
    spoilt = units.clone()
    spoilt[7, 1, 2] = 1e6
    yield "constant unit", torch.stack([units[:, 0], torch.full((400, 8), 3.7)], 1)
    yield "duplicated samples", units[:5].repeat(80, 1, 1)
    yield "an outlier of 1e6", spoilt
    yield "three samples", units[:3]
    yield "one sample", units[:1]
    yield "all samples equal", units[:1].expand(400, -1, -1)
    yield "all zero", torch.zeros(400, 2, 8)
    yield "tiny numbers", units * 1e-12
    yield "huge numbers", units * 1e12
    yield "a far mean", units + 1e4
    yield "float16", units.half()
    yield "bfloat16", units.bfloat16()
    yield "float64", units.double()
    yield "one varying number", torch.cat([units[..., :1], torch.zeros(400, 2, 7)], -1)


@pytest.mark.parametrize("options", [dict(), dict(k_init=1, accept="bic")], ids=["always", "bic"])
@pytest.mark.parametrize("c", [pytest.param(c, id=name) for name, c in hard_inputs()])
def test_hard_input_gives_finite_anchors_and_the_same_ones_again(c, options):
    model, again = (DyGA(2, dim=8, **options).fit(c) for _ in range(2))
    assert all(b.isfinite().all() for b in model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers()))
    aligned, delta = model.align(c, return_delta=True)
    assert aligned.isfinite().all() and aligned.dtype == c.dtype
    assert (delta >= 0).all() and (delta <= model.lam).all()
    assert torch.allclose(model.responsibilities(c).sum(-1), torch.ones(c.shape[:2]), atol=1e-5)
    assert 1 <= model.mask.sum(1).min() and model.mask.sum(1).max() <= max(1, len(c))


def test_a_constant_unit_keeps_one_anchor_and_is_never_moved():
    c, _ = toy_units([3, 1], 500, generator())
    c[:, 1] = c[0, 1]
    model = DyGA(2).fit(c)
    assert model.mask.sum(1)[1] == 1 and torch.equal(model.align(c)[:, 1], c[:, 1])
    assert torch.allclose(model.anchors[1, 0], c[0, 1])


def test_one_outlier_does_not_hide_the_levels():
    c, level = toy_units([3], 3000, generator())
    c[5, 0] = 1e6
    model = DyGA(1, k_init=1, accept="bic").fit(c)
    owner = model.responsibilities(c)[:, 0].argmax(-1)
    assert model.mask.sum() == 3 and purity(owner.numpy(), level[:, 0].numpy()) > 0.99


def test_100_000_samples_fit():
    c, _ = toy_units([3, 0], 100_000, generator(), dim=8)
    model = DyGA(2, dim=8, k_init=4, k_max=8, max_iter=5).fit(c)
    assert model.mask.sum(1).min() >= 3


def test_nan_inf_and_wrong_shapes_raise_an_error_that_names_the_unit():
    c, _ = toy_units([2, 2, 2], 50, generator())
    c[3, 1, 4], c[9, 2, 0] = math.nan, math.inf
    model = DyGA(3)
    with pytest.raises(ValueError, match="unit 1, 2 hold NaN or Inf"):
        model.fit(c)
    assert not model.mask.any()  # nothing was half fitted
    for wrong in (c[:, :2], c[..., :5], c[0], c[:0], c.long()):
        with pytest.raises(ValueError, match="expected floats of shape"):
            model.fit(wrong)
    for options in (dict(accept="aic"), dict(k_init=0), dict(k_init=9, k_max=8), dict(dim=1), dict(max_iter=0),
                    dict(d_max=0)):
        with pytest.raises(ValueError, match="expected 'always' or 'bic', 1 <= k_init <= k_max, 2 <= dim, the others"):
            DyGA(3, **options)


def test_fitting_is_repeatable_and_leaves_the_global_random_state_alone():
    c, _ = toy_units([3, 0], 800, generator())
    state = torch.get_rng_state()
    a, b, other = (DyGA(2).fit(c, generator(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers()))
    assert not torch.equal(a.anchors, other.anchors)


def test_shifting_and_scaling_a_unit_shifts_and_scales_its_anchors():
    c, _ = toy_units([4], 1000, generator())
    model, moved = DyGA(1).fit(c.double()), DyGA(1).fit(8 * c.double() - 3)
    assert torch.equal(model.mask, moved.mask)
    assert torch.allclose(8 * model.anchors[model.mask] - 3, moved.anchors[moved.mask], atol=1e-3)


def test_half_precision_autocast_does_not_change_the_fit():
    c, _ = toy_units([3, 5], 600, generator())
    with torch.autocast("cpu", torch.bfloat16):
        model = DyGA(2).fit(c)
        aligned = model.align(c)
    plain = DyGA(2).fit(c)
    assert torch.equal(model.anchors, plain.anchors) and torch.equal(aligned, plain.align(c))


# ---- alignment ----


def test_align_is_equation_6_with_the_anchor_of_highest_responsibility():
    model, c, _ = fitted(lam=0.3)
    aligned, delta = model.align(c, return_delta=True)
    r = model.responsibilities(c)
    for b in range(0, len(c), 97):
        for i in range(c.shape[1]):
            mu = model.anchors[i, r[b, i].argmax()]
            size = c[b, i].abs().clamp(min=0.1 * model.scale[i].item())
            expected = 0.3 * math.exp(-((c[b, i] - mu).abs() / size).mean())
            assert math.isclose(delta[b, i], expected, rel_tol=1e-5)
            assert torch.allclose(aligned[b, i], c[b, i] + expected * (mu - c[b, i]), atol=1e-6)
    assert torch.equal(model.delta(c), delta)


def test_align_is_the_identity_before_the_first_fit_and_with_lambda_0():
    model, c, _ = fitted(lam=0.0)
    assert torch.equal(model.align(c), c)
    fresh = DyGA(3)
    assert torch.equal(fresh.align(c), c) and fresh.delta(c).eq(0).all() and fresh.responsibilities(c).eq(0).all()


def test_delta_depends_on_the_sample_and_unit_alone():
    model, c, _ = fitted()
    assert torch.allclose(model.delta(c)[10:11], model.delta(c[10:11]))
    disturbed = c.clone()
    disturbed[10, 1:] = 0
    assert model.delta(disturbed)[10, 0] == model.delta(c)[10, 0]


def test_one_zero_among_the_features_does_not_switch_alignment_off():
    model, c, _ = fitted((3,))
    c = c[:64].clone()
    c[0, 0, 0] = 0.0
    k = model.responsibilities(c).argmax(-1)
    released = model.lam * (-((c - model.anchors[0, k]) / (c + 1e-6)).abs().mean()).exp()  # one for the whole batch
    assert released < 1e-4 * model.lam < 0.5 * model.lam < model.delta(c).mean()


def test_aligned_samples_are_nearer_to_their_anchor():
    model, c, _ = fitted()
    k = model.responsibilities(c).argmax(-1)
    mu = model.anchors[torch.arange(3), k]
    before, after = (c - mu).norm(dim=-1), (model.align(c) - mu).norm(dim=-1)
    assert torch.allclose(after, (1 - model.delta(c)) * before, atol=1e-5)
    assert after.mean() < 0.95 * before.mean()


def test_the_gradient_of_align_is_that_of_equation_6_with_a_constant_anchor():
    model, c, _ = fitted((3, 5), n=500, lam=20.0)  # large, so that the gradient through delta counts
    c = c[:4].clone().requires_grad_()
    weight = torch.randn(c.shape, generator=generator())
    (model.align(c) * weight).sum().backward()
    step = 1e-3
    for index in [(0, 0, 3), (1, 1, 7), (2, 0, 20), (3, 1, 31)]:
        up, down = c.detach().clone(), c.detach().clone()
        up[index] += step
        down[index] -= step
        numeric = ((model.align(up) - model.align(down)).double() * weight).sum() / (2 * step)
        assert math.isclose(c.grad[index], numeric, rel_tol=2e-2, abs_tol=2e-2)
    assert not any(b.requires_grad for b in model.buffers())


def test_gumbel_draws_anchors_with_their_responsibilities():
    model, c, _ = fitted((2,), k_init=2, split_odds=0.0, noise=0.02)
    # A sample between the two anchors, moved to where neither is certain.
    a, b = model.anchors[0][model.mask[0]]
    line = a + torch.linspace(0, 1, 20_001)[:, None] * (b - a)  # (20001, D)
    r = model.responsibilities(line[:, None])[:, 0]
    i = (r.amax(-1) - 0.7).abs().argmin()
    many = line[i].expand(4000, 1, -1)
    aligned = model.align(many, gumbel=generator())
    share = ((aligned[:, 0] - many[:, 0]) @ (b - a) > 0).float().mean()
    assert abs(share - model.responsibilities(many)[0, 0, 1]) < 0.04
    assert model.align(many).unique(dim=0).shape[0] == 1  # without noise, the same each time


def test_alignment_compiles_into_one_graph_so_it_waits_for_no_value_from_the_device():
    model, c, _ = fitted((3, 5), n=300)
    # A .item(), a nonzero or an if on a tensor would break the graph, and then fullgraph raises.
    compiled = torch.compile(model.align, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(c), model.align(c))


# ---- plugged into another model (section 4.3) ----


class Autoencoder(nn.Module):
    """An autoencoder of 16-pixel images with one latent unit: a scalar, its MLP, DyGA unchanged, a decoder."""

    def __init__(self, lam):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
        self.expand = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 8))
        self.dyga = DyGA(1, 8, k_init=1, accept="bic", lam=lam)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))

    def units(self, images):
        return self.expand(self.encoder(images))[:, None]  # (B, 1, 8)


def train_autoencoder(lam):
    """Train on a soft bar at one of 5 heights, each up to 30% of a step off. Returns what the decoder sees: the mean
    margin of its units, 1 on an anchor, 0 half-way between two; purity of the anchors; mean squared error."""
    seed = generator()
    height = torch.randint(5, (2_000,), generator=seed)
    place = (height + 0.5 + 0.6 * (torch.rand(2_000, generator=seed) - 0.5)) / 2.5 - 1
    images = torch.exp(-((torch.linspace(-1, 1, 16) - place[:, None]) / 0.15) ** 2)  # (2000, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(lam)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, 401):
        batch = images[torch.randint(2_000, (128,), generator=seed)]
        loss = (model.decoder(model.dyga.align(model.units(batch))[:, 0]) - batch).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 100 == 0:
            model.dyga.fit(model.units(images).detach())
    c = model.dyga.align(model.units(images)).detach()
    owner = model.dyga.responsibilities(c).argmax(-1)[:, 0]
    near = torch.cdist(c[:, 0], model.dyga.anchors[0][model.dyga.mask[0]]).sort(1).values  # (2000, K)
    count = torch.zeros(model.dyga.k_max, 5).index_put_((owner, height), torch.ones(2_000), accumulate=True)
    return (1 - near[:, 0] / near[:, 1]).mean(), count.amax(1).sum() / 2_000, loss.item()


def test_plugged_into_an_autoencoder_its_decoder_sees_units_that_stand_clearer_apart():
    # lambda 0.01, not 0: it fits anchors all the same, and hardly moves a unit.
    (without, _, _), (with_dyga, purity, error) = train_autoencoder(0.01), train_autoencoder(0.9)
    # Purity cannot tell the two apart: in this toy it is 0.99 and more either way, and in noisier ones the difference
    # was smaller than that between two seeds.
    assert with_dyga > without + 0.05
    assert purity > 0.95 and error < 0.01


# ---- checkpoint, command line ----


def test_anchors_travel_in_the_state_dict():
    model, c, _ = fitted()
    fresh = DyGA(3)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh.align(c), model.align(c))
    assert {"anchors", "mask", "centre", "scale"} <= set(model.state_dict()) and not list(model.parameters())


def test_running_the_file_prints_the_anchors_and_draws_the_picture(tmp_path):
    script = Path(dyga.__file__)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line.split()[-2:] for line in done.stdout.splitlines()}
    assert rows["constant"] == ["1", "1"] and rows["5 levels"][1] == "5"
    assert (tmp_path / "out" / "dyga.png").stat().st_size > 5_000


if __name__ == "__main__":  # the table over all seeds: PYTHONPATH=. python tests/test_dyga.py
    for accept, k_init in (("always", 8), ("bic", 1)):
        rows = [(seed, *row) for seed in range(5) for row in table(accept, k_init, seed)]
        pure = sum(p >= 0.99 for _, _, _, p, _ in rows)
        exact = sum(k == found and rand > 0.95 for _, k, found, _, rand in rows)
        print(f"{accept}, k_init {k_init}: pure {pure} of {len(rows)}, K anchors and ARI > 0.95 {exact} of {len(rows)}")
        for k in range(1, 13):
            part = [row for row in rows if row[1] == k]
            print(f"  {k:2} levels: anchors {sum(r[2] for r in part) / len(part):5.1f}, worst purity "
                  f"{min(r[3] for r in part):.3f}, worst ARI {min(r[4] for r in part):.3f}")
