"""Facts about the run: command line, settings, checkpoint, log, determinism, resuming."""

import json
import re
import shutil
import subprocess
import sys
import types
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
# One step of each stage.
SHORTEST = [*SHORT, "--stage1.images", "8", "--stage1.batch", "8", "--images", "8", "--batch", "8",
            "--fit_images", "20", "--ddim_steps", "1", "--dyga.k_max", "4"]


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


def rows(out, having="images"):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in found if having in row]


def kept(out, name):
    """What a checkpoint holds under this name."""
    return train.read_checkpoint(out / "ckpt.pt")[name]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command, in a process of its own, on a short course: its folder and its words."""
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *SHORT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_says_what_was_chosen_and_writes_pictures_and_a_log_of_losses_and_anchors(finished):
    out, result = finished
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl", "samples.png"}
    assert {"psnr", "codes_used", "adversarial_weight", "disc_loss"} <= rows(out)[0].keys()
    assert rows(out, "reconstruction_psnr") and rows(out, "loss")[-1]["images"] == 320
    assert [row["of"] for row in rows(out, "anchors")] == ["training", "training", "average"]
    assert all(len(row["anchors"]) == 6 for row in rows(out, "anchors"))
    first, second = result.stdout.splitlines()[:2]
    assert "rendered twin" in first
    for word in ("preset tiny", "device cpu", "float32", str(out)):
        assert word in second
    # Progress comes in plain lines: no terminal here, in which to write one over and over.
    progress = [line for line in result.stderr.split("\n") if "stage 2" in line]
    assert 1 <= len(progress) <= 4 and all(line.count("images") <= 2 for line in progress)


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
    supported, small = torch.set_flush_denormal(False), torch.full((1_000,), 1.5e-38)
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
    half, exact = ([row["loss"] for row in rows(out, "loss")] for out in (tmp_path, finished[0]))
    assert half[-1] != exact[-1]
    assert sum(half) / len(half) == pytest.approx(sum(exact) / len(exact), rel=0.03)
    trained = [x for name, x in kept(tmp_path, "model").items()
               if name.startswith(("unet.", "extractor."))]
    assert {x.dtype for x in trained if x.is_floating_point()} == {torch.float32}


def test_same_seed_same_numbers_and_another_seed_other_numbers(finished, tmp_path, monkeypatch):
    for seed in (0, 1):
        assert run_main(monkeypatch, *SHORT, "--out", tmp_path / str(seed), "--seed", seed) == 0
        for part in ("model", "average"):
            assert same(kept(finished[0], part), kept(tmp_path / str(seed), part)) != seed


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


def test_the_same_command_is_refused_and_with_resume_adds_nothing_to_a_finished_run(
        finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished[0], tmp_path / "run")
    assert run_main(monkeypatch, *SHORT, "--out", out) == 2
    assert "add --resume" in capsys.readouterr().err
    assert run_main(monkeypatch, *SHORT, "--out", out, "--resume") == 0
    assert rows(out) == rows(finished[0])
    assert same(kept(out, "average"), kept(finished[0], "average"))


def test_a_finished_stage_1_can_be_copied_and_resumed_with_other_settings_of_stage_2(
        tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, *SHORT, "--out", tmp_path / "a", "--stage1_only") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    resume = ["--dataset", "shapes3d", "--out", tmp_path / "b", "--resume"]
    assert run_main(monkeypatch, *resume, "--vqgan.channels", 24) == 2
    assert "--vqgan.channels 24" in capsys.readouterr().err
    other = ["--batch", 16, "--seed", 3, "--extractor.n_units", 3]
    assert run_main(monkeypatch, *resume, *other) == 0
    ours, theirs = (kept(tmp_path / name, "model") for name in "ba")
    assert same(train.part(ours, "vqgan"), train.part(theirs, "vqgan"))
    assert ours["dyga.mask"].shape[0] == 3


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of Model.forward: (model, images, latents)."""
    forward, made = train.Model.forward, []

    def watched(*arguments):
        made.append(arguments)
        return forward(*arguments)

    monkeypatch.setattr(train.Model, "forward", watched)
    return made


@pytest.mark.parametrize("pool, images, fits", [
    (64, 320, [64, 128, 192, 256, 320]), (8, 96, [32, 64, 96])])  # a step of 32 is four passes
def test_stage_2_draws_from_one_pool_hands_on_its_latents_and_fits_after_each_pass_or_longer_step(
        pool, images, fits, tmp_path, monkeypatch, calls):
    flags = [*SHORT, "--out", tmp_path, "--pool_images", pool, "--images", images]
    assert run_main(monkeypatch, *flags) == 0
    assert 0.75 * pool < len({x.numpy().tobytes() for call in calls for x in call[1]}) <= pool
    for model, x0, z0 in calls:  # z0 was kept as float16
        torch.testing.assert_close(z0, model.vqgan.encode(x0), atol=1e-3, rtol=1e-3)
    assert [row["images"] for row in rows(tmp_path, "of")] == [*fits, images]
    assert kept(tmp_path, "seen")[2] == images


def test_units_are_selected_once_for_the_trained_and_the_averaged_model(tmp_path, monkeypatch):
    flags = [*SHORT, "--out", tmp_path, "--select_at", "0.5"]
    assert run_main(monkeypatch, *flags) == 0
    (row,) = rows(tmp_path, "kept")
    kept_units = [unit in row["kept"] for unit in range(6)]
    assert row["images"] == 160 and 0 < sum(kept_units)
    for name in ("model", "average"):
        assert kept(tmp_path, name)["extractor.kept"].tolist() == kept_units


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(data.UserError, match="--batch.*: found 512, expected a multiple of 3"):
        train.check_settings(train.default_settings(), world=3)


@pytest.mark.parametrize("flags, name, value", [
    ("celeba --preset paper", "batch", 64), ("celeba --preset paper --batch 7", "batch", 7),
    ("shapes3d --preset paper", "unet.base", 64), ("shapes3d", "preset", "laptop"),
    ("cars3d --preset paper", "fit_every", 5)])
def test_flag_beats_dataset_beats_preset_beats_default_and_all_fit_together(
        flags, name, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--dataset", *flags.split()])
    cfg, _, _ = train.parse()
    train.check_settings(cfg, world=1)
    assert cfg[name] == value


def test_the_table_of_settings_offers_all_datasets_and_presets():
    choices = {action.dest: action.choices for action in train.build_parser()._actions}
    assert choices["dataset"] == list(data.DATASETS)
    assert choices["preset"] == list(train.PRESETS)


NUMBERS = [name for name, value in train.default_settings().items()
           if isinstance(value, (int, float, list)) and not isinstance(value, bool)]


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e30", str(10 ** 30)])
def test_every_number_of_every_flag_is_refused_in_one_line_or_runs(
        value, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(NUMBERS) > 50
    ran = []
    for name in NUMBERS:
        code = run_main(monkeypatch, *SHORTEST, f"--{name}={value}", "--out", name)
        line = capsys.readouterr().err
        if code == 0:
            ran.append(name)
        else:
            assert code == 2 and line.count("\n") == 1 and f"--{name}" in line, line
            assert not (tmp_path / name).exists()
    # 0 switches it off, or is a value like others.
    assert len(ran) > 15 if value == "0" else ran == []


@pytest.mark.parametrize("flags, words", [
    (["--preset", "huge"], ["huge", "laptop"]), (["--out", __file__], ["File exists"]),
    (["--dataset", "cars3d"], ["cars3d", "nips2015-analogy-data"]),
    (["--resume"], ["ckpt.pt", "No such file"]), (["--device", "cuda:99"], ["cuda:99", "cpu"]),
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


def test_a_step_that_does_not_fit_into_the_gpu_is_one_line():
    class Full(torch.nn.Module):
        def forward(self, *inputs):
            raise torch.OutOfMemoryError

    run = types.SimpleNamespace(model=Full(), cfg={"batch": 512}, world=1, bfloat16=False,
                                device=torch.device("cpu"))
    run.model.vqgan = types.SimpleNamespace(encode=lambda images: images)
    with pytest.raises(data.UserError, match="--batch 512: .* does not fit into the memory of cpu"):
        train.check_memory(run)


def test_components_never_import_each_other():
    parts = {"data", "vqgan", "unet", "extractor", "dyga"}
    for name in parts:
        source = (ROOT / f"{name}.py").read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE))
        assert "torch" in imported and not imported & (parts | {"train", "evaluate"}), name
