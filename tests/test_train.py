"""Facts about the run: command line, settings, checkpoint, log, determinism, resuming."""
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import train
from conftest import TINY

# A course of a few steps: a selection of units, which are unmixed; anchors are fitted.
TINY = TINY + ["--dataset", "shapes3d", "--device", "cpu"]
SHORT = TINY + ("--stage1.images 96 --images 320 --pool_images 128 --fit_images 150 --ddim_steps 2 "
                "--dyga.k_max 8 --dyga.max_iter 5 --select_at 0.5 --unmix_at 0.5").split()

def rows(out, having="images"):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in found if having in row]

def kept(out, name):
    return train.read_checkpoint(out / "ckpt.pt")[name]

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The real command, in a process of its own, on a short course: its folder and its words."""
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, train.__file__, "--out", out, *SHORT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stderr
    return out, result

def test_a_run_says_its_choices_and_writes_pictures_and_a_log_of_losses_anchors_selection(finished):
    out, result = finished
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl", "samples.png"}
    assert {"psnr", "codes_used", "adversarial_weight", "disc_loss"} <= rows(out)[0].keys()
    assert rows(out, "reconstruction_psnr") and rows(out, "loss")[-1]["images"] == 320
    fits = [(row["of"], row["images"]) for row in rows(out, "anchors")]
    assert fits == [("training", 128), ("training", 256), ("average", 320)]
    assert all(len(row["anchors"]) == 6 for row in rows(out, "anchors"))
    (row,) = rows(out, "kept")  # units were selected once, for both models
    assert row["images"] == 160 and row["kept"]
    for name in ("model", "average"):
        assert kept(out, name)["extractor.kept"].nonzero().flatten().tolist() == row["kept"]
    for words in ("rendered twin", "preset paper", "device cpu", "float32", f"writes to {out}"):
        assert words in result.stdout
    # Progress comes in plain lines: no terminal here, in which to write one over and over.
    progress = [line for line in result.stderr.split("\n") if "stage 2" in line]
    assert 1 <= len(progress) <= 4 and all(line.count("images") <= 2 for line in progress)

def test_checkpoint_alone_rebuilds_the_averaged_model(finished):
    model, ckpt = train.load_checkpoint(finished[0] / "ckpt.pt")
    assert ckpt["config"]["source"] == "rendered" and ckpt["seen"] == {1: 96, 2: 320}
    assert not model.training
    c = model.units(data.load("shapes3d").images(torch.tensor([0, 77, 479_999])))
    noise = model.noise(3, torch.Generator().manual_seed(0))
    one, other = (model.sample(model.dyga.align(c), noise, 2) for _ in range(2))
    assert c.shape == (3, 6, 32) and one.shape == (3, 3, 64, 64) and torch.equal(one, other)
    # The average has its own weights and anchors, not the training ones.
    for name in ("unet.conv_in.weight", "extractor.cnn.1.running_var", "dyga.anchors"):
        assert not torch.equal(ckpt["average"][name], ckpt["model"][name])

def test_a_run_takes_numbers_too_small_for_full_precision_as_zero(main):
    # Else momenta that die out make the optimiser twenty times slower on some CPUs.
    supported, small = torch.set_flush_denormal(False), torch.full((1_000,), 1.5e-38)
    assert (small / 2 > 0).all() and main(train, "--help") == 0  # it is the first thing it does
    assert (small / 2 > 0).any() != supported
    torch.set_flush_denormal(False)

def test_bfloat16_where_a_gpu_computes_in_it_has_float32_weights_and_losses_near_those_of_float32(
        finished, tmp_path, main, monkeypatch):
    for kind, capability in ("cuda", (8, 0)), ("cuda", (7, 5)), ("cpu", None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert train.in_bfloat16(torch.device(kind)) == (capability == (8, 0))
    monkeypatch.setattr(train, "in_bfloat16", lambda device: True)
    assert main(train, *SHORT, "--out", tmp_path) == 0
    half, exact = ([row["loss"] for row in rows(out, "loss")] for out in (tmp_path, finished[0]))
    assert half != exact and half == pytest.approx(exact, rel=0.03)
    trained = [x for name, x in kept(tmp_path, "model").items() if not name.startswith("dyga.")]
    assert {x.dtype for x in trained if x.is_floating_point()} == {torch.float32}

def test_a_finished_stage_1_leads_to_the_same_numbers_or_with_other_settings_of_stage_2_to_others(
        finished, tmp_path, main, capsys):
    theirs = kept(finished[0], "average")
    assert main(train, *SHORT, "--out", tmp_path / "a", "--stage1_only") == 0
    with pytest.raises(data.UserError, match="holds stage 1 only"):
        train.load_checkpoint(tmp_path / "a/ckpt.pt")
    for flags in ([], ["--seed", "3"], ["--batch", "16", "--extractor.n_units", "3"]):
        out = shutil.copytree(tmp_path / "a", tmp_path / "-".join(["b", *flags]))
        resume = ["--dataset", "shapes3d", "--out", out, "--resume", *flags]
        assert main(train, *resume, "--vqgan.channels", "24") == 2
        assert "--vqgan.channels 24" in capsys.readouterr().err
        assert main(train, *resume) == 0
        ours, ended = kept(out, "average"), rows(out)
        assert main(train, *resume) == 0 and rows(out) == ended  # finished: nothing is added
        assert same(train.part(ours, "vqgan"), train.part(theirs, "vqgan"))
        assert same(ours, theirs) == (not flags)
    assert ours["dyga.mask"].shape[0] == 3

@pytest.mark.parametrize("pool, images, fits", [
    (64, 320, [64, 128, 192, 256, 320]), (8, 96, [32, 64, 96])])  # a step of 32 is four passes
def test_stage_2_draws_from_one_pool_hands_on_its_latents_and_fits_after_each_pass_or_longer_step(
        pool, images, fits, tmp_path, main, monkeypatch):
    calls, forward = [], train.Model.forward  # of each call: model, images, latents
    monkeypatch.setattr(train.Model, "forward", lambda *call: calls.append(call) or forward(*call))
    flags = [*SHORT, "--out", tmp_path, "--pool_images", pool, "--images", images]
    assert main(train, *flags, "--stage1.images", 16) == 0
    assert 0.75 * pool < len({x.numpy().tobytes() for call in calls for x in call[1]}) <= pool
    for model, x0, z0, _ in calls:  # z0 was kept as float16
        torch.testing.assert_close(z0, model.vqgan.encode(x0), atol=1e-3, rtol=1e-3)
    assert [row["images"] for row in rows(tmp_path, "of")] == [*fits, images]
    assert kept(tmp_path, "seen")[2] == images

@pytest.mark.parametrize("flags, name, value", [
    ("celeba --preset paper", "batch", 64), ("celeba --preset paper --batch 7", "batch", 7),
    ("shapes3d --preset paper", "unet.base", 64), ("shapes3d", "preset", "laptop"),
    ("cars3d --preset paper", "fit_every", 5)])
def test_flag_beats_dataset_beats_preset_beats_default_and_all_fit_but_a_batch_for_five_processes(
        flags, name, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "--device", "cpu", "--dataset", *flags.split()])
    cfg, _, _ = train.parse()
    train.check_settings(cfg, world=1)
    assert cfg[name] == value
    with pytest.raises(data.UserError, match="--batch.*: found .*, expected a multiple of 5"):
        train.check_settings(cfg, world=5)

@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e30", str(10 ** 30)])
def test_every_number_of_a_flag_runs_or_is_refused(value, main, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shortest = ("--stage1.images 8 --stage1.batch 8 --images 8 --batch 8 --fit_images 20 "
                "--ddim_steps 1 --dyga.k_max 4").split()  # one step of each stage
    settings, ran = vars(train.build_parser().parse_args([])), {}
    for name in [name for name in settings if type(settings[name]) in (int, float, list)]:
        code = main(train, *SHORT, *shortest, f"--{name}={value}", "--out", name)
        line = capsys.readouterr().err
        refused = code == 2 and line.count("\n") == 1 and f"--{name}" in line
        assert code == 0 or refused and not Path(name).exists(), line
        ran[name] = not refused
    # 0 switches it off, or is a value like others.
    assert len(ran) == 50 and (sum(ran.values()) > 15 if value == "0" else not any(ran.values()))

# Where "run" is a finished run.
@pytest.mark.parametrize("flags, words", [
    ("--preset huge", ["huge", *train.PRESETS]), ("--dataset none", ["none", *data.DATASETS]),
    ("--dataset cars3d", ["nips2015-analogy-data"]), (f"--out {__file__}", ["exists"]),
    ("--resume", ["ckpt.pt", "No such file"]), ("--device cuda:99", ["cuda:99", "cpu"]),
    ("--unet.heads 3", ["--unet.base", "16", "multiple of 12"]),
    ("--vqgan.patch 3", ["--vqgan.patch", "64", "a multiple of 12"]),
    ("--unet.multipliers 1 1 1 1 1", ["--unet.multipliers", "multiple of 128"]),
    ("--extractor.channels 4 4 4 4 4 4", ["--extractor.channels", "halvings"]),
    ("--out run", ["add --resume"]),
    *((f"--out run --resume {flag}", [flag.split()[0].replace("no-", ""), f"began with {held};"])
      for flag, held in [("--images 640", 320), ("--seed 1", 0), ("--preset laptop", "paper"),
                         ("--vary shape", ""), ("--unet.multipliers 1 4", [1, 2]),
                         ("--no-unet.self_attention", True)])])
def test_mistakes_and_contradictions_to_a_run_end_in_one_line_exit_code_2_and_nothing_written(
        flags, words, finished, tmp_path, main, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], "run")
    files = {*tmp_path.rglob("*")}
    before = Path("run/ckpt.pt").read_bytes()
    begun = ["--dataset", "shapes3d"] if "--resume" in flags else TINY
    assert main(train, *begun, *flags.split()) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and all(word in line for word in words), line
    assert {*tmp_path.rglob("*")} == files and Path("run/ckpt.pt").read_bytes() == before

def test_components_never_import_each_other():
    parts = {"data", "vqgan", "unet", "extractor", "dyga"}
    for name in parts:
        source = Path(train.__file__).with_name(f"{name}.py").read_text()
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE))
        assert "torch" in imported and not imported & (parts | {"train", "evaluate"}), name

@torch.no_grad()
def test_unmixing_turns_the_kept_scalars_of_both_models_alike_and_keeps_mean_and_deviation():
    torch.manual_seed(0)
    nets = [train.Extractor(n_units=4, channels=(4, 4), hidden=(8,), shrink=16).eval()]
    nets.append(copy.deepcopy(nets[0]))
    nets[0].kept[1] = nets[1].kept[1] = False
    images = torch.randint(256, (600, 3, 64, 64)).byte()
    turns = []
    run = SimpleNamespace(
        world=1, fit_idx=torch.arange(600), log=lambda **row: turns.append(row["turn"]),
        ds=SimpleNamespace(images=images.__getitem__),
        model=SimpleNamespace(extractor=nets[0]), average=SimpleNamespace(extractor=nets[1]))
    before = train.scalars_of(run)
    train.unmix_units(run)
    after = train.scalars_of(run)
    assert len(turns[0]) == 3 and not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after.mean(0), before.mean(0), atol=1e-3)
    assert torch.allclose(after.std(0), before.std(0), rtol=1e-2)
    assert same(*(net.to_scalars[-1].state_dict() for net in nets))
