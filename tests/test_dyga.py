"""Facts about DyGA: HDDC against closed forms, scikit-learn and SciPy; splits; alignment (6)."""
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.decomposition import FastICA
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.mixture import GaussianMixture
from torch._subclasses.fake_tensor import FakeTensorMode

import dyga
from dyga import DyGA, cost, e_step, em, informative_units, m_step, scree, toy_units, unmixing

CONTINUOUS = 10**6  # so many levels

def delta_of(model, c):
    return model.align(c, return_delta=True)[1]  # (B, N)

def generator(seed=0):
    return torch.Generator().manual_seed(seed)

def overlapping(n=1500, D=6, K=4, seed=0):
    """Float64 data (n, D) of K overlapping Gaussians, and random hard responsibilities (K, n)."""
    g = generator(seed)
    centres = torch.randn(K, D, generator=g, dtype=torch.float64)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    x = x + 1.5 * centres[torch.randint(0, K, (n,), generator=g)]
    return x, torch.eye(K, dtype=torch.float64)[torch.randint(0, K, (n,), generator=g)].T

def covariance(m):
    """(K, D, D): with a_kj = b_k beyond the main directions, q and a are all of it."""
    return m.q @ torch.diag_embed(m.a) @ m.q.mT

def fitted(levels=(3, 5, CONTINUOUS), n=2000, seed=0, **options):
    c, _ = toy_units(list(levels), n, generator(seed))
    return DyGA(len(levels), **options).fit(c), c

def test_em_with_all_directions_but_one_is_scikit_learns_and_drops_empty_components(monkeypatch):
    monkeypatch.setattr(dyga, "FLOOR", 0.0)
    x, r = overlapping()
    m = m_step(x, torch.cat([0 * r[:2], r]), 5, 5)
    found, history = em(x, m, 7, -math.inf, 5)
    peer = GaussianMixture(4, tol=0, reg_covar=0, max_iter=7, weights_init=m.log_pi.exp().numpy(),
                           means_init=m.mu.numpy(), precisions_init=covariance(m).inverse().numpy())
    with pytest.warns(Warning):  # it warns that it has not converged
        peer.fit(x.numpy())
    assert peer.n_iter_ == len(history) == 7
    r, likelihood = e_step(x, found)
    ours = found.mu, r.T, covariance(found), found.log_pi.exp()
    theirs = peer.means_, peer.predict_proba(x.numpy()), peer.covariances_, peer.weights_
    assert all(np.abs(a.numpy() - b).max() < 1e-6 for a, b in zip(ours, theirs))
    assert math.isclose(likelihood / len(x), peer.score(x.numpy()), rel_tol=1e-9)

def test_the_cost_is_the_gaussian_density_with_the_tied_covariance():
    x, r = overlapping(D=9)
    m = m_step(x, r, torch.tensor([1, 2, 5, 8]), 1)
    units = dyga.Mixture(*(torch.stack([t, t.flip(0)]) for t in m))  # two units at once
    together = cost(torch.stack([x, x]), units, 8)
    for k, d in enumerate((1, 2, 5, 8)):
        values = np.linalg.eigvalsh(np.cov(x[r[k] == 1].numpy().T, bias=True))[::-1]
        assert np.allclose(m.a[k], [*values[:d], *[values[d:].mean()] * (9 - d)])
        density = multivariate_normal(m.mu[k].numpy(), covariance(m)[k].numpy()).logpdf(x.numpy())
        assert np.allclose(cost(x, m, 8)[k], -2 * (density + m.log_pi[k].item()), rtol=1e-8)
        assert torch.allclose(together[1, 3 - k], cost(x, m, 8)[k])

def test_scree_stops_after_the_last_drop_above_a_fifth_of_the_largest():
    spectra = torch.tensor([[10.0, 1, 0.9, 0.8], [10, 9, 8, 0], [10, 10, 10, 10], [10, 4, 3, 2.9]])
    assert scree(spectra).tolist() == [1, 3, 1, 1]

# In float32 a cost is a difference of numbers of size D / FLOOR, 8,000, rounded to 1e-3.
@pytest.mark.parametrize("seed, dtype, rounding", [
    *((seed, torch.float64, 1e-13) for seed in range(3)), (0, torch.float32, 1e-3)])
def test_the_likelihood_never_falls_although_d_is_chosen_anew_and_em_ends_as_it_rises_by_tol(
        seed, dtype, rounding):
    x, r = (t.to(dtype) for t in overlapping(D=8, seed=seed))
    m = m_step(x, r, 1, 5)
    found, history = em(x, m, 40, -math.inf, 5)
    assert (np.diff(history) >= -rounding * len(x)).all() and len(history) == 40
    assert (found.d >= m.d).all() and found.mu.dtype == dtype
    _, history = em(x, m, 200, 1e-3, 5)
    rises = np.diff(history) / len(x)
    assert len(history) < 200 and rises[-1] <= 1e-3 < rises[:-1].min()

def test_units_do_not_influence_each_other_and_anchors_shift_and_scale_with_them():
    model, c = fitted((3, 5), n=800)
    for other in (0 * c[:, 0], c[:1, 0].expand(800, -1), c[:, 0] ** 2):
        disturbed = DyGA(2).fit(torch.stack([other, c[:, 1]], 1))
        assert torch.equal(disturbed.anchors[1], model.anchors[1])
    model, moved = DyGA(2).fit(c.double()), DyGA(2).fit(8 * c.double() - 3)
    assert torch.equal(model.mask, moved.mask)
    assert torch.allclose(8 * model.anchors[model.mask] - 3, moved.anchors[moved.mask], atol=1e-3)

@pytest.mark.parametrize("accept, k_init, n", [("always", 8, 2500), ("bic", 1, 5000)])
def test_the_papers_rule_finds_pure_anchors_and_bic_finds_the_number_of_levels(accept, k_init, n):
    levels = [1 + i % 12 for i in range(20)]
    c, level = toy_units(levels, n, generator())
    c[5, 2] = 1e6  # an outlier does not hide them
    model = DyGA(20, k_init=k_init, accept=accept).fit(c)
    pairs = list(zip(model.nearest(c)[1].T, level.T))  # of each unit: samples' anchors, levels
    pure = [contingency_matrix(*pair).max(1).sum() >= 0.99 * n for pair in pairs]
    exact = [K == right and adjusted_rand_score(*pair) > 0.95
             for K, right, pair in zip(model.mask.sum(1), levels, pairs)]
    assert sum(pure) >= 19 and (accept == "always" or (sum(exact) >= 18 and exact[2]))

@pytest.mark.parametrize("options, anchors", [
    (dict(spread=100.0, split_odds=0.0), [1, 1]),  # nothing is wide
    (dict(split_odds=0.0), [2, 6]),  # wide clusters are split, narrow ones are not
    (dict(spread=100.0, split_odds=1.0), [2, 2]),  # each cluster of the first run once, by chance
    (dict(spread=0.0, k_max=5), [5, 5])])  # no more than k_max
def test_clusters_are_split_if_they_are_wide_and_once_at_random(options, anchors):
    model, _ = fitted((2, 6), seed=3, k_init=1, **options)
    assert model.mask.sum(1).tolist() == anchors
    steps = [(unit["hddc"], unit["split"]) for unit in model.report["anchors"]]
    assert steps == [(1, K) for K in anchors]
    assert torch.allclose((model.log_pi.exp() * model.mask).sum(1), torch.ones(2))

def test_a_cluster_has_responsibility_above_a_half_and_spread_is_the_mean_distance_to_its_mean():
    x, r = overlapping(n=400)
    m = m_step(x, r, 1, 5)
    r, _ = e_step(x, m)
    assert (r.amax(0) < 0.5).any()  # some samples belong to nobody
    for r, part, spread in zip(r, *dyga.clusters(x, m)):
        assert torch.equal(part, x[r > 0.5])
        assert math.isclose(spread, (part - part.mean(0)).norm(dim=1).mean())

def test_small_clusters_are_dropped_and_the_rest_refitted():
    c, _ = toy_units([3], 2000, generator(), noise=0.02)
    c[:6] += 40.0  # six samples far away, and of one kind
    model = DyGA(1, k_init=6).fit(c)
    (steps,), ((first, last),) = model.report["anchors"], model.report["log_likelihood"]
    assert list(steps) == ["hddc", "split", "filter", "refit"]
    assert len(first) <= 30 and last[0] <= last[-1]
    assert steps["filter"] < steps["split"] and steps["refit"] == model.mask.sum()
    anchors, size = model.anchors[0][model.mask[0]], model.nearest(c)[1][:, 0].bincount()
    assert (anchors - c[0, 0]).norm(dim=1).min() > 20 and size.min() >= 10

UNITS, _ = toy_units([3, CONTINUOUS], 400, generator(), dim=8)
SPOILT = UNITS.clone()
SPOILT[7, 1, 2] = 1e6
HARD = {"constant unit": torch.stack([UNITS[:, 0], torch.full((400, 8), 3.7)], 1),
        "duplicated samples": UNITS[:5].repeat(80, 1, 1), "an outlier of 1e6": SPOILT,
        "two samples": UNITS[:2], "one sample": UNITS[:1],
        "all samples equal": UNITS[:1].expand(400, -1, -1), "all zero": torch.zeros(400, 2, 8),
        "tiny numbers": UNITS * 1e-12, "huge numbers": UNITS * 1e12, "far mean": UNITS + 1e4,
        "float16": UNITS.half(), "bfloat16": UNITS.bfloat16(), "float64": UNITS.double(),
        "one varying number": torch.cat([UNITS[..., :1], torch.zeros(400, 2, 7)], -1)}

@pytest.mark.parametrize("options", [dict(), dict(k_init=1, accept="bic")], ids=["always", "bic"])
@pytest.mark.parametrize("c", HARD.values(), ids=HARD)
def test_hard_input_gives_finite_anchors_and_of_a_constant_unit_itself(c, options):
    model = DyGA(2, dim=8, **options).fit(c)
    assert all(b.isfinite().all() for b in model.buffers())
    c_tilde, delta = model.align(c, return_delta=True)
    assert c_tilde.isfinite().all() and c_tilde.dtype == c.dtype
    assert (delta >= 0).all() and (delta <= model.lam).all()
    assert torch.allclose(model.responsibilities(c).sum(-1), torch.ones(c.shape[:2]), atol=1e-5)
    assert 1 <= model.mask.sum(1).min() and model.mask.sum(1).max() <= max(1, len(c))
    for i in (c == c[:1]).all(0).all(-1).nonzero()[:, 0]:  # constant units
        assert model.mask[i].sum() == 1 and torch.equal(c_tilde[:, i], c[:, i])
        assert torch.allclose(model.anchors[i, 0], c[0, i].float())

def test_nan_inf_and_wrong_shapes_raise_an_error_and_until_a_first_fit_align_is_the_identity():
    c, model = torch.ones(50, 3, 32), DyGA(3)
    for wrong in (c[:, :2], c[..., :5], c[0], c[:0], c.long()):
        with pytest.raises(ValueError, match=r"expected floats of shape \(n >= 1, 3, 32\)"):
            model.fit(wrong)
    assert torch.equal(model.align(c), c) and delta_of(model, c).eq(0).all()
    assert model.responsibilities(c).eq(0).all() and model.nearest(c)[0].eq(0).all()
    for bad in (math.nan, math.inf):
        c[3, 1, 4] = bad
        with pytest.raises(ValueError, match="hold NaN or Inf"):
            model.fit(c)
    with pytest.raises(ValueError, match="expected always or bic"):
        DyGA(3, accept="aic")

def test_a_fit_follows_its_generator_alone_moves_no_global_one_and_align_ignores_autocast():
    state = torch.get_rng_state()
    a, other = (DyGA(2, dim=8).fit(UNITS, generator(s)) for s in (1, 2))
    again = DyGA(2, dim=8).fit(UNITS, generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        c_tilde = again.align(UNITS)
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(a.anchors, other.anchors)
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), again.buffers(), strict=True))
    assert torch.equal(c_tilde, a.align(UNITS)) and not list(a.parameters())

def test_align_is_equation_6_with_the_anchor_of_highest_responsibility_and_bears_a_zero():
    model, c = fitted(lam=0.3)
    number, unit = model.responsibilities(c).argmax(-1), torch.arange(3)
    anchor = model.anchors[unit, number]
    assert all(map(torch.equal, model.nearest(c), (anchor, number)))
    assert model.mask[unit, number].all()
    c_tilde, delta = model.align(c, return_delta=True)
    s = torch.maximum(c.abs(), 0.1 * model.scale[:, None])
    assert torch.allclose(delta, 0.3 * torch.exp(-((c - anchor).abs() / s).mean(-1)), rtol=1e-5)
    assert torch.allclose(c_tilde, c + delta[..., None] * (anchor - c), atol=1e-6)
    assert torch.allclose(delta_of(model, c[10:11]), delta[10:11])  # whatever else is in the batch
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no numbers to tell: it would refuse a
        model.align(c)  # .item(), a nonzero or an if on a tensor, for which a GPU would wait
    zero = c[:64].clone()
    zero[0, 0, model.anchors[0, 0].argmax()] = 0
    ratio = ((zero - model.nearest(zero)[0]) / (zero + 1e-6))[:, 0]
    released = 0.3 * (-ratio.abs().mean()).exp()  # one for the whole batch: switched off
    assert released < 3e-5 and delta_of(model, zero)[:, 0].mean() > 0.15
    model.lam = 0.0
    assert torch.equal(model.align(c), c)

def test_the_gradient_of_align_is_the_formula_of_its_docstring():
    model, c = fitted((3, 5), n=500, lam=20.0)  # large, so that the gradient through delta counts
    for x in c[:4].split(1):
        jacobian = torch.autograd.functional.jacobian(lambda x: model.align(x)[0], x)[:, :, 0]
        deltas = delta_of(model, x)[0]  # (N,)
        for i, (x_i, mu, delta) in enumerate(zip(x[0], model.nearest(x)[0][0], deltas)):
            away, size, floor = x_i - mu, x_i.abs(), 0.1 * model.scale[i]
            s, slope = size.clamp(min=floor), x_i.sign() * (size > floor)
            ddelta = -delta / 32 * (away.sign() / s - away.abs() * slope / s**2)
            formula = (1 - delta) * torch.eye(32) - away[:, None] * ddelta
            assert torch.allclose(jacobian[i, :, i], formula, atol=1e-4)
        assert (jacobian[0, :, 1] == 0).all()  # no unit has an influence on another
    assert not any(buffer.requires_grad for buffer in model.buffers())

def test_running_the_file_prints_how_many_anchors_units_got(monkeypatch, capsys):
    monkeypatch.setattr(dyga, "toy_units", lambda levels, n, *more, **how: toy_units(
        levels, 1_000, *more, **how))  # in place of 4,000, for time
    dyga.main()
    lines = capsys.readouterr().out.splitlines()
    levels, paper, bic = (json.loads(line[line.index("["):line.index("]") + 1]) for line in lines)
    assert paper[0] == bic[0] == 1 and bic[levels.index(5)] == 5

def test_of_two_readings_of_one_hue_one_is_kept_and_a_constant_unit_never_is():
    torch.manual_seed(0)
    hue, size = torch.rand(4_000), torch.rand(4_000)
    # A hue is a circle: these two are cut open at different colours, and correlate by -0.26 only.
    s = torch.stack([4 * hue, torch.zeros(4_000), 3 * ((hue + 0.3) % 1), 2 * size], 1)  # (n, N)
    assert informative_units(s, least=0.5) == [0, 3]

def test_a_unit_is_redundant_if_it_adds_little_for_what_was_known_of_it():
    # Two uniform numbers; with odds p = 0.6 the second repeats the first. It adds (1 - p^2) / 2 =
    # 0.32 of the variance of both. The first explains p^2 = 0.36 of its step functions. Contrast
    # of a uniform number: (1.09449 - 1.06772)^(1/4) = 0.404. And 0.32 * 0.404 / 0.36 is 0.36.
    g = generator()
    s = torch.rand(20_000, 2, generator=g)
    s[:, 1] = torch.where(torch.rand(20_000, generator=g) < 0.6, s[:, 0], s[:, 1])
    assert informative_units(s, least=0.33, most=1e9) == [0, 1]
    assert len(informative_units(s, least=0.39, most=1e9)) == 1

def test_the_sine_of_a_hue_is_redundant_beside_its_cosine_though_none_predicts_the_other():
    # Each times the area that has the hue. E[sine | cosine] = 0, but the sine's size is known.
    hue, area, other = torch.rand(3, 4_000, generator=torch.Generator().manual_seed(0))
    s = torch.stack([2 * (2 * math.pi * hue).cos(), (2 * math.pi * hue).sin(), other], 1)
    s[:, :2] *= 1 + area[:, None]
    assert informative_units(s, least=0.5) == [0, 2]
    assert informative_units(s, least=0.5, most=1) == [0, 1, 2]

def test_of_two_factors_and_their_sum_the_factors_are_kept_though_the_sum_explains_most():
    s = torch.rand(4_000, 3, generator=torch.Generator().manual_seed(0))
    s[:, 2] = 0.4 * (s[:, 0] + s[:, 1])  # more Gaussian than either, so it comes last
    assert informative_units(s, least=0.35) == [0, 1]

def test_unmixing_parts_two_factors_at_an_angle_as_scikit_learn_does_and_leaves_the_rest():
    factors = torch.rand(4_000, 3, generator=torch.Generator().manual_seed(0))
    mix = torch.tensor([[1.0, 0.4, 0.0], [-0.7, 1.2, 0.0], [0.0, 0.1, 5.0]])  # a row a unit
    s = factors @ mix.T + 7  # (n, U)
    turn = unmixing(s)
    y = 7 + (s - s.mean(0)) @ turn.T
    tells = torch.cat([y.T, factors.T]).corrcoef()[:3, 3:]  # (units, factors)
    assert (tells.diagonal() > 0.999).all()
    assert torch.allclose(y.std(0), s.std(0), rtol=1e-3)
    assert turn[2].tolist() == [0, 0, 1]  # it was nearly unmixed, so nothing is done to it
    ica = FastICA(whiten="unit-variance", random_state=0).fit(s)
    theirs = torch.cat([y.T, torch.from_numpy(ica.transform(s)).float().T]).corrcoef()[:3, 3:]
    assert torch.allclose(theirs.abs().amax(1), torch.ones(3), atol=2e-3)
