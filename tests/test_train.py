"""Facts about the run: command line, settings, checkpoint, log, determinism, resuming."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train

ROOT = Path(train.__file__).parent
TINY = ["--dataset", "shapes3d", "--preset", "tiny", "--device", "cpu"]
# A course of a few steps: two fits of the anchors and several rows of the log.
SHORT = [*TINY, "--stage1.images", "96", "--images", "320", "--pool_images", "128", "--fit_images",
         "150", "--ddim_steps", "2", "--dyga.k_max", "8", "--dyga.max_iter", "5"]


@pytest.fixture(autouse=True)
def rows_of_every_second_step(monkeypatch):
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # pytest keeps its own handlers


def run_main(monkeypatch, *flags):
    """Run train.py's main in this process as the command line would -> exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    try:
        data.run(train.main)
    except SystemExit as stop:
        return stop.code
    return 0


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command, in a process of its own, on a short course: its folder and its words."""
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *SHORT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stderr
    return out, result


# ---- what a run writes and says ----


def test_a_run_writes_its_three_files_and_says_what_was_chosen(finished):
    out, result = finished
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl", "samples.png"}
    first, second = result.stdout.splitlines()[:2]
    assert "rendered twin" in first
    for word in ("preset tiny", "device cpu", "float32", str(out)):
        assert word in second


def test_without_a_terminal_progress_comes_in_plain_lines_not_a_rewritten_one(finished):
    lines = [line for line in finished[1].stderr.split("\n") if "stage 2" in line]
    assert 1 <= len(lines) <= 4 and all(line.count("images") <= 2 for line in lines)


def test_log_has_losses_and_anchors(finished):
    found = rows(finished[0])
    assert {"psnr", "codes_used", "adversarial_weight", "disc_loss"} <= found[0].keys()
    assert any("reconstruction_psnr" in row for row in found)
    assert [row["images"] for row in found if "loss" in row][-1] == 320
    fits = [row for row in found if "anchors" in row]
    assert [row["of"] for row in fits] == ["training", "training", "average"]
    assert all(len(row["anchors"]) == 6 for row in fits)


def test_checkpoint_alone_rebuilds_the_averaged_model(finished):
    model, ckpt = train.load_checkpoint(finished[0] / "ckpt.pt")
    assert ckpt["config"]["source"] == "rendered" and ckpt["seen"] == {1: 96, 2: 320}
    assert not model.training
    c = model.units(data.load("shapes3d").images(torch.tensor([0, 77, 479_999])))
    noise = model.noise(3, torch.Generator().manual_seed(0))
    sample = model.sample(model.dyga.align(c), noise, 2)
    assert c.shape == (3, 6, 32) and sample.shape == (3, 3, 64, 64)
    assert torch.equal(sample, model.sample(model.dyga.align(c), noise, 2))
    # The average has its own weights and anchors, not the training ones.
    for name in ("unet.conv_in.weight", "extractor.cnn.1.running_var", "dyga.anchors"):
        assert not torch.equal(ckpt["average"][name], ckpt["model"][name])


def test_a_run_takes_numbers_too_small_for_full_precision_as_zero(monkeypatch):
    # Else momenta that die out make the optimiser twenty times slower on some CPUs.
    supported = torch.set_flush_denormal(False)
    small = torch.full((1_000,), 1.5e-38)
    assert (small / 2 > 0).all()
    assert run_main(monkeypatch, "--help") == 0  # it is the first thing that main does
    assert (small / 2 > 0).any() != supported
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("capability, expected", [((8, 0), True), ((7, 5), False), (None, False)])
def test_stage_2_is_in_bfloat16_where_a_gpu_computes_in_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.in_bfloat16(torch.device("cuda" if capability else "cpu")) is expected


def test_a_run_in_bfloat16_has_float32_weights_and_losses_near_those_of_float32(
        finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "in_bfloat16", lambda device: True)
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path) == 0
    half = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    exact = [row["loss"] for row in rows(finished[0]) if "loss" in row]
    assert half[-1] != exact[-1]
    assert sum(half) / len(half) == pytest.approx(sum(exact) / len(exact), rel=0.03)
    model = train.read_checkpoint(tmp_path / "ckpt.pt")["model"]
    trained = [x for name, x in model.items() if name.startswith(("unet.", "extractor."))]
    assert {x.dtype for x in trained if x.ndim} == {torch.float32}


# ---- determinism and resuming (test_crash.py kills and resumes) ----


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_same_seed_same_numbers_and_another_seed_other_numbers(finished, tmp_path, monkeypatch):
    first = train.read_checkpoint(finished[0] / "ckpt.pt")
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path / "a") == 0
    second = train.read_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert same(first["model"], second["model"]) and same(first["average"], second["average"])
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path / "b", "--seed", 1) == 0
    third = train.read_checkpoint(tmp_path / "b" / "ckpt.pt")
    name = "unet.conv_in.weight"
    assert not torch.equal(first["model"][name], third["model"][name])


@pytest.mark.parametrize("flags, held", [
    (["--lr", "0.5"], "0.001"), (["--seed", "1"], "0"), (["--preset", "laptop"], "tiny"),
    (["--images", "640"], "320"), (["--vary", "shape"], ""),
    (["--unet.multipliers", "1", "4"], "[1, 2]"), (["--no-unet.self_attention"], "True")])
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(
        flags, held, finished, monkeypatch, capsys):
    before = (finished[0] / "ckpt.pt").read_bytes()
    resume = ["--dataset", "shapes3d", "--out", finished[0], "--resume"]
    assert run_main(monkeypatch, *resume, *flags) == 2
    line = capsys.readouterr().err
    assert flags[0].replace("no-", "") in line and f"began with {held};" in line
    assert line.count("\n") == 1 and (finished[0] / "ckpt.pt").read_bytes() == before


def test_the_same_command_and_resume_adds_nothing_to_a_finished_run(
        finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path / "run", "--resume") == 0
    assert rows(tmp_path / "run") == rows(finished[0])
    before, after = (train.read_checkpoint(out / "ckpt.pt") for out in
                     (finished[0], tmp_path / "run"))
    assert same(before["average"], after["average"])


def test_a_finished_stage_1_can_be_copied_and_resumed_with_other_settings_of_stage_2(
        tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path / "a", "--stage1_only") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    resume = ["--dataset", "shapes3d", "--out", tmp_path / "b", "--resume"]
    assert run_main(monkeypatch, *resume, "--vqgan.channels", 24) == 2
    assert "--vqgan.channels 24" in capsys.readouterr().err
    other = ["--batch", 16, "--seed", 3, "--extractor.n_units", 3]
    assert run_main(monkeypatch, *resume, *other) == 0
    ours, theirs = (train.read_checkpoint(tmp_path / x / "ckpt.pt")["model"] for x in "ba")
    assert same(train.part(ours, "vqgan"), train.part(theirs, "vqgan"))
    assert ours["dyga.mask"].shape[0] == 3


def test_stage_2_draws_from_one_pool_of_images_and_hands_on_their_latents(
        finished, tmp_path, monkeypatch):
    forward, seen = train.Model.forward, set()

    def watched(self, images, z0, priced):
        seen.update(image.numpy().tobytes() for image in images)
        torch.testing.assert_close(z0, self.vqgan.encode(images), atol=1e-3, rtol=1e-3)  # float16
        return forward(self, images, z0, priced)

    monkeypatch.setattr(train.Model, "forward", watched)
    flags = [*SHORT, "--out", tmp_path, "--pool_images", "64"]
    assert run_main(monkeypatch, *flags) == 0
    assert 50 < len(seen) <= 64
    fits = [row["images"] for row in rows(tmp_path) if row.get("of") == "training"]
    assert len(fits) == 5  # an epoch is as many images as the pool has: 320 / 64


def test_a_batch_larger_than_the_pool_counts_what_a_step_really_sees(tmp_path, monkeypatch):
    flags = [*SHORT, "--out", tmp_path, "--pool_images", "8", "--batch", "32", "--images", "96"]
    assert run_main(monkeypatch, *flags) == 0
    fits = [row for row in rows(tmp_path) if row.get("of") == "training"]
    assert len(fits) == 3  # one a step, though a step is four epochs long
    assert train.read_checkpoint(tmp_path / "ckpt.pt")["seen"][2] == 96


def test_units_learn_freely_at_first_and_then_have_a_price(tmp_path, monkeypatch):
    forward, asked = train.Model.forward, []

    def watched(self, images, z0, priced):
        asked.append(priced)
        return forward(self, images, z0, priced)

    monkeypatch.setattr(train.Model, "forward", watched)
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path, "--price", "1e-3") == 0
    assert asked == 5 * [False] + 5 * [True]  # ten steps; the fifth begins at exactly 0.4
    prices = [row["price"] > 0 for row in rows(tmp_path) if "loss" in row]
    assert prices == [False, False, True, True, True]  # a row is the mean of two steps


# ---- settings ----


@pytest.mark.parametrize("flags", [*train.PRESETS.values(), *train.PER_DATASET.values()])
def test_a_preset_is_a_list_of_flags_that_fit_together(flags):
    cfg = vars(train.build_parser().parse_args(shlex.split(flags, comments=True)))
    train.check_settings(cfg, world=1)


def test_flag_beats_dataset_beats_preset_beats_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def chosen(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--dataset", *flags])
        return train.parse()[0]

    assert chosen("celeba", "--preset", "paper")["batch"] == 64
    assert chosen("celeba", "--preset", "paper", "--batch", "7")["batch"] == 7
    assert chosen("shapes3d", "--preset", "paper")["unet.base"] == 64
    assert chosen("shapes3d")["preset"] == "laptop"
    assert chosen("cars3d", "--preset", "paper")["fit_every"] == 5


def numeric_flags():
    return [name for name, value in train.default_settings().items()
            if isinstance(value, (int, float, list)) and not isinstance(value, bool)]


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e30", str(10 ** 30)])
def test_no_number_of_any_flag_ends_in_a_traceback(value, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(numeric_flags()) > 50
    for name in numeric_flags():
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"--{name}={value}"])
        try:
            data.run(lambda: train.check_settings(train.parse()[0], world=1))
        except SystemExit as stop:
            line = capsys.readouterr().err
            assert stop.code == 2 and line.count("\n") == 1 and f"--{name}" in line, line
        else:  # 0 switches it off, or is a value like others
            assert value == "0", (name, value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (["--bacth", "3"], ["unrecognized", "--bacth"]),
    (["--dataset", "shapes"], ["shapes", "cars3d"]),
    (["--preset", "huge"], ["huge", "laptop"]), (["--batch", "many"], ["--batch", "many"]),
    (["--dataset", "cars3d"], ["cars3d", "nips2015-analogy-data"]),
    (["--resume"], ["ckpt.pt", "No such file"]), (["--device", "cuda:99"], ["cuda:99", "cpu"]),
    (["--ddim_steps", "5000"], ["--ddim_steps", "5000", "1..1000"]),
    (["--unet.heads", "3"], ["--unet.base", "16", "multiple of 12"]),
    (["--vqgan.patch", "3"], ["--vqgan.patch", "64", "a multiple of 12"]),
    (["--unet.multipliers", "1", "1", "1", "1", "1"], ["--unet.multipliers", "multiple of 128"]),
    (["--extractor.channels", "4", "4", "4", "4", "4", "4"], ["--extractor.channels", "halvings"]),
])
def test_mistakes_end_in_one_line_exit_code_2_and_nothing_written(
        flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *TINY, *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train, "UNet", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run_main(monkeypatch, *SHORT, "--out", tmp_path)


def test_out_that_is_a_file_or_another_run_is_refused_and_left_alone(
        finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("mine")
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path / "taken") == 2
    assert "File exists" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"
    assert run_main(monkeypatch, *SHORT, "--out", finished[0]) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_step_that_does_not_fit_into_the_gpu_names_the_largest_half_that_does(monkeypatch):
    monkeypatch.setattr(train, "fits", lambda run, batch: batch <= 100)
    run = type("Run", (), {"cfg": {"batch": 512}, "world": 1, "device": torch.device("cuda")})
    with pytest.raises(data.UserError, match="--batch 512: .* at most --batch 64"):
        train.check_memory(run)


def test_components_never_import_each_other():
    parts = {"data", "vqgan", "unet", "extractor", "dyga"}
    for name in parts:
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.strip().startswith(("import", "from"))]
        assert not {word.split(".")[0] for word in imports} & (parts | {"train", "evaluate"}), name
