"""evaluate.py: each metric against the value that its definition gives; the command; the page."""
import html
import json
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fid
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score

import data
import dyga
import evaluate
import train
from conftest import TINY as SMALL_RUN

SIZES = [3, 4, 5]
GRID = np.stack(np.unravel_index(np.arange(60), SIZES), 1)  # (60, 3) the factors of every index
LABELS = np.repeat(GRID, 3, 0)[np.random.default_rng(0).permutation(180)][:90]  # no grid
CARS = np.stack(np.unravel_index(np.arange(17_568), [4, 24, 183]), 1)
approx = lambda value, within=1e-6: pytest.approx(value, abs=within)  # noqa: E731
SMALL = {"factorvae": dict(n_variance=500, n_train=400, n_test=200),
         "dci": dict(n_train=150, n_test=100, jobs=1), "sap": dict(n_train=500, n_test=300),
         "infomec": dict(n_train=1000), "gbt": dict(n_train=200, n_test=100, jobs=1)}
SMALL |= dict.fromkeys(("mig", "modularity", "modularity_active"), dict(n_train=2000))

def score(metric, codes, sizes=SIZES, **settings):
    """A metric's numbers, a list; codes: of every image."""
    function = evaluate.METRICS[metric][0]
    found = function(lambda idx: codes[idx], sizes, **(SMALL[metric] | settings))
    return list(found.values()) if isinstance(found, dict) else [found]

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

@pytest.mark.parametrize("metric, codes, words, expected, within", [
    *((metric, codes, words, [score], 0) for codes in (perfect() * 0.01, np.ones((60, 4)))
      for metric, words, score in (("factorvae", "no active unit", 0),
                                   ("modularity_active", "undefined", np.nan))),
    ("infomec", np.hstack([perfect(0), np.zeros((60, 2))]), "for 1 active", [1, np.nan], 0.1),
    ("infomec", np.ones((60, 3)), "InfoM: 0 active units", [0, np.nan], 0)])
def test_too_few_active_units_give_zero_or_nan_and_a_reason(metric, codes, words, expected, within):
    with pytest.warns(UserWarning, match=words):
        found = score(metric, codes)
    assert found[:len(expected)] == pytest.approx(expected, abs=within, nan_ok=True)

def test_factor_vae_counts_its_votes_as_a_plain_loop_does():
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
    expected = test[np.arange(4), names].sum() / 200
    assert score("factorvae", noise(1, 4), seed=3, batch=16) == [expected]

def test_dci_punishes_a_turned_code_by_as_much_in_one_process_as_in_two():
    one, two = (score("dci", mixed(), jobs=jobs) for jobs in (1, 2))
    assert one == two and one[0] < 0.8

def test_mutual_information_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 6, size=(500, 2))
    codes = factors + rng.normal(size=(500, 2))
    mi, h = evaluate.mutual_information(codes, factors)
    for u, k in np.ndindex(2, 2):
        labels = np.digitize(codes[:, u], np.histogram(codes[:, u], 20)[1][:-1])
        assert mi[u, k] == approx(mutual_info_score(labels, factors[:, k]))
    assert h[0] == approx(mutual_info_score(factors[:, 0], factors[:, 0]))

# FactorVAE of one unit is the chance of its factor. DCI: a factor spread over 2 of U units would
# have completeness 1 - log 2 / log U; with one unit for each, dead units leave 1. Two factors in
# one unit: its row of R is (1, 1), entropy 1 in base 2. Of unrelated pairs MIG's plug-in estimate
# is (sizes - 1)(sizes - 1) / 2n, not 0. 16 numbers for 16 pairs: log 4 with both factors.
@pytest.mark.parametrize("metric, codes, sizes, expected, within", [
    ("factorvae", perfect(2, 0, 1, 1, 2) * [100, -3, 0.5, 1, 1], SIZES, 1, 0),
    ("factorvae", np.hstack([np.ones((60, 2)), perfect()]), SIZES, 1, 0),
    # Unit 0 varies most where factor 0 is fixed, too, but least beside its whole variance.
    ("factorvae", perfect() * [100, 1, 1] + noise() * [20, 0.1, 0.1], SIZES, 1, 0),
    ("factorvae", perfect(0), SIZES, 1 / 3, 0.1), ("dci", perfect(), SIZES, [1, 1, 1], 1e-6),
    ("dci", perfect(1, 2, 0) * [7, -1, 0.01], SIZES, [1, 1, 1], 1e-6),
    ("dci", np.hstack([perfect(), np.zeros((60, 5))]), SIZES, [1, 1, 1], 1e-6),
    ("dci", np.stack([np.arange(16.0), np.zeros(16)], 1), [4, 4], [0, 1, 1], 1e-6),
    ("dci", np.zeros((60, 3)), SIZES, [0, 0, np.mean([1 / 3, 1 / 4, 1 / 5])], 0.08),  # it guesses
    ("mig", perfect(2, 1, 0) * [9, -2, 0.001], SIZES, 1, 0.01), ("mig", mixed(), SIZES, 0.37, 0.1),
    ("mig", perfect(0, 1, 2, 0, 1, 2), SIZES, 0, 0), ("mig", np.ones((60, 3)), SIZES, 0, 0),
    ("modularity", perfect(0, 0, 1, 1, 2), SIZES, 1, 1e-3),
    ("modularity", np.ones((60, 3)), SIZES, 0, 0),
    ("modularity", np.hstack([perfect(), np.ones((60, 1))]), SIZES, 3 / 4, 1e-3),
    ("modularity", np.arange(16.0)[:, None], [4, 4], 0, 0.02),
    ("modularity_active", np.hstack([perfect(), 0.01 * noise()]), SIZES, 1, 1e-3),
    ("sap", perfect(0, 1, 2, 0, 1, 2), SIZES, 0, 0),
    ("sap", np.array([[-1.0, 0], [1, 0]]), [2], 0.5, 0.1),
    ("infomec", perfect(), SIZES, [1, 1], 0.1),
    ("infomec", np.indices([2, 2]).reshape(2, 4).T * 1.0, [2, 2], [1, 1, 1], 0.1),  # linear
    ("gbt", GRID[:3, 2:], [3], [1, 1, 1], 0),
    *((metric, LABELS.astype(float), LABELS, 1, 0.06) for metric in ("dci", "infomec", "gbt"))])
def test_scores_by_hand(metric, codes, sizes, expected, within):
    found = score(metric, codes, sizes)[:np.size(expected)]
    assert found == approx(np.ravel(expected), within)

def test_infoe_is_zero_of_noise():
    rng = np.random.default_rng(0)
    noisy = evaluate.infomec(lambda idx: rng.normal(size=(len(idx), 3)), SIZES, n_train=2000)
    assert noisy["infoe"] == approx(0, 0.01)

@pytest.mark.parametrize("metric", [name for name in SMALL if name != "gbt"])
def test_a_score_is_repeatable_lower_for_noise_and_leaves_out_a_factor_of_one_value(metric):
    before = np.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = score(metric, perfect())
        assert score(metric, perfect(), [3, 1, 4, 5, 1]) == expected
    assert score(metric, torch.from_numpy(perfect())) == expected
    assert expected[0] > score(metric, noise())[0] + 0.2
    few = {name: 20 for name in SMALL[metric] if name.startswith("n_")}  # and more units
    assert np.isfinite(score(metric, noise(units=60), seed=5, **few)).all()
    assert (np.random.get_state()[1] == before).all()  # the global one

def test_of_labels_no_image_is_drawn_twice_and_fewer_images_are_shared_in_proportion():
    x, y, x_test, y_test = evaluate.Sampler(lambda idx: idx[:, None], LABELS, 0).split(600, 300)
    assert len(x_test) == 30 and sorted([*x[:, 0], *x_test[:, 0]]) == list(range(90))
    assert (y_test == LABELS[x_test[:, 0].astype(int)]).all()
    rare = LABELS * [1, 1, 0] + np.eye(90, dtype=int)[:, 7:8] * [0, 0, 1]  # none to learn from
    assert 0 < score("dci", LABELS.astype(float), rare, n_train=5)[2] < 1

@pytest.mark.parametrize("ask, words", [
    *((partial(score, metric, perfect() + [0, np.nan, 0]), r"NaN .* \[1\]") for metric in SMALL),
    (partial(score, "mig", np.zeros(60)), "expected .*, U"),
    (partial(score, "mig", perfect(0)), "at least 2"),
    (partial(score, "mig", perfect(), [1, 1]), "at least 1"),
    (partial(score, "factorvae", perfect(), GRID), "needs the sizes of a grid"),
    (partial(evaluate.tad, GRID, 2 * (GRID > 1) - 1), "of 0, 1"),
    (partial(evaluate.tad, GRID[:, :1], GRID > 1), "U at least 2"),
    (partial(evaluate.check_flags, SimpleNamespace(only=["dci"], checkpoint=""), data.Dataset(
        "celeba", "", "", None, dict(images=9, factors={"Bald": 2, "Old": 2}, labels=0), "cpu")),
     "dci: for celeba choose from tad "),
    (partial(evaluate.check_flags, SimpleNamespace(only=["figures"], checkpoint=""), data.Dataset(
        "cars3d", "", "", None, data.DATASETS["cars3d"], "cpu")), "figures: .* choose from fact"),
])
def test_nan_is_refused_by_unit_and_so_are_shapes_and_labels_that_a_score_cannot_use(ask, words):
    with pytest.raises((ValueError, data.UserError), match=words):
        ask()

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

@pytest.mark.parametrize("a, b", [
    (np.arange(1.0, 6), np.array([2.0, 2, 2, 0, 2])), (np.eye(5)[0], np.eye(5)[1])])
def test_frechet_distance_of_covariances_that_commute_is_that_of_their_roots(a, b):
    found = fid.frechet_distance(np.ones(5), np.diag(a ** 2), np.ones(5), np.diag(b ** 2))
    assert found == approx(((a - b) ** 2).sum())

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
    units = lambda idx: seen.extend(idx.tolist()) or idx[:, None, None].float()  # noqa: E731
    encode = evaluate.cached(units, (torch.zeros(1, 1), torch.ones(1, 1)), 50)
    for idx in ([3, 1, 3], [1, 4], [3]):
        assert encode(np.array(idx))[:, 0].tolist() == idx
    assert sorted(seen) == [1, 3, 4]

def test_anchors_of_groups_far_apart_are_pure_and_alignment_raises_their_margin():
    label, half = np.arange(400) % 2, np.arange(400) // 200  # factors
    c = torch.randn(400, 2, 4, generator=torch.Generator().manual_seed(0))
    c = 3 + 4 * torch.from_numpy(label)[:, None, None] + 0.3 * c  # (400, 2, 4): two groups
    probe = SimpleNamespace(c=c, names=["label", "half"], factors=np.stack([label, half], 1),
                            active=np.array([True, False]), favourite=np.array([0, 0]))
    anchors = dyga.DyGA(2, dim=4, k_init=2, k_max=2, lam=0.5).fit(c)
    before, after = evaluate.separation(anchors, probe).values()
    assert (before["purity"], after["purity"], before["chance"]) == (1, 1, 0.5)
    assert after["margin"] > before["margin"] > 0.8
    probe.favourite[:] = 1
    assert evaluate.separation(anchors, probe)["before"]["purity"] == approx(0.5, 0.01)  # chance

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Small networks with random weights, anchors fitted to their units of a grid of 320 images."""
    flags = SMALL_RUN + ["--source", "rendered", "--vary", "floor hue,scale,shape"]
    cfg = vars(train.build_parser().parse_args(flags))
    torch.manual_seed(0)
    model = train.Model(cfg).eval()
    model.extractor.to_scalars[-1].weight.data.mul_(1000)  # units that are not silent
    model.dyga.fit(model.units(data.load("shapes3d", vary=cfg["vary"]).images(torch.arange(320))))
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    torch.save({"format": train.FORMAT, "stage": 2, "config": cfg, "seen": [0, 0, 1234],
                "minutes": 0.5, "model": model.state_dict(), "average": model.state_dict()}, path)
    (path.parent / "log.jsonl").write_text('{"images": 32, "loss": 0.5}\n')
    return path

@pytest.fixture
def command(checkpoint, main, monkeypatch, capsys, tmp_path):
    """Calls evaluate.py in a folder with ckpt.pt -> exit code, what it said, its folder."""
    def run(*arguments):
        code = main(evaluate, *arguments, "--device", "cpu", "--out", "new")
        return code, "".join(capsys.readouterr()), Path("new")
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "ckpt.pt")
    return run

def test_the_command_gives_scores_beside_the_papers_pictures_and_one_page(checkpoint):
    command = [sys.executable, "evaluate.py", checkpoint, "--quick", "--device", "cpu",
               "--only", "mig,modularity_active,control,figures"]
    done = subprocess.run(command, cwd=Path(data.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("mig  "))
    assert "paper -" in row and "train 2,000" in row  # of a part of Shapes3D it has no score
    for words in ("rendered twin", "cannot be compared", "floor hue: unit", "Silent units",
                  "pairs 16", "control of floor hue: 0."):
        assert words in done.stdout
    for words in ("units of a sample", "encoding 3", "interchange", "slider, floor hue: unit"):
        assert f"\n{words}" in "\n" + done.stderr  # what is being done, away from a terminal
    figures = ["samples", "interchange", "interpolation", "attention", "units"]
    assert {path.name for path in (checkpoint.parent / "eval").iterdir()} == {
        "metrics.json", "index.html", *(f"{name}.png" for name in figures)}
    page = (checkpoint.parent / "eval/index.html").read_text()
    assert "://" not in page and "32, \\\"loss\\\": 0.5" in page
    assert all(f'"{name}": "data:image/jpeg' in page for name in figures)
    found = json.loads((checkpoint.parent / "eval/metrics.json").read_text())
    assert (found["source"], found["seen"][2], found["quick"]) == ("rendered", 1234, True)
    assert set(found["anchors"]) == {"before", "after"}
    assert set(found["control"]) == {"floor hue", "scale", "shape", "mean"}

@pytest.mark.parametrize("factors, only, words, figure, possible", [
    ({}, "figures", ["No scores: "], "interchange.png", "choose from figures"),
    ({"hue": 2, "size": 4}, "dci,infomec", ["dci: train 20, test 20", "infomec: train 40"],
     "index.html", "choose from dci, infomec, gbt, figures")])
def test_images_that_form_no_grid_get_the_scores_that_their_labels_allow_or_the_reason_why_not(
        command, monkeypatch, factors, only, words, figure, possible):
    draw, sizes = data.load("shapes3d", source="rendered").images, torch.tensor([*factors.values()])
    labels = (torch.arange(40)[:, None] // 10 % sizes).long()
    facts = dict(images=40, factors=factors, labels=labels)
    ds = data.Dataset("folder", "", "", lambda idx: draw(11_111 * idx), facts, "cpu")
    monkeypatch.setattr(data, "load", lambda *_, **__: ds)
    code, said, out = command("ckpt.pt", "--quick", "--only", only)
    assert code == 0 and all(x in said for x in words) and "nothing is aligned" not in said
    assert (out / figure).exists()
    found = json.loads((out / "metrics.json").read_text())
    assert len(found["nmi"]) == len(factors) and bool(found["scores"]) == bool(factors)
    assert ('"No scores: ' in (out / "index.html").read_text()) != bool(factors)
    assert possible in command("ckpt.pt", "--only", "mig")[1]

def test_of_a_table_columns_of_one_value_or_of_a_value_for_each_image_are_left_out():
    rng = np.random.default_rng(0)
    labels, codes = rng.integers(0, 3, (90, 2)), rng.normal(size=(90, 3))
    more = np.column_stack([labels[:, 0], np.zeros(90, int), np.arange(90), labels[:, 1]])
    assert evaluate.infomec(codes.__getitem__, more) == evaluate.infomec(codes.__getitem__, labels)

@pytest.mark.parametrize("arguments, words", [
    *((["ckpt.pt", "--seed", seed], "--seed") for seed in ("nan", "inf", "-1", "1e99", 10**30)),
    (["ckpt.pt", "--only", "mig,magic"], "magic: for shapes3d"),
    (["ckpt.pt", "--only", "tad"], "choose from factorvae"), ([], "expected a checkpoint"),
    (["ckpt.pt", "--codes", "a.npz"], "expected a checkpoint"), (["none.pt"], "o such file"),
    (["ckpt.pt"], "lost/page.html")])
def test_a_wrong_flag_or_missing_file_is_one_line_and_writes_nothing(
        command, arguments, words, monkeypatch):
    if "lost" in words:
        monkeypatch.setattr(evaluate, "TEMPLATE", Path(words))
    code, said, out = command(*arguments)
    assert code == 2 and said.count("\n") == 1 and words in said and not out.exists()

@pytest.mark.parametrize("arrays, words", [
    ({"any": CARS}, ""), ({"codes": CARS[:, :, None] * np.ones(4), "labels": np.zeros(2)}, ""),
    ({"a": CARS[1:]}, "a is int64"), ({"a": CARS[:, :1]}, "found 1 unit"), ({}, "of one array"),
    ({"a": CARS * np.nan}, "NaN"), ({"a": CARS, "b": CARS}, "one named codes"),
    ({"a": np.array(["text"])}, "expected numbers"), (None, "cannot be read")])
def test_codes_of_a_file_are_scored_without_images_or_refused_in_a_line(command, arrays, words):
    Path("a.npz").write_text("no npz")
    if arrays is not None:
        np.savez("a.npz", **arrays)
    code, said, out = command(
        "--codes", "a.npz", "--dataset", "cars3d", "--quick", "--only", "factorvae")
    if words:
        assert code == 2 and words in said.splitlines()[-1]
        return
    assert code == 0 and "a.npz: cars3d, codes" in said and "paper 0.941+-0.002" in said
    assert json.loads((out / "metrics.json").read_text())["scores"]["factorvae"]["value"] == 1
    assert {path.name for path in out.iterdir()} == {"metrics.json", "index.html"}

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """JavaScript -> its last value, in the page as Chromium opens it, as wide as a phone."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here")
    folder = tmp_path_factory.mktemp("page")
    four = dict.fromkeys(("moved", "kept", "control", "off"), [0.75, 0.5, 1.0, 0.125])
    report = {"dataset": "shapes3d", "source": "codes", "quick": True, "checkpoint": "a",
              "units": ["</script>: unit 1"], "silent": [0], "anchors": {}, "paper": {},
              "factors": ["floor hue"], "nmi": [[0.25, 0.875]], "control": {"mean": four},
              "scores": {"mig": {"value": 0.5, "counts": {"n_train": 9}, "notes": []}}}
    picture, other = Image.new("RGB", (900, 300)), Image.new("RGB", (266, 66), "red")
    strips = {"floor hue: unit 1": {"stops": 4, "pictures": [evaluate.inline(picture)]},
              "unit 0": {"stops": 2, "pictures": [evaluate.inline(other)]}}
    log = "".join(json.dumps({"images": i, "loss": 2 - i}) + "\n" for i in range(2)) + '{"cut'
    page = evaluate.page(report, {"lr": 1e-3}, {"interchange": picture}, log,
                         {"images": [5], "strips": strips})
    def run(script):
        (folder / "phone.html").write_text(
            f'<iframe width=390 srcdoc="{html.escape(page)}"></iframe><script>onload = () => '
            f"document.body.textContent = JSON.stringify(frames[0].eval({json.dumps(script)}))"
            "</script>", "utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   f"--user-data-dir={folder}", (folder / "phone.html").as_uri()]
        found = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8").stdout
        return json.loads(html.unescape(re.search("<body>(.*)</body>", found)[1]))
    return run

def test_the_slider_is_reached_by_tab_and_turns_the_factor_by_steps_or_by_a_click(browser):
    stops, first, turned, said, back, count, chosen, clicked, other, now = browser("""
        const stops = [...document.querySelectorAll("*")].filter(x => x.tabIndex >= 0);
        const shown = () => view.style.background, moved = () => new Event("input");
        [stops.slice(0, 3).map(x => x.type), shown(),
         (slider.stepUp(), slider.dispatchEvent(moved()), shown()), said.textContent,
         (slider.stepDown(), slider.dispatchEvent(moved()), shown()),
         values.children.length, (values.children[3].click(), values.children[3].className),
         said.textContent, (unit.selectedIndex = 1, unit.dispatchEvent(moved()), shown()),
         said.textContent]""")
    assert stops == ["select-one", "select-one", "range"]  # the browser's own: they obey its keys
    assert first == back != turned and said == "value 2 of 4"
    assert (count, chosen, clicked) == (4, "chosen", "value 4 of 4")
    assert other not in (first, turned) and now == "value 2 of 2"  # another unit, other pictures

def test_the_page_leads_with_the_slider_ends_with_the_notes_and_shows_what_there_is(browser):
    order, width, text, *shown = browser("""
        [[...document.querySelectorAll("[id]")].map(x => x.id),
         document.documentElement.scrollWidth, document.body.innerText, attention.hidden,
         document.querySelector("#loss polyline") != null,
         document.querySelector("#interchange img").naturalWidth]""")
    places = [order.index(name) for name in
              ("player", "matrix", "interchange", "control", "scores", "loss", "notes")]
    assert places == sorted(places) and order[-1] == "notes"
    assert width <= 390  # at phone width nothing is cut off or scrolls sideways
    for words in ("0.500", "Silent units", "</script>: unit", "best unit alone\t0.500", "train 9"):
        assert words in text
    assert shown == [True, True, 900]

def test_a_cell_of_the_matrix_is_the_darker_the_more_its_unit_knows_and_units_have_names(browser):
    text, dark, light = browser("""
        const cells = [...matrix.querySelectorAll("td")].slice(1);
        [matrix.innerText, ...cells.map(x => Number(x.style.background.match(/\\d+/)[0]))]""")
    head, row = text.splitlines()[-2:]
    assert head.split("\t")[1:] == ["floor hue: unit 1", "(0)"] and "0.88\t0.25" in row
    assert dark < light  # of red
