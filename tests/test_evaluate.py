"""evaluate.py: every metric against the value that its definition gives by hand, and the command end to end."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score, roc_auc_score

import data
import dyga
import evaluate
import train

ROOT = Path(__file__).resolve().parent.parent
SIZES = [3, 4, 5]
GRID = np.stack(np.unravel_index(np.arange(60), SIZES), 1)  # (60, 3) the factors of every index
GRID_METRICS = [evaluate.factor_vae, evaluate.dci, evaluate.mig, evaluate.modularity, evaluate.sap, evaluate.infomec]
SMALL = {"factor_vae": dict(n_variance=500, n_train=400, n_test=200), "dci": dict(n_train=150, n_test=100, jobs=1),
         "mig": dict(n_train=2000), "modularity": dict(n_train=2000), "sap": dict(n_train=500, n_test=300),
         "infomec": dict(n_train=1000)}


def score(metric, codes, sizes=SIZES, **counts):
    return metric(lambda idx: codes[idx], sizes, **(SMALL[metric.__name__] | counts))


def perfect(*units):
    """One unit per factor, a different number for each value; `units` reorders them or picks some."""
    return GRID[:, list(units) or [0, 1, 2]].astype(np.float32)


def mixed():
    """Units 0 and 1 are factors 1 and 2 turned by 45 degrees: each knows both. Unit 2 is factor 0."""
    a, b = GRID[:, 1] / 3, GRID[:, 2] / 4
    return np.stack([a + b, a - b, GRID[:, 0]], 1).astype(np.float32)


def noise(seed=0, units=3):
    """Codes that depend on the image but on no factor."""
    return np.random.default_rng(seed).normal(size=(60, units)).astype(np.float32)


# ---- FactorVAE ------------------------------------------------------------------------------------------------------

def test_factor_vae_of_perfect_codes_is_one_whatever_the_order_scale_and_copies():
    assert score(evaluate.factor_vae, perfect()) == 1
    assert score(evaluate.factor_vae, perfect(2, 0, 1) * [100, -3, 0.5]) == 1
    assert score(evaluate.factor_vae, perfect(0, 1, 2, 2, 0)) == 1


def test_factor_vae_of_a_code_of_one_factor_is_the_chance_of_drawing_that_factor():
    # The one unit gets all votes, so the score is the share of the test votes that fix the factor it is named after.
    assert score(evaluate.factor_vae, perfect(0), n_test=3000) == pytest.approx(1 / 3, abs=0.03)


def test_factor_vae_is_zero_without_an_active_unit_and_says_so():
    with pytest.warns(UserWarning, match="no active unit"):
        assert score(evaluate.factor_vae, perfect() * 0.01) == 0
    with pytest.warns(UserWarning, match="no active unit"):
        assert score(evaluate.factor_vae, np.ones((60, 4))) == 0


def test_factor_vae_ignores_constant_units():
    assert score(evaluate.factor_vae, np.hstack([np.ones((60, 2)), perfect()])) == 1


def test_factor_vae_counts_one_vote_at_a_time_as_the_definition_does():
    codes, sizes = noise(1, 4), np.array(SIZES)
    rng = np.random.default_rng(3)
    draw = rng.integers(0, sizes, size=(500, 3))
    overall = codes[np.ravel_multi_index(draw.T, SIZES)].astype(float).var(0, ddof=1)

    def votes(n):
        table = np.zeros((4, 3), int)
        fixed = rng.integers(3, size=n)
        factors = rng.integers(0, sizes, size=(n, 16, 3))
        for vote in range(n):
            factors[vote, :, fixed[vote]] = factors[vote, 0, fixed[vote]]
            local = codes[np.ravel_multi_index(factors[vote].T, SIZES)].astype(float).var(0, ddof=1)
            table[np.argmin(local / overall), fixed[vote]] += 1
        return table

    names, test = votes(400).argmax(1), votes(200)
    by_hand = test[np.arange(4), names].sum() / 200
    assert score(evaluate.factor_vae, codes, seed=3, batch=16) == by_hand


# ---- DCI and sample efficiency --------------------------------------------------------------------------------------

def test_dci_of_perfect_codes_is_one_in_all_three_parts():
    for codes in (perfect(), perfect(1, 2, 0) * [7, -1, 0.01]):
        expected = dict(disentanglement=1, completeness=1, informativeness=1)
        assert score(evaluate.dci, codes) == pytest.approx(expected, abs=1e-6)


def test_dci_of_constant_codes_is_zero_but_for_the_accuracy_of_guessing():
    result = score(evaluate.dci, np.zeros((60, 3)))
    assert result["disentanglement"] == pytest.approx(0, abs=1e-9)
    assert result["completeness"] == pytest.approx(0, abs=1e-9)
    assert result["informativeness"] == pytest.approx(np.mean([1 / 3, 1 / 4, 1 / 5]), abs=0.08)


def test_dead_units_count_in_the_base_of_completeness_and_not_in_disentanglement():
    # A factor spread evenly over 2 units has entropy log 2, so completeness is 1 - log 2 / log U: dead units raise it.
    # Here factors 0 to 2 have one unit each: dead units leave 1.
    result = score(evaluate.dci, np.hstack([perfect(), np.zeros((60, 5))]))
    assert result["disentanglement"] == pytest.approx(1, abs=1e-6)
    assert result["completeness"] == pytest.approx(1, abs=1e-6)


def test_a_unit_that_holds_two_factors_is_half_disentangled_in_base_two():
    # Two factors of equal size in one unit, and a constant one: its row of R is (1, 1), its entropy 1 in base 2.
    sizes = [4, 4]
    codes = np.stack([np.arange(16.0), np.zeros(16)], 1)
    result = score(evaluate.dci, codes, sizes)
    assert result["disentanglement"] == pytest.approx(0, abs=1e-9)
    assert result["completeness"] == pytest.approx(1, abs=1e-9)  # each factor needs that one unit only
    assert result["informativeness"] == 1


def test_dci_is_the_same_in_one_process_and_in_two():
    assert score(evaluate.dci, mixed(), jobs=1) == score(evaluate.dci, mixed(), jobs=2)


def test_dci_punishes_a_turned_code():
    assert score(evaluate.dci, mixed())["disentanglement"] < 0.8


def test_sample_efficiency_of_perfect_codes_is_one():
    result = evaluate.gbt_efficiency(lambda idx: idx[:, None], [3], n_test=200, jobs=1)
    assert result == dict(acc=1, acc_1000_ratio=1, acc_100_ratio=1)


# ---- MIG, modularity, SAP -------------------------------------------------------------------------------------------

def test_mutual_information_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    codes, factors = rng.normal(size=(500, 4)), rng.integers(0, 6, size=(500, 2))
    codes[:, 0] += factors[:, 1]
    mi, h = evaluate.mutual_information(codes, factors)
    for u in range(4):
        labels = np.digitize(codes[:, u], np.histogram(codes[:, u], 20)[1][:-1])
        for k in range(2):
            assert mi[u, k] == pytest.approx(mutual_info_score(labels, factors[:, k]), abs=1e-6)
    assert h[0] == pytest.approx(mutual_info_score(factors[:, 0], factors[:, 0]), abs=1e-6)


def test_mig_of_perfect_codes_is_one_but_for_the_bias_of_counting():
    # The second best unit knows nothing; its plug-in MI is about (sizes - 1)(sizes - 1) / 2n.
    for codes in (perfect(), perfect(2, 1, 0) * [9, -2, 0.001]):
        assert score(evaluate.mig, codes) == pytest.approx(1, abs=0.01)


def test_mig_is_exactly_zero_when_every_unit_has_a_copy():
    assert score(evaluate.mig, perfect(0, 1, 2, 0, 1, 2)) == 0


def test_mig_of_a_turned_code_loses_the_two_mixed_factors():
    # Only factor 0 keeps a unit of its own: its third of the mean, and little from the two others.
    assert 1 / 3 - 0.02 < score(evaluate.mig, mixed()) < 1 / 3 + 0.15


def test_mig_and_modularity_of_constant_codes_are_zero():
    assert score(evaluate.mig, np.ones((60, 3))) == 0
    assert score(evaluate.modularity, np.ones((60, 3))) == 0


def test_modularity_is_one_for_perfect_codes_and_does_not_mind_copies():
    assert score(evaluate.modularity, perfect()) == pytest.approx(1, abs=1e-3)
    assert score(evaluate.modularity, perfect(0, 0, 1, 1, 2)) == pytest.approx(1, abs=1e-3)


def test_a_constant_unit_counts_as_zero_in_modularity():
    codes = np.hstack([perfect(), np.ones((60, 1))])
    assert score(evaluate.modularity, codes) == pytest.approx(3 / 4, abs=1e-3)


def test_a_unit_that_knows_two_of_two_factors_equally_has_modularity_zero():
    # 16 different numbers for 16 pairs: its mutual information is log 4 with both.
    codes = np.arange(16.0)[:, None]
    assert score(evaluate.modularity, codes, [4, 4], n_train=20_000) == pytest.approx(0, abs=1e-3)


def test_sap_of_one_binary_factor_is_one_minus_the_accuracy_of_guessing():
    # The second best unit is constant, so it is right half of the time.
    assert score(evaluate.sap, np.stack([[-1.0, 1.0], [0.0, 0.0]], 1), [2], n_test=2000) == pytest.approx(0.5, abs=0.03)


def test_sap_is_zero_for_copies():
    assert score(evaluate.sap, perfect(0, 1, 2, 0, 1, 2)) == 0


# ---- InfoMEC --------------------------------------------------------------------------------------------------------

def test_infomec_of_perfect_codes():
    # Nearest-neighbour estimates of unrelated pairs are near 0 but not 0.
    result = score(evaluate.infomec, perfect())
    assert result["infom"] == pytest.approx(1, abs=0.1)
    assert result["infoc"] == pytest.approx(1, abs=0.1)
    assert result["infoe"] > 0.8


def test_infoe_is_one_for_units_that_are_linear_in_one_hot_labels():
    one_hot = np.eye(3)[GRID[:, 0]]
    assert score(evaluate.infomec, np.hstack([one_hot, perfect(1, 2)]))["infoe"] > 0.8
    two = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    assert score(evaluate.infomec, two, [2, 2])["infoe"] > 0.99


def test_infoe_of_noise_is_zero():
    rng = np.random.default_rng(0)
    encode = lambda idx: rng.normal(size=(len(idx), 3))  # noqa: E731, a new number at every call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a unit of zero information, by chance
        assert evaluate.infomec(encode, SIZES, n_train=2000)["infoe"] == pytest.approx(0, abs=0.01)


def test_infoc_of_one_active_unit_is_nan_with_a_reason():
    with pytest.warns(UserWarning, match="InfoC: undefined for 1 active unit"):
        result = score(evaluate.infomec, np.hstack([perfect(0), np.zeros((60, 2))]))
    assert np.isnan(result["infoc"]) and result["infom"] > 0.9


def test_infomec_of_constant_codes_says_that_no_unit_is_active():
    with pytest.warns(UserWarning, match="InfoM: 0 active units"):
        result = score(evaluate.infomec, np.ones((60, 3)))
    assert result["infom"] == 0 and np.isnan(result["infoc"]) and result["infoe"] == pytest.approx(0, abs=1e-9)


# ---- all metrics on a grid ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", GRID_METRICS)
def test_nan_codes_are_refused_and_the_unit_is_named(metric):
    codes = perfect()
    codes[:, 1] = np.nan
    with pytest.raises(ValueError, match="unit 1 hold NaN"):
        score(metric, codes)


@pytest.mark.parametrize("metric", GRID_METRICS)
def test_a_factor_with_one_value_is_left_out(metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert score(metric, perfect(), [3, 1, 4, 5, 1]) == score(metric, perfect(), SIZES)


@pytest.mark.parametrize("metric", GRID_METRICS)
def test_more_units_than_samples_give_finite_scores(metric):
    counts = {name: 20 for name in SMALL[metric.__name__] if name.startswith("n_")}
    result = score(metric, noise(units=60), **counts)
    assert np.isfinite(list(result.values()) if isinstance(result, dict) else result).all()


@pytest.mark.parametrize("metric", GRID_METRICS)
def test_the_seed_decides_and_the_global_random_state_is_left_alone(metric):
    before = np.random.get_state()[1].copy()
    first, again = (score(metric, mixed() + 0.3 * noise(), seed=5) for _ in range(2))
    assert first == again
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("metric", GRID_METRICS)
def test_perfect_codes_score_higher_than_noise(metric):
    good, bad = score(metric, perfect()), score(metric, noise())
    headline = {"dci": "disentanglement", "infomec": "infom"}.get(metric.__name__)
    assert (good[headline] > bad[headline] + 0.2) if headline else (good > bad + 0.2)


@pytest.mark.parametrize("metric", GRID_METRICS)
def test_torch_codes_are_taken_too(metric):
    assert score(metric, torch.from_numpy(perfect())) == score(metric, perfect())


def test_codes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="expected .*, U"):
        evaluate.mig(lambda idx: np.zeros(len(idx)), SIZES)
    with pytest.raises(ValueError, match="needs 2"):
        score(evaluate.mig, perfect(0))
    with pytest.raises(ValueError, match="at least 1 factors"):
        score(evaluate.mig, perfect(), [1, 1])


# ---- TAD and the Frechet distance -----------------------------------------------------------------------------------

def attributes(n=4000, A=3, seed=0):
    return np.random.default_rng(seed).integers(0, 2, size=(n, A))


def test_tad_of_units_that_are_the_attributes():
    # Two values per unit: at thresholds above the minimum, TPR = 1 and FPR = 0, which is an AUROC of 1; others guess.
    a = attributes()
    result = evaluate.tad(a.astype(float), a)
    assert result["captured"] == result["captured_exact"] == 3
    assert result["tad"] == pytest.approx(3 * 0.5, abs=0.1)
    assert result["tad_exact"] == pytest.approx(3 * 0.5, abs=0.06)


def test_tad_is_zero_for_copies_for_noise_and_for_units_of_tiny_range():
    a, rng = attributes(), np.random.default_rng(1)
    assert evaluate.tad(np.hstack([a, a]), a)["tad"] == 0
    assert evaluate.tad(rng.normal(size=(4000, 5)), a) == dict(tad=0, captured=0, tad_exact=0, captured_exact=0)
    assert evaluate.tad(a * 0.2, a)["tad"] == 0


def test_an_attribute_that_another_one_gives_away_is_not_captured():
    a = attributes()
    a[:, 1] = a[:, 0]
    assert evaluate.tad(a.astype(float), a)["captured"] == 1


def test_an_attribute_that_everybody_has_is_not_captured():
    a = attributes()
    a[:, 0] = 1
    assert evaluate.tad(a.astype(float), a)["captured"] == 2


def test_tad_does_not_mind_the_sign_of_a_continuous_unit():
    a = attributes()
    z = a + np.random.default_rng(1).uniform(0, 0.5, size=a.shape)
    assert evaluate.tad(-z, a)["captured"] == evaluate.tad(z, a)["captured"] == 3


def test_the_stepped_rule_misses_a_unit_of_two_values_that_falls_with_the_attribute_and_the_exact_one_does_not():
    # "z < threshold" never includes the largest value, so the curve does not reach FPR = 1, and nothing lies under it.
    a = attributes()
    assert evaluate.tad(-a.astype(float), a)["captured"] == 0
    assert evaluate.tad(-a.astype(float), a)["captured_exact"] == 3


def test_the_stepped_auroc_by_hand():
    # z = 0, 0.5, 1 (twice), attribute 0, 1, 0, 1; step 0.5: thresholds 0, 0.5, 1. z >= t gives (FPR, TPR) = (1, 1),
    # (1/2, 1), (1/2, 1/2); sorted FPR 1/2, 1/2, 1 and TPR 1/2, 1, 1: area 1 * 0 + 1 * 1/2. Reversed: FPR 0, 1/2, 1/2,
    # TPR 0, 0, 1/2: area 0 * 1/2 + 1/2 * 0.
    z, a = np.array([[0.0], [0.5], [1.0], [1.0]]), np.array([[0], [1], [0], [1]])
    assert evaluate.stepped_auroc(z, a, 0.5) == pytest.approx(0.5)


def test_the_exact_auroc_agrees_with_scikit_learn():
    a, rng = attributes(300), np.random.default_rng(1)
    z = np.round(rng.normal(size=(300, 4)) + a[:, :1], 1)  # rounded, so that there are ties
    for u in range(4):
        for k in range(3):
            expected = roc_auc_score(a[:, k], z[:, u])
            assert evaluate.exact_auroc(z, a)[u, k] == pytest.approx(max(expected, 1 - expected))


def test_tad_refuses_labels_of_minus_one():
    with pytest.raises(ValueError, match="of 0, 1"):
        evaluate.tad(np.zeros((4, 2)), np.array([[1], [-1], [1], [-1]]))


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(5, 5))
    cov, mu = A @ A.T, rng.normal(size=5)
    assert evaluate.frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-9)
    # Equal covariances: the squared distance of the means.
    assert evaluate.frechet_distance(mu, cov, mu + 2, cov) == pytest.approx(5 * 4)
    # Diagonal covariances commute: the sum of squared differences of standard deviations.
    s1, s2 = np.arange(1.0, 6), np.array([2.0, 2, 2, 0, 2])
    found = evaluate.frechet_distance(mu, np.diag(s1 ** 2), mu, np.diag(s2 ** 2))
    assert found == pytest.approx(((s1 - s2) ** 2).sum())
    # Singular on both sides, without a shared direction: the traces add up.
    e = np.eye(5)
    assert evaluate.frechet_distance(mu, np.diag(e[0]), mu, np.diag(e[1])) == pytest.approx(2)


class ColourMeans(torch.nn.Module):
    """Stands in for the Inception network, whose file cannot be had here: same call, 3 features in place of 2,048."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean([2, 3])


def copying_model(brighter):
    """A model whose "units" are the image itself and whose samples are that image, brighter by a constant."""
    return SimpleNamespace(units=lambda x: x.float(), dyga=SimpleNamespace(align=lambda c: c),
                           noise=lambda count, generator: None,
                           sample=lambda c, noise, steps: (c + brighter).to(torch.uint8))


class RandomImages(torch.utils.data.Dataset):
    device = torch.device("cpu")
    pixels = torch.randint(200, (130, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def __len__(self):
        return len(self.pixels)

    def images(self, idx):
        return self.pixels[idx]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_fid_is_zero_for_the_images_themselves_and_the_squared_shift_of_the_features_for_shifted_ones(tmp_path):
    torch.jit.script(ColourMeans()).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = evaluate.load_inception(tmp_path, "cpu")
    with pytest.warns(UserWarning, match="2,048"):
        assert evaluate.fid(copying_model(0), RandomImages(), network, 130, 1) == pytest.approx(0, abs=1e-6)
        assert evaluate.fid(copying_model(7), RandomImages(), network, 130, 1) == pytest.approx(3 * 7 ** 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_without_the_inception_file_fid_is_left_out_in_one_line_and_a_damaged_one_is_refused(tmp_path, capsys):
    assert evaluate.load_inception(tmp_path, "cpu") is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "inception-2015-12-05.pt" in said and "https://" in said
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"not a network")
    with pytest.raises(data.UserError, match="not a readable TorchScript file"):
        evaluate.load_inception(tmp_path, "cpu")


# ---- from a checkpoint to the page ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the tiny preset with random weights, and anchors fitted to its units."""
    args = train.build_parser().parse_args(["--dataset", "shapes3d", "--preset", "tiny"])
    args.device = torch.device("cpu")
    cfg = train.settings(args)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = train.Model(cfg).eval()
    ds = data.load("shapes3d", source="rendered")
    idx = torch.arange(0, 480_000, 2_400)
    model.dyga.fit(model.units(ds.images(idx)))
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    torch.save({"format": train.FORMAT, "stage": 2, "config": cfg, "model": model.state_dict(), "average": {},
                "dataset": {"name": "shapes3d", "source": "rendered"}, "images_seen": 1234, "minutes": 0.5}, path)
    (path.parent / "log.jsonl").write_text("".join(
        json.dumps({"stage": 2, "images": 32 * i, "loss": 1 / (1 + i)}) + "\n" for i in range(20)))
    return path


@pytest.fixture(scope="module")
def report(checkpoint):
    """The real command on it, in a process of its own, without the metrics that take long."""
    command = [sys.executable, "evaluate.py", str(checkpoint), "--quick", "--only", "mig,modularity,figures",
               "--seeds", "2", "--images", "5,17", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkpoint.parent / "eval", done.stdout


def test_the_command_prints_scores_with_counts_seeds_and_the_papers_values(report):
    row = next(line for line in report[1].splitlines() if line.startswith("MIG"))
    assert "0.507 +- 0.002" in row and "train 2,000" in row and "0, 1" in row
    assert "rendered twin" in report[1] and "cannot be compared" in report[1]


def test_the_command_writes_every_file(report):
    figures = {f"{name}.png" for name in evaluate.FIGURES}
    assert {path.name for path in report[0].iterdir()} == {"metrics.json", "index.html"} | figures


def test_metrics_json_says_what_was_measured_on_what(report):
    found = json.loads((report[0] / "metrics.json").read_text())
    assert found["source"] == "rendered" and found["images_seen"] == 1234 and found["quick"]
    row = found["scores"]["mig"]
    assert row["counts"] == {"n_train": 2000} and row["seeds"] == [0, 1]
    assert row["value"] == pytest.approx(np.mean(row["values"]))
    assert row["std"] == pytest.approx(np.std(row["values"], ddof=1))


def test_the_page_needs_no_other_file(report):
    page = (report[0] / "index.html").read_text()
    assert "rendered twin" in page
    assert "://" not in page and page.count('src="data:image/png') == len(evaluate.FIGURES)


def test_the_page_works_in_a_browser(report, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here to open the page with (Debian: apt-get install chromium)")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                           "--dump-dom", (report[0] / "index.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert "position 1 of 5" in done.stdout  # the script has run
    assert "background: url(" in done.stdout.replace("&quot;", '"')


@pytest.mark.parametrize("arguments, words", [
    (["--only", "mig,no_such_metric"], "no_such_metric"), (["--only", "tad"], "choose from factorvae"),
    (["--images", "480000"], "0 to 479999"), (["--fid", "1"], "--fid 1"), (["--seeds", "0"], "--seeds 0")])
def test_a_wrong_flag_is_one_line_and_nothing_is_written(checkpoint, tmp_path, monkeypatch, arguments, words):
    command = ["evaluate.py", str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "new"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(data.UserError, match=words) as error:
        evaluate.main()
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_missing_checkpoint_and_an_out_that_is_a_file_are_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "none.pt")])
    with pytest.raises(data.UserError, match="no such file"):
        evaluate.main()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(checkpoint), "--out", str(tmp_path / "file")])
    with pytest.raises(data.UserError, match="a file is there"):
        evaluate.main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_grid_metrics_are_refused_for_celeba_in_one_sentence():
    celeba = SimpleNamespace(name="celeba", __len__=lambda: 9)
    with pytest.raises(data.UserError, match="dci: for celeba choose from tad, figures"):
        evaluate.chosen_parts(SimpleNamespace(only=["dci"], images=[], seed=0, seeds=1, fid=0), celeba, 20)


def test_metrics_that_compare_units_are_refused_for_a_model_of_one():
    args = SimpleNamespace(only=["factorvae", "mig"], quick=True, images=[], seed=0, seeds=1, fid=0)
    with pytest.raises(data.UserError, match="the model has 1 unit, and mig compare units"):
        evaluate.chosen_parts(args, data.load("shapes3d", source="rendered"), 1)


def test_the_pca_of_all_units_at_once_agrees_with_scikit_learn():
    c = torch.randn(200, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9)
    scalars = evaluate.project(c, evaluate.fit_pca(c)).numpy()
    for u in range(3):
        expected = PCA(1).fit_transform(c[:, u].numpy())[:, 0]
        assert np.allclose(np.abs(scalars[:, u]), np.abs(expected), atol=1e-4)  # the sign is free


def test_every_image_is_encoded_once():
    seen = []

    class Model:
        def units(self, images):
            seen.extend(images.flatten().tolist())
            return images[:, :, None].float()  # (B, 1, 1)

    class Images:
        device = torch.device("cpu")
        images = staticmethod(lambda idx: idx[:, None])
        __len__ = lambda self: 50  # noqa: E731

    encode = evaluate.Codes(Model(), Images(), (torch.zeros(1, 1), torch.ones(1, 1)))
    for idx in ([3, 1, 3], [1, 4], [3]):
        assert encode(np.array(idx))[:, 0].tolist() == idx
    assert sorted(seen) == [1, 3, 4]


def two_anchors(noise):
    """A DyGA of one unit in 4 dimensions, fitted to two groups of 200 samples; their units and groups."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400)[:, None] % 2
    c = 3 + 4 * labels[..., None] + noise * torch.randn(400, 1, 4, generator=generator)
    return dyga.DyGA(1, dim=4, k_init=2, k_max=2, lam=0.5).fit(c), c, labels.numpy()


def test_separation_is_pure_for_groups_that_are_far_apart_and_alignment_raises_the_margin():
    anchors, c, labels = two_anchors(0.3)
    numbers = evaluate.separation(anchors, c, labels, np.array([True]))
    assert numbers["purity_before"] == numbers["purity_after"] == numbers["pure_before"] == 1
    assert numbers["chance"] == 0.5
    assert numbers["margin_after"] > numbers["margin_before"] > 0.8


def test_separation_of_labels_that_the_unit_does_not_know_is_chance():
    anchors, c, labels = two_anchors(0.3)
    unrelated = np.arange(400)[:, None] // 200
    assert evaluate.separation(anchors, c, unrelated, np.array([True]))["purity_before"] == pytest.approx(0.5, abs=0.01)
    assert evaluate.separation(dyga.DyGA(1, dim=4), c, labels, np.array([True])) == {}


def test_one_zero_makes_the_released_delta_vanish_and_not_ours():
    anchors, c, _ = two_anchors(0.3)
    usual = evaluate.mean_deltas(anchors, c)
    c[0, 0, 0] = 0
    found = evaluate.mean_deltas(anchors, c)
    assert found["released_delta"] < 1e-100 < 0.1 < usual["released_delta"]
    assert found["mean_delta"] == pytest.approx(usual["mean_delta"], rel=0.02)
