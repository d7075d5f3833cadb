"""evaluate.py: each metric against the value that its definition gives by hand, and the command."""

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import fid
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score

import data
import dyga
import evaluate
import train

SIZES = [3, 4, 5]
GRID = np.stack(np.unravel_index(np.arange(60), SIZES), 1)  # (60, 3) the factors of every index
SMALL = {"factor_vae": dict(n_variance=500, n_train=400, n_test=200),
         "dci": dict(n_train=150, n_test=100, jobs=1), "mig": dict(n_train=2000),
         "modularity": dict(n_train=2000), "sap": dict(n_train=500, n_test=300),
         "infomec": dict(n_train=1000)}
all_grid_metrics = pytest.mark.parametrize("metric", SMALL)


def score(metric, codes, sizes=SIZES, **settings):
    function = getattr(evaluate, metric)
    return function(lambda idx: codes[idx], sizes, **(SMALL[metric] | settings))


def perfect(*units):
    """One unit per factor, a different number for each value; `units` reorders or picks them."""
    return GRID[:, list(units) or [0, 1, 2]].astype(np.float32)


def mixed():
    """Units 0 and 1 are factors 1 and 2 turned by 45 degrees. Unit 2 is factor 0."""
    a, b = GRID[:, 1] / 3, GRID[:, 2] / 4
    return np.stack([a + b, a - b, GRID[:, 0]], 1).astype(np.float32)


def noise(seed=0, units=3):
    """Codes that depend on the image but on no factor."""
    return np.random.default_rng(seed).normal(size=(60, units)).astype(np.float32)


approx = lambda value, within=1e-6: pytest.approx(value, abs=within)  # noqa: E731


@pytest.mark.parametrize("codes", [perfect() * 0.01, np.ones((60, 4))])
def test_without_an_active_unit_factor_vae_is_zero_and_modularity_of_active_units_undefined(codes):
    with pytest.warns(UserWarning, match="no active unit"):
        assert score("factor_vae", codes) == 0
    with pytest.warns(UserWarning, match="undefined"):
        assert np.isnan(score("modularity", codes, active_only=True))


def test_factor_vae_counts_one_vote_at_a_time_as_the_definition_does():
    codes, rng = noise(1, 4).astype(float), np.random.default_rng(3)
    overall = codes[np.ravel_multi_index(rng.integers(0, SIZES, (500, 3)).T, SIZES)].var(0, ddof=1)

    def votes(n):
        table, fixed = np.zeros((4, 3), int), rng.integers(3, size=n)
        for k, factors in zip(fixed, rng.integers(0, SIZES, size=(n, 16, 3))):
            factors[:, k] = factors[0, k]
            local = codes[np.ravel_multi_index(factors.T, SIZES)].var(0, ddof=1)
            table[np.argmin(local / overall), k] += 1
        return table

    names, test = votes(400).argmax(1), votes(200)
    by_hand = test[np.arange(4), names].sum() / 200
    assert score("factor_vae", noise(1, 4), seed=3, batch=16) == by_hand


# A factor spread over 2 of U units would have completeness 1 - log 2 / log U; with one unit for
# each, dead units leave 1. Two factors in one unit: its row of R is (1, 1), entropy 1 in base 2.
@pytest.mark.parametrize("codes, sizes, expected, within", [
    (perfect(), SIZES, (1, 1, 1), 1e-6), (perfect(1, 2, 0) * [7, -1, 0.01], SIZES, (1, 1, 1), 1e-6),
    (np.hstack([perfect(), np.zeros((60, 5))]), SIZES, (1, 1, 1), 1e-6),
    (np.stack([np.arange(16.0), np.zeros(16)], 1), [4, 4], (0, 1, 1), 1e-6),
    (np.zeros((60, 3)), SIZES, (0, 0, np.mean([1 / 3, 1 / 4, 1 / 5])), 0.08)])  # it guesses
def test_dci_by_hand(codes, sizes, expected, within):
    assert tuple(score("dci", codes, sizes).values()) == approx(expected, within)


def test_dci_punishes_a_turned_code_by_as_much_in_one_process_as_in_two():
    assert score("dci", mixed(), jobs=1) == score("dci", mixed(), jobs=2)
    assert score("dci", mixed())["disentanglement"] < 0.8


def test_sample_efficiency_of_perfect_codes_is_one():
    result = evaluate.gbt_efficiency(lambda idx: idx[:, None], [3], n_test=200, jobs=1)
    assert result == dict(acc=1, acc_1000_ratio=1, acc_100_ratio=1)


def test_mutual_information_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    codes, factors = rng.normal(size=(500, 2)), rng.integers(0, 6, size=(500, 2))
    mi, h = evaluate.mutual_information(codes + factors, factors)
    for u, k in np.ndindex(2, 2):
        unit = (codes + factors)[:, u]
        labels = np.digitize(unit, np.histogram(unit, 20)[1][:-1])
        assert mi[u, k] == approx(mutual_info_score(labels, factors[:, k]))
    assert h[0] == approx(mutual_info_score(factors[:, 0], factors[:, 0]))


# FactorVAE of one unit is the chance of its factor. Of unrelated pairs MIG's plug-in estimate is
# (sizes - 1)(sizes - 1) / 2n, not 0. 16 numbers for 16 pairs: log 4 with both factors.
@pytest.mark.parametrize("metric, codes, sizes, expected, within", [
    ("factor_vae", perfect(2, 0, 1, 1, 2) * [100, -3, 0.5, 1, 1], SIZES, 1, 0),
    ("factor_vae", np.hstack([np.ones((60, 2)), perfect()]), SIZES, 1, 0),
    ("factor_vae", perfect(0), SIZES, 1 / 3, 0.1),
    ("mig", perfect(2, 1, 0) * [9, -2, 0.001], SIZES, 1, 0.01), ("mig", mixed(), SIZES, 0.37, 0.1),
    ("mig", perfect(0, 1, 2, 0, 1, 2), SIZES, 0, 0), ("mig", np.ones((60, 3)), SIZES, 0, 0),
    ("modularity", perfect(0, 0, 1, 1, 2), SIZES, 1, 1e-3),
    ("modularity", np.ones((60, 3)), SIZES, 0, 0),
    ("modularity", np.hstack([perfect(), np.ones((60, 1))]), SIZES, 3 / 4, 1e-3),
    ("modularity", np.arange(16.0)[:, None], [4, 4], 0, 0.02),
    ("sap", perfect(0, 1, 2, 0, 1, 2), SIZES, 0, 0),
    ("sap", np.array([[-1.0, 0], [1, 0]]), [2], 0.5, 0.1)])
def test_factor_vae_mig_modularity_and_sap_by_hand(metric, codes, sizes, expected, within):
    assert score(metric, codes, sizes) == approx(expected, within)


def test_modularity_of_active_units_leaves_out_silent_ones():
    codes = np.hstack([perfect(), 0.01 * noise()])
    assert score("modularity", codes) < 0.9
    assert score("modularity", codes, active_only=True) == approx(1, 1e-3)


def test_infomec_of_codes_that_are_linear_in_the_labels_and_of_noise():
    result = score("infomec", perfect())  # estimates of unrelated pairs are near 0 but not 0
    assert (result["infom"], result["infoc"]) == approx((1, 1), 0.1)
    corners = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    assert score("infomec", corners, [2, 2])["infoe"] > 0.99
    rng = np.random.default_rng(0)
    noisy = evaluate.infomec(lambda idx: rng.normal(size=(len(idx), 3)), SIZES, n_train=2000)
    assert noisy["infoe"] == approx(0, 0.01)


@pytest.mark.parametrize("codes, words, infom", [
    (np.hstack([perfect(0), np.zeros((60, 2))]), "InfoC: undefined for 1 active unit", 1),
    (np.ones((60, 3)), "InfoM: 0 active units", 0)])
def test_infoc_of_fewer_than_two_active_units_is_nan_with_a_reason(codes, words, infom):
    with pytest.warns(UserWarning, match=words):
        result = score("infomec", codes)
    assert np.isnan(result["infoc"]) and result["infom"] == approx(infom, 0.1)


@all_grid_metrics
def test_nan_codes_are_refused_and_the_unit_is_named(metric):
    with pytest.raises(ValueError, match="unit 1 hold NaN"):
        score(metric, perfect() + [0, np.nan, 0])


@all_grid_metrics
def test_a_factor_with_one_value_is_left_out_and_torch_codes_are_taken_too(metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = score(metric, perfect(), SIZES)
        assert score(metric, perfect(), [3, 1, 4, 5, 1]) == expected
    assert score(metric, torch.from_numpy(perfect())) == expected


@all_grid_metrics
def test_the_seed_decides_and_more_units_than_samples_give_finite_scores(metric):
    before = np.random.get_state()[1].copy()
    few = {name: 20 for name in SMALL[metric] if name.startswith("n_")}
    first, again = (score(metric, noise(units=60), seed=5, **few) for _ in range(2))
    assert first == again and (np.random.get_state()[1] == before).all()  # the global one
    assert np.isfinite(list(first.values()) if isinstance(first, dict) else first).all()


@all_grid_metrics
def test_perfect_codes_score_higher_than_noise(metric):
    good, bad = (np.ravel(list(result.values()) if isinstance(result, dict) else result)[0]
                 for result in (score(metric, perfect()), score(metric, noise())))
    assert good > bad + 0.2


@pytest.mark.parametrize("codes, sizes, words", [
    (np.zeros(60), SIZES, "expected .*, U"), (perfect(0), SIZES, "at least 2"),
    (perfect(), [1, 1], "at least 1 factors")])
def test_codes_of_another_shape_are_refused(codes, sizes, words):
    with pytest.raises(ValueError, match=words):
        score("mig", codes, sizes)


LABELS = np.repeat(GRID, 3, 0)[np.random.default_rng(0).permutation(180)][:90]  # no grid


@pytest.mark.parametrize("metric, counts", [
    ("dci", dict(n_test=30, jobs=1)), ("infomec", {}), ("gbt_efficiency", dict(n_test=30, jobs=1))])
def test_labels_of_images_that_form_no_grid_score_perfect_codes_higher(metric, counts):
    good, bad = (list(getattr(evaluate, metric)(lambda idx: x[idx], LABELS, n_train=60, **counts)
                      .values())[0] for x in (LABELS.astype(float), noise().repeat(2, 0)))
    assert good == approx(1, 0.06) and good > bad + 0.2


def test_of_labels_no_image_is_drawn_twice_and_fewer_images_are_shared_in_proportion():
    x, y, x_test, y_test = evaluate.Sampler(lambda idx: idx[:, None], LABELS, 0).split(600, 300)
    assert len(x_test) == 30 and sorted([*x[:, 0], *x_test[:, 0]]) == list(range(90))
    assert (y_test == LABELS[x_test[:, 0].astype(int)]).all()
    with pytest.raises(ValueError, match="needs the sizes of a grid"):
        score("factor_vae", LABELS.astype(float), LABELS)
    rare = LABELS * [1, 1, 0] + np.eye(90, dtype=int)[:, 7:8] * [0, 0, 1]  # none to learn from
    assert 0 < score("dci", LABELS.astype(float), rare, n_train=5)["informativeness"] < 1


TINY = data.Dataset("tiny", "", "", lambda idx: picture(torch.stack(torch.unravel_index(
    idx, (2, 3, 4)), 1)), dict(images=24, factors=dict(a=2, b=3, c=4)), "cpu")
RNG = np.random.default_rng(0)
picture = lambda x: (60 * x).byte()[:, :, None, None].expand(-1, -1, 8, 8)  # noqa: E731
bits = lambda x: torch.stack([x[:, 0], x[:, 1], x[:, 2] // 2, x[:, 2] % 2], 1)  # noqa: E731
of_bits = lambda c: torch.stack([c[:, 0], c[:, 1], 2 * c[:, 2] + c[:, 3]], 1)  # noqa: E731
any_image = lambda c: TINY.factors(torch.from_numpy(RNG.integers(24, size=len(c))))  # noqa: E731
PERFECT, ONE_BIT, CHANCE = [1, 1, 1, 0], [1 / 3, 1, 1 / 3], [1 / 2, 2 / 24, 1 / 24, 1 / 2]


# The renderer behind fake models. One bit is all that is missing to one of three other values.
@pytest.mark.parametrize("way, groups, units, decode, a, b, c", [
    (0, [[0], [1], [2, 3]], bits, of_bits, PERFECT, PERFECT, PERFECT),
    (1, [[0], [1], [2, 3]], bits, of_bits, PERFECT, PERFECT, ONE_BIT),
    (2, [[0], [1], [2, 3]], bits, any_image, PERFECT, PERFECT, PERFECT),  # the ceiling
    *((way, [[0], [1], [2, 3]], bits, any_image, CHANCE, [1 / 3, 3 / 24, 1 / 24, 8 / 9],
       [1 / 4, 4 / 24, 1 / 24, 5 / 4]) for way in (0, 1, 3)),
    (0, [[0], [0], [1]], lambda x: torch.stack([x[:, 0] + 2 * x[:, 1], x[:, 2]], 1),
     lambda c: torch.stack([c[:, 0] % 2, c[:, 0] // 2, c[:, 1]], 1),  # one unit knows a and b
     [1, 0, 0, 0], [1, 0, 0, 0], PERFECT)])
def test_control_is_what_a_models_construction_gives(way, groups, units, decode, a, b, c):
    model = SimpleNamespace(
        units=lambda images: units(images[:, :, 0, 0].long() // 60)[:, :, None],
        dyga=SimpleNamespace(align=lambda c: c), vqgan=SimpleNamespace(reconstruct=lambda x: x),
        noise=lambda count, generator: torch.zeros(count, 1, 1, 1),
        sample=lambda c, noise, steps: picture(decode(c[:, :, 0])))
    probe = SimpleNamespace(groups=dict(enumerate(groups)))
    found = evaluate.control(evaluate.Painter(model, TINY, probe, 1, 0, 400), 0)
    for name, expected in dict(a=a, b=b, c=c).items():  # moved, kept, control, off
        numbers = [four[way] for four in found[name].values()][:len(expected)]
        exact = all(value in (0, 1) for value in expected)
        assert numbers == approx(expected, 0 if exact else 0.1)
    assert found["mean"]["moved"][way] == approx(np.mean(
        [found[name]["moved"][way] for name in "abc"]))


A = np.random.default_rng(0).integers(0, 2, size=(4000, 3))  # attributes
CONTINUOUS = A + np.random.default_rng(1).uniform(0, 0.5, size=A.shape)
CONSTANT, TWINS = A * [1, 0, 1], A[:, [0, 0, 2]]  # nobody has one; one gives another away


# Two values a unit: above the least threshold TPR = 1, FPR = 0, an AUROC of 1; other units guess.
# "Below" never includes the largest value: a falling unit of two values is missed, by the rule.
@pytest.mark.parametrize("codes, attributes, tad, captured", [
    (A, A, 1.5, 3), (np.tile(A, 2), A, 0, 3), (noise(units=5).repeat(67, 0)[:4000], A, 0, 0),
    (A * 0.2, A, 0, 0), (-A, A, 0, 0), (CONTINUOUS, A, 1.25, 3), (-CONTINUOUS, A, 1.25, 3),
    (A, CONSTANT, 1, 2), (TWINS, TWINS, 0.5, 1)])
def test_tad_by_hand(codes, attributes, tad, captured):
    result = evaluate.tad(codes.astype(float), attributes)
    assert (result["tad"], result["captured"]) == (approx(tad, 0.15), captured)


def test_the_stepped_auroc_by_hand():
    # Thresholds 0, 0.5, 1. z >= t gives (FPR, TPR) = (1, 1), (1/2, 1), (1/2, 1/2); sorted FPR 1/2,
    # 1/2, 1 and TPR 1/2, 1, 1: area 1 * 0 + 1 * 1/2. Reversed, FPR 0, 1/2, 1/2, TPR 0, 0, 1/2: 0.
    assert evaluate.stepped_auroc(np.array([0, 0.5, 1, 1]), np.array([0, 1, 0, 1]), 0.5) == 0.5


def test_tad_refuses_labels_of_minus_one():
    with pytest.raises(ValueError, match="of 0, 1"):
        evaluate.tad(A, 2 * A - 1)


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    A, mu, e = rng.normal(size=(5, 5)), rng.normal(size=5), np.eye(5)
    s1, s2 = np.arange(1.0, 6), np.array([2.0, 2, 2, 0, 2])
    for mu2, cov1, cov2, expected in (
            (mu, A @ A.T, A @ A.T, 0), (mu + 2, A @ A.T, A @ A.T, 5 * 4),  # the means' distance
            (mu, np.diag(s1 ** 2), np.diag(s2 ** 2), ((s1 - s2) ** 2).sum()),  # these commute
            (mu, np.diag(e[0]), np.diag(e[1]), 2)):  # no shared direction: the traces add up
        assert fid.frechet_distance(mu, cov1, mu2, cov2) == approx(expected)


@pytest.mark.parametrize("brighter", [0, 7])
def test_fid_of_images_brighter_by_a_constant_is_the_squared_shift(brighter):
    images = torch.arange(130 * 48).remainder(199).view(130, 3, 4, 4).byte()
    ds = type("Images", (), {"__len__": lambda _: 130, "images": lambda _, idx: images[idx]})()
    model = SimpleNamespace(  # its "units" are the image, and its samples that image, brighter
        units=lambda x: x.float(), dyga=SimpleNamespace(align=lambda c: c),
        noise=lambda count, generator: None, sample=lambda c, noise, steps: (c + brighter).byte())

    def colour_means(images, return_features):  # in place of the Inception network
        return images.float().mean([2, 3])

    with pytest.warns(UserWarning, match="2,048"):
        assert fid.fid(model, ds, colour_means, 130, 1) == approx(3 * brighter ** 2)


def test_the_pca_of_all_units_at_once_agrees_with_scikit_learn():
    c = torch.randn(200, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9)
    scalars = evaluate.project(c, evaluate.fit_pca(c)).numpy()
    for u in range(3):
        expected = PCA(1).fit_transform(c[:, u].numpy())[:, 0]
        assert np.allclose(np.abs(scalars[:, u]), np.abs(expected), atol=1e-4)  # the sign is free


def test_every_image_is_encoded_once():
    seen = []

    def units(idx):
        seen.extend(idx.tolist())
        return idx[:, None, None].float()  # (B, 1, 1)

    encode = evaluate.cached(units, (torch.zeros(1, 1), torch.ones(1, 1)), 50)
    for idx in ([3, 1, 3], [1, 4], [3]):
        assert encode(np.array(idx))[:, 0].tolist() == idx
    assert sorted(seen) == [1, 3, 4]


def test_anchors_of_groups_far_apart_are_pure_and_alignment_raises_their_margin():
    labels = np.arange(400)[:, None] % 2
    c = torch.randn(400, 1, 4, generator=torch.Generator().manual_seed(0))
    c = 3 + 4 * torch.from_numpy(labels)[..., None] + 0.3 * c  # (400, 1, 4): two groups
    anchors, active = dyga.DyGA(1, dim=4, k_init=2, k_max=2, lam=0.5).fit(c), np.array([True])
    before, after = (evaluate.separation(anchors, x, labels, active) for x in (c, anchors.align(c)))
    assert (before["purity"], after["purity"], before["chance"]) == (1, 1, 0.5)
    assert after["margin"] > before["margin"] > 0.8
    unrelated = evaluate.separation(anchors, c, np.arange(400)[:, None] // 200, active)
    assert unrelated["purity"] == approx(0.5, 0.01)  # chance


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the tiny preset with random weights, and anchors fitted to its units."""
    flags = shlex.split(train.PRESETS["tiny"], comments=True)
    cfg = vars(train.build_parser().parse_args([*flags, "--source", "rendered"]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = train.Model(cfg).eval()
        model.extractor.to_scalars[-1].weight.mul_(100)  # units that are not silent
    ds = data.load("shapes3d", source="rendered")
    model.dyga.fit(model.units(ds.images(torch.arange(0, 480_000, 2_400))))
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    torch.save({"format": train.FORMAT, "stage": 2, "config": cfg, "seen": [0, 0, 1234],
                "minutes": 0.5, "model": model.state_dict(), "average": model.state_dict()}, path)
    rows = [{"stage": 2, "images": 32 * i, "loss": 1 / (1 + i)} for i in range(20)]
    (path.parent / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def report(checkpoint):
    """The real command on it, in a process of its own, without the metrics that take long."""
    command = [sys.executable, "evaluate.py", str(checkpoint), "--quick", "--device", "cpu",
               "--only", "mig,modularity_active,figures"]
    folder = Path(evaluate.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkpoint.parent / "eval", done.stdout, done.stderr


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    def run(*arguments):
        line = ["evaluate.py", *map(str, arguments), "--device", "cpu", "--out", "new"]
        monkeypatch.setattr(sys, "argv", line)
        try:
            code = data.run(evaluate.main) or 0
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr()), Path("new")
    return run


def test_the_command_prints_what_it_does_scores_counts_the_papers_values_and_units(report):
    row = next(line for line in report[1].splitlines() if line.startswith("mig  "))
    assert "paper 0.507+-0.002" in row and "train 2,000" in row
    for words in ("rendered twin", "cannot be compared", "floor hue: unit", "Silent units"):
        assert words in report[1]
    for words in ("units of a sample", "encoding 1,9", "interchange", "slider, floor hue: unit"):
        assert f"\n{words}" in "\n" + report[2]  # what is being done, away from a terminal


def test_the_command_writes_metrics_json_pictures_and_a_page_that_needs_no_other_file(report):
    figures = ["samples", "interchange", "interpolation", "attention", "units"]
    assert {path.name for path in report[0].iterdir()} == {
        "metrics.json", "index.html", *(f"{name}.png" for name in figures)}
    page = (report[0] / "index.html").read_text()
    assert "://" not in page and "32, \\\"loss\\\": 0.5" in page
    assert all(f'"{name}": "data:image/jpeg' in page for name in figures)
    found = json.loads((report[0] / "metrics.json").read_text())
    assert (found["source"], found["seen"][2], found["quick"]) == ("rendered", 1234, True)
    assert found["scores"]["mig"]["counts"] == {"n_train": 2000}
    assert set(found["anchors"]) == {"before", "after", "mean_delta", "lambda"}


def test_control_is_part_of_the_report(checkpoint, command, monkeypatch):
    monkeypatch.setattr(evaluate, "nearest_image", lambda ds, x: torch.zeros(len(x)).long())
    code, said, out = command(checkpoint, "--quick", "--only", "control")
    assert code == 0 and "pairs 16" in said and "control of floor hue: 0." in said
    found = json.loads((out / "metrics.json").read_text())["control"]
    assert set(found) == {*data.load("shapes3d", source="rendered").factor_names, "mean"}


@pytest.mark.parametrize("factors, only, words, figure, possible", [
    ({}, "figures", ["No scores: "], "interchange.png", "choose from figures"),
    ({"hue": 2, "size": 4}, "dci,infomec", ["dci: train 20, test 20", "infomec: train 40"],
     "index.html", "choose from dci, infomec, gbt, figures")])
def test_images_that_form_no_grid_get_the_scores_that_their_labels_allow_or_the_reason_why_not(
        checkpoint, command, monkeypatch, factors, only, words, figure, possible):
    draw, sizes = data.load("shapes3d", source="rendered").images, torch.tensor([*factors.values()])
    labels = (torch.arange(40)[:, None] // 10 % sizes).long()
    facts = dict(images=40, factors=factors, labels=labels)
    ds = data.Dataset("folder", "", "", lambda idx: draw(11_111 * idx), facts, "cpu")
    monkeypatch.setattr(data, "load", lambda *_, **__: ds)
    code, said, out = command(checkpoint, "--quick", "--only", only)
    assert code == 0 and all(x in said for x in words) and "nothing is aligned" not in said
    assert (out / figure).exists()
    found = json.loads((out / "metrics.json").read_text())
    assert len(found["nmi"]) == len(factors) and bool(found["scores"]) == bool(factors)
    assert ('"No scores: ' in (out / "index.html").read_text()) != bool(factors)
    assert possible in command(checkpoint, "--only", "mig")[1]


@pytest.mark.parametrize("arguments, words", [
    *((("--seed", value), "--seed") for value in ("nan", "inf", "-1", "1e99", 10**30)),
    (("--only", "mig,magic"), "magic: for shapes3d"), (("--only", "tad"), "choose from factorvae"),
    (("--codes", "a.npz"), "expected a checkpoint")])
def test_a_wrong_flag_is_one_line_and_nothing_is_written(checkpoint, command, arguments, words):
    code, said, out = command(checkpoint, *arguments)
    assert code == 2 and said.count("\n") == 1 and words in said and not out.exists()


def test_a_missing_input_or_template_is_one_line(checkpoint, command, monkeypatch):
    assert "expected a checkpoint" in command()[1] and "o such file" in command("none.pt")[1]
    monkeypatch.setattr(evaluate, "TEMPLATE", Path("lost/page.html"))
    code, said, _ = command(checkpoint)
    assert code == 2 and said.count("\n") == 1 and "lost/page.html" in said


def test_metrics_that_need_a_grid_are_refused_for_celeba():
    with pytest.raises(data.UserError, match="dci: for celeba choose from tad, figures"):
        evaluate.check_flags(SimpleNamespace(only=["dci"]), SimpleNamespace(
            name="celeba", is_grid=False, factor_names=["Bald", "Young"]))


CARS = np.stack(np.unravel_index(np.arange(17_568), [4, 24, 183]), 1)
CODES = ["--codes", "a.npz", "--dataset", "cars3d", "--quick", "--only"]


@pytest.mark.parametrize("arrays", [
    {"any": CARS}, {"codes": CARS[:, :, None] * np.ones(4), "labels": np.zeros(2)}])
def test_codes_of_a_file_are_scored_without_images_and_called_the_users(command, arrays):
    np.savez("a.npz", **arrays)
    code, said, out = command(*CODES, "factorvae,figures")
    assert code == 0 and "a.npz: cars3d, codes" in said and "the user's" in said
    assert json.loads((out / "metrics.json").read_text())["scores"]["factorvae"]["value"] == 1
    assert {path.name for path in out.iterdir()} == {"metrics.json", "index.html"}


@pytest.mark.parametrize("arrays, words", [
    ({"a": CARS[1:]}, "a is int64"), ({"a": CARS[:, :1]}, "found 1 unit"), ({}, "no array"),
    ({"a": CARS * np.nan}, "NaN"), ({"a": CARS, "b": CARS}, "holds a, b"),
    ({"a": np.array(["text"])}, "expected numbers"), (None, "not a readable .npz")])
def test_a_file_without_fitting_codes_is_one_line(command, arrays, words):
    Path("a.npz").write_text("no npz")
    if arrays is not None:
        np.savez("a.npz", **arrays)
    code, said, _ = command(*CODES, "mig")
    assert code == 2 and words in said.splitlines()[-1]
