"""Facts about the run: command line, checkpoint, log, determinism, resuming."""

import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train

ROOT = Path(train.__file__).parent
# A course of a few steps: two fits of the anchors and several rows of the log.
SHORT = ["--preset", "tiny", "--device", "cpu", "--stage1_images", "96", "--images", "320", "--epoch_images", "128",
         "--fit_images", "150", "--ddim_steps", "2", "--dyga.k_max", "8", "--dyga.max_iter", "5"]


def run_main(monkeypatch, *flags):
    """Run train.py's main in this process as the command line would; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # the test runner keeps its own handlers
    try:
        data.run(train.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command, in a process of its own, on a short course."""
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "shapes3d", "--out", str(out), *SHORT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


# ---- what a run writes ----


def test_a_run_writes_its_four_files_and_says_what_was_chosen(finished):
    out, printed = finished
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl", "samples.png", "loss.png"}
    first = printed.splitlines()[0]
    for word in ("preset tiny", "as asked", "device cpu", "float32", "rendered twin", "minute"):
        assert word in first


def test_log_has_one_json_row_per_line_with_losses_and_anchors(finished):
    rows = [json.loads(line) for line in (finished[0] / "log.jsonl").read_text().splitlines()]
    assert {"psnr", "codes_used", "adversarial_weight"} <= rows[0].keys()
    assert any("reconstruction_psnr" in row for row in rows)
    losses = [row["images"] for row in rows if "loss" in row]
    assert losses == sorted(set(losses)) and losses[-1] == 320
    fits = [row for row in rows if "anchors" in row]
    assert [row["images"] for row in fits] == [128, 256, 320] and [row["of"] for row in fits][-1] == "average"
    assert all(len(row["anchors"]) == 6 for row in fits)


def test_checkpoint_alone_rebuilds_the_averaged_model(finished):
    model, ckpt = train.load_checkpoint(finished[0] / "ckpt.pt")
    assert ckpt["dataset"] == {"name": "shapes3d", "source": "rendered"} and ckpt["images_seen"] == 320
    images = data.load("shapes3d").images(torch.tensor([0, 77, 479_999]))
    c = model.units(images)
    assert c.shape == (3, 6, 32) and not model.training
    noise = model.noise(3, torch.Generator().manual_seed(0))
    sample = model.sample(model.dyga.align(c), noise)
    assert sample.shape == (3, 3, 64, 64) and sample.dtype == torch.uint8
    assert torch.equal(sample, model.sample(model.dyga.align(c), noise))
    # The average has its own weights and anchors, not the training ones.
    assert not torch.equal(ckpt["average"]["unet.conv_in.weight"], ckpt["model"]["unet.conv_in.weight"])
    assert not torch.equal(ckpt["average"]["dyga.anchors"], ckpt["model"]["dyga.anchors"])


def test_a_run_takes_numbers_too_small_for_full_precision_as_zero(monkeypatch):
    # Else momenta that die out make the optimiser twenty times slower on some CPUs.
    supported = torch.set_flush_denormal(False)
    small = torch.full((1_000,), 1.5e-38)
    assert (small / 2 > 0).all()
    assert run_main(monkeypatch, "--help") == 0  # it is the first thing that main does
    assert (small / 2 > 0).any() != supported
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("precision, device, expected", [
    ("auto", "cpu", False), ("auto", "cuda", True), ("float32", "cuda", False), ("bfloat16", "cpu", True)])
def test_auto_is_bfloat16_on_a_gpu_and_float32_on_a_cpu(precision, device, expected):
    assert train.in_bfloat16({"precision": precision}, torch.device(device)) is expected


def test_a_run_in_bfloat16_has_float32_weights_and_losses_near_those_of_float32(finished, tmp_path, monkeypatch):
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path, *SHORT, "--precision", "bfloat16") == 0
    exact, half = ([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
                   for out in (finished[0], tmp_path))
    exact, half = ([row["loss"] for row in rows if "loss" in row] for rows in (exact, half))
    assert half != exact and half == pytest.approx(exact, rel=0.02)
    model = train.read_checkpoint(tmp_path / "ckpt.pt")["model"]
    trained = {x.dtype for name, x in model.items() if name.startswith(("unet.", "extractor.")) and x.ndim}
    assert trained == {torch.float32}


# ---- determinism and resuming ----


def same(a, b):
    return {k for k in a if not torch.equal(a[k], b[k])} == set() and a.keys() == b.keys()


def test_same_seed_same_numbers_and_another_seed_other_numbers(finished, tmp_path, monkeypatch):
    first = train.read_checkpoint(finished[0] / "ckpt.pt")
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path / "a", *SHORT) == 0
    second = train.read_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert same(first["model"], second["model"]) and same(first["average"], second["average"])
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path / "b", "--seed", 1, *SHORT) == 0
    third = train.read_checkpoint(tmp_path / "b" / "ckpt.pt")
    assert not torch.equal(first["model"]["unet.conv_in.weight"], third["model"]["unet.conv_in.weight"])


@pytest.mark.parametrize("stage, images", [(1, 48), (2, 192)])
def test_a_stopped_and_resumed_run_ends_like_one_that_never_stopped(finished, tmp_path, monkeypatch, stage, images):
    out = tmp_path / "run"
    log = train.Run.tally

    def stop_here(self, at, **values):
        log(self, at, **values)
        if at == stage and self.seen[at] + self.batch[at] >= images:
            self.stopped_by = "SIGTERM"

    monkeypatch.setattr(train.Run, "tally", stop_here)
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", out, *SHORT) == 130
    assert train.read_checkpoint(out / "ckpt.pt")["stage"] == stage
    monkeypatch.setattr(train.Run, "tally", log)
    # A row that was logged after the checkpoint, and one torn in the middle, must not survive.
    with open(out / "log.jsonl", "a") as f:
        f.write('{"stage": 2, "images": 999, "loss": 1.0}\n{"stage": 2, "ima')
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", out, "--resume") == 0
    whole, resumed = (train.read_checkpoint(o / "ckpt.pt") for o in (finished[0], out))
    for key in ("model", "average"):
        assert same(whole[key], resumed[key])
    assert torch.equal(whole["rng"], resumed["rng"])

    def rows(o):
        found = [json.loads(line) for line in (o / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("minutes", "images_per_s", "fit_s")} for row in found]

    assert rows(finished[0]) == rows(out)


@pytest.mark.parametrize("flags, held", [
    (["--lr", "0.5"], "with 0.001"), (["--seed", "1"], "with 0"), (["--preset", "laptop"], "with tiny"),
    (["--images", "640"], "with 320"), (["--minutes", "9.0"], "without it"), (["--stage1_from", "a.pt"], "without it"),
    (["--unet.multipliers", "1", "4"], "with [1, 2]"), (["--no-unet.self_attention"], "with True")])
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(flags, held, finished, monkeypatch, capsys):
    before = (finished[0] / "ckpt.pt").read_bytes()
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", finished[0], "--resume", *flags) == 2
    line = capsys.readouterr().err
    name, value = flags[0].replace("no-", ""), {1: "False", 2: flags[-1], 3: "[1, 4]"}[len(flags)]
    assert f"{name} {value}: the run to resume began {held};" in line and line.count("\n") == 1
    assert (finished[0] / "ckpt.pt").read_bytes() == before


def test_the_same_command_and_resume_adds_nothing_to_a_finished_run(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    flags = ["--dataset", "shapes3d", "--out", tmp_path / "run", "--seed", 0, *SHORT, "--resume"]
    assert run_main(monkeypatch, *flags) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == (finished[0] / "log.jsonl").read_text()
    before, after = (train.read_checkpoint(out / "ckpt.pt") for out in (finished[0], tmp_path / "run"))
    assert same(before["average"], after["average"]) and torch.equal(before["rng"], after["rng"])


def test_a_checkpoint_that_lacks_a_setting_is_not_resumed(finished, tmp_path, monkeypatch, capsys):
    ckpt = train.read_checkpoint(finished[0] / "ckpt.pt")
    del ckpt["config"]["unet.base"]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path, "--resume") == 2
    assert "no setting unet.base" in capsys.readouterr().err


def test_stage1_of_another_run_can_be_taken_over(finished, tmp_path, monkeypatch):
    flags = ["--dataset", "shapes3d", "--stage1_from", finished[0] / "ckpt.pt", "--out"]
    assert run_main(monkeypatch, *flags, tmp_path / "a", *SHORT) == 0
    ours, theirs = (train.read_checkpoint(o / "ckpt.pt")["model"] for o in (tmp_path / "a", finished[0]))
    for name, weights in train.part(theirs, "vqgan").items():
        torch.testing.assert_close(ours[f"vqgan.{name}"], weights)
    assert run_main(monkeypatch, *flags, tmp_path / "b", *SHORT, "--vqgan.channels", 24) == 2


def test_stage_2_passes_over_one_pool_of_images_and_its_latents_again_and_again(finished, tmp_path, monkeypatch):
    forward, times_seen = train.Model.forward, collections.Counter()

    def watched(self, images, z0):
        times_seen.update(image.numpy().tobytes() for image in images)
        torch.testing.assert_close(z0, self.vqgan.encode(images), atol=1e-3, rtol=1e-3)  # kept as float16
        return forward(self, images, z0)

    monkeypatch.setattr(train.Model, "forward", watched)
    flags = [*SHORT, "--pool_images", "64", "--epoch_images", "0", "--stage1_from", finished[0] / "ckpt.pt"]
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path, *flags) == 0
    assert len(times_seen) == 64 and set(times_seen.values()) == {5}  # 320 images
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    fits = [row["images"] for row in rows if row.get("of") == "training"]
    assert fits == [64, 128, 192, 256, 320]  # an epoch is one pass over the pool


def test_minutes_ends_the_course_in_time_with_a_complete_checkpoint(finished, tmp_path, monkeypatch):
    flags = ["--dataset", "shapes3d", "--preset", "tiny", "--minutes", "0.1", "--stage1_from", finished[0] / "ckpt.pt"]
    assert run_main(monkeypatch, *flags, "--out", tmp_path / "a") == 0
    model, ckpt = train.load_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert 0.05 < ckpt["minutes"] < 0.3 and model.dyga.mask.any()
    borrowed = train.read_checkpoint(finished[0] / "ckpt.pt")["model"]  # and it was not trained any further
    assert torch.equal(ckpt["model"]["vqgan.encoder.1.weight"], borrowed["vqgan.encoder.1.weight"])


def test_a_timed_course_goes_by_the_clock_alone(tmp_path):
    args = train.build_parser().parse_args(["--dataset", "shapes3d", "--out", str(tmp_path), "--minutes", "10", *SHORT])
    args.device = torch.device("cpu")
    run = train.Run(args, train.settings(args))
    run.stage, run.minutes, run.seen = 2, {1: 1.0, 2: 4.3}, {1: 96, 2: 320_000}  # far beyond the preset's images
    assert next(run.course(2))[1] == pytest.approx(0.5)  # of 9.6 minutes, less stage 1's
    run.minutes[1] = 9.9  # stage 1 left nothing
    assert next(run.course(2), None) is None


def test_stage1_is_not_taken_from_a_run_that_was_still_training_it(finished, tmp_path, monkeypatch, capsys):
    torch.save(train.read_checkpoint(finished[0] / "ckpt.pt") | {"stage": 1}, tmp_path / "half.pt")
    flags = ["--dataset", "shapes3d", "--stage1_from", tmp_path / "half.pt", "--out", tmp_path / "a"]
    assert run_main(monkeypatch, *flags, *SHORT) == 2
    assert "half.pt: its stage 1 has not ended" in capsys.readouterr().err


def test_a_torn_last_row_of_the_log_is_left_out_of_the_loss_picture(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"images": 10, "loss": 0.5}\n{"images": 20, "loss": 0.25}\n')
    train.loss_picture(tmp_path / "log.jsonl", tmp_path / "whole.png")
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"images": 30, "lo')
    train.loss_picture(tmp_path / "log.jsonl", tmp_path / "torn.png")
    assert (tmp_path / "torn.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


# ---- settings ----


def test_every_setting_has_a_help_text_and_every_preset_names_real_settings():
    known = train.all_settings()
    assert all(len(text) > 1 for _, text in known.values())
    for preset in [*train.PRESETS.values(), *train.PER_DATASET.values()]:
        assert preset.keys() <= known.keys()


def test_flag_beats_dataset_beats_preset_beats_default():
    def chosen(*flags):
        args = train.build_parser().parse_args(flags)
        args.device = torch.device("cpu")
        return train.settings(args)

    assert chosen("--dataset", "celeba", "--preset", "paper")["batch"] == 64
    assert chosen("--dataset", "celeba", "--preset", "paper", "--batch", "7")["batch"] == 7
    assert chosen("--dataset", "shapes3d", "--preset", "paper")["unet.base"] == 64
    assert chosen("--dataset", "shapes3d")["preset"] == "laptop"
    assert chosen("--dataset", "cars3d", "--preset", "paper")["fit_every"] == 5


# ---- errors are for people ----


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "shapes3d", "--bacth", "3"], ["unrecognized", "--bacth"]),
    (["--dataset", "shapes"], ["shapes", "cars3d"]),
    (["--dataset", "shapes3d", "--preset", "huge"], ["huge", "laptop"]),
    (["--dataset", "shapes3d", "--batch", "many"], ["many", "int"]),
    (["--dataset", "cars3d", "--preset", "tiny"], ["cars3d", "nips2015-analogy-data"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--unet.heads", "3"], ["heads"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--resume"], ["ckpt.pt", "no such file"]),
    (["--dataset", "shapes3d", "--device", "cuda:99"], ["cuda:99", "cpu"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--vqgan.patch", "3"], ["do not fit"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--batch", "0"], ["--batch", "more than 0"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--minutes", "-5"], ["--minutes", "more than 0"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--stage1.restart_images", "0"], ["--stage1.restart_images"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--clip", "-1"], ["--clip", "0 or more"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--pool_images", "-1"], ["--pool_images is -1", "0 (the whole"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--lr", "-1"], ["do not fit", "learning rate"]),
    (["--dataset", "shapes3d", "--preset", "tiny", "--unet.skip_dropout", "1"], ["skip_dropout 1", "[0, 1)"]),
])
def test_mistakes_end_in_one_line_exit_code_2_and_nothing_written(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_refused_and_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("mine")
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path / "taken", *SHORT) == 2
    assert "expected a folder" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"


def test_a_second_run_does_not_overwrite_the_first(finished, monkeypatch, capsys):
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", finished[0], *SHORT) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(range(256)) * 40, "half", "other"])
def test_foreign_checkpoints_are_refused_in_one_line(content, finished, tmp_path):
    path = tmp_path / "ckpt.pt"
    if content == "half":
        whole = (finished[0] / "ckpt.pt").read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
    elif content == "other":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(data.UserError, match="expected") as caught:
        train.load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "--dataset", "shapes3d", "--out", tmp_path / "a", *SHORT, "--lr", "1e30") == 2
    message = capsys.readouterr().err
    assert "loss" in message and "of stage 2 is not finite at step" in message and "lower --lr" in message
    assert "last good checkpoint: none yet" in message


def test_components_never_import_each_other():
    parts = {"data", "vqgan", "unet", "extractor", "dyga"}
    for name in parts:
        source = (ROOT / f"{name}.py").read_text()
        imports = [line for line in source.splitlines() if line.strip().startswith(("import ", "from "))]
        words = {line.split()[1].split(".")[0] for line in imports}
        assert not words & (parts | {"train", "evaluate"}), name
