"""Facts about runs that go wrong: killed, out of disk, damaged checkpoints, numbers that are not
finite; and runs of more than one process.

A run is a fork of this process, which has torch and the rendered images in memory already: a short
course then takes a few seconds, and a kill is a real one.
"""

import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import data
import train

if not hasattr(os, "fork"):
    pytest.skip("needs fork and SIGKILL, which Windows does not have", allow_module_level=True)
import resource  # noqa: E402  (Windows has none either)

SMALL = ["--dataset", "shapes3d", "--preset", "tiny", "--device", "cpu", "--fit_images", "100",
         "--ddim_steps", "1", "--dyga.k_max", "8", "--dyga.max_iter", "3"]
# Three steps of stage 1, four of stage 2, a fit after every second one; both optimisers.
SHORT = [*SMALL, "--stage1.images", "48", "--images", "128", "--pool_images", "64",
         "--optimizer", "muon"]


def start(out, *flags, prepare=lambda: None, **environment):
    """Run train.py in a process of its own, after prepare() -> the process, at once."""
    def course():
        os.environ.update(environment)
        sys.argv = ["train.py", "--out", str(out), *map(str, flags)]
        sys.stdout = sys.stderr = open(f"{out}-{environment.get('RANK', 0)}.txt", "w", buffering=1)
        # A row and a checkpoint after every step; no pictures, which nothing here looks at.
        train.LOG_STEPS, train.SAVE_MINUTES, train.Run.picture = 1, -1, lambda run: None
        prepare()
        data.run(train.main)

    data.weight_maps()  # what is slow at first: a fork finds it done
    torch.optim.Adam([torch.zeros(1)])
    process = multiprocessing.get_context("fork").Process(target=course)
    process.start()
    return process


def end(process):
    """Wait for a run: its exit code, or minus the signal that killed it."""
    process.join()
    return process.exitcode


def said(out, rank=0):
    """What a run printed, as lines."""
    return Path(f"{out}-{rank}.txt").read_text().replace("\r", "\n").strip().splitlines()


def at_call(owner, name, number, action):
    """A prepare(): the number-th call of owner.name begins with action(its arguments)."""
    def prepare():
        def counted(*args, **kwargs):
            if next(calls) == number:
                action(*args, **kwargs)
            return function(*args, **kwargs)

        function, calls = getattr(owner, name), itertools.count(1)
        setattr(owner, name, counted)
    return prepare


def send(number):
    return lambda *args, **kwargs: os.kill(os.getpid(), number)


die = send(signal.SIGKILL)


def die_writing_a_checkpoint(descriptor):
    os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def die_writing_the_log(run, **row):
    run.log_path.write_text(run.log_path.read_text() + '{"stage": 2, "ima')
    die()


def rows(out):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "minutes"} for row in found]


def assert_same_end(a, b):
    """Weights, averages, anchors, optimisers, place, settings, log are the same, bit for bit."""
    ours, theirs = (train.read_checkpoint(out / "ckpt.pt") for out in (a, b))
    for ckpt in (ours, theirs):
        del ckpt["minutes"], ckpt["log_bytes"]  # what the clock decides
    settings, others = (ckpt.pop("config") | {"out": "", "resume": 0} for ckpt in (ours, theirs))
    assert settings == others and rows(a) == rows(b) and ours["average"]["dyga.mask"].any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(out, *SHORT)) == 0, said(out)
    return out


# Before which call what happens; how the run ends, what it says; stage and images in what is left.
@pytest.mark.parametrize("moment, code, words, place", [
    ((train, "stage1_losses", 2, die), -signal.SIGKILL, "", (1, 0)),
    ((train.DyGA, "fit", 1, die), -signal.SIGKILL, "", (2, 32)),
    ((os, "fsync", 6, die_writing_a_checkpoint), -signal.SIGKILL, "", (2, 32)),
    ((train.Run, "log", 6, die_writing_the_log), -signal.SIGKILL, "", (2, 32)),
    ((train.VQGAN, "encode", 3, send(signal.SIGINT)), 130,  # while the pool is encoded
     "stopped by signal 2; go on with the same command and --resume", (2, 0)),
    ((train, "fit_anchors", 1, send(signal.SIGTERM)), 130,  # the step is finished
     "stopped by signal 15; go on with the same command and --resume", (2, 64)),
    ((torch, "save", 6, lambda *_: resource.setrlimit(
        resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))), 2,
     "error: .*cannot be written.*File too large", (2, 32)),
    ((train, "diffusion_loss", 3, lambda unet, z0, c_tilde, *_: c_tilde.register_hook(
        lambda gradient: gradient * math.nan)), 2,
     "error: stage 2, image 96.*'grad_norm': nan.* --lr .*ckpt.pt", (2, 64)),
    ((train.Model, "units", 1, lambda model, _: torch.nn.init.constant_(
        model.extractor.to_scalars[-1].bias, math.nan)), 2,
     "error: units are not finite.*--lr", (2, 32))],
    ids=["stage 1", "fit", "checkpoint", "log", "SIGINT", "SIGTERM", "disk full", "nan gradient",
         "nan units"])
def test_a_run_killed_stopped_out_of_disk_or_not_finite_resumes_and_ends_like_one_that_was_not(
        moment, code, words, place, whole, tmp_path):
    out = tmp_path / "run"
    assert end(start(out, *SHORT, prepare=at_call(*moment))) == code, said(out)
    assert re.search(words, "\n".join(said(out)))
    assert sum(line.startswith("error: ") for line in said(out)) == (code == 2)
    ckpt = train.read_checkpoint(out / "ckpt.pt")
    assert (ckpt["stage"], ckpt["seen"][2]) == place
    files = {"ckpt.pt", "log.jsonl"}
    assert code < 0 or {p.name for p in out.iterdir()} == files
    assert end(start(out, *SHORT, "--resume")) == 0, said(out)
    assert_same_end(whole, out)
    assert {p.name for p in out.iterdir()} == files  # nothing half-written


def test_a_folder_of_any_name_is_refused_while_a_run_writes_there_and_taken_when_it_died(tmp_path):
    out = Path(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9"))  # no terminal can show this
    out.mkdir()
    held = train.lock(out / "log.jsonl")
    (out / ".123-ckpt.pt").write_text("what the first run is writing")
    assert end(start(out, *SHORT)) == 2
    assert len(said(out)) == 1 and "another run writes there" in said(out)[0]
    assert (out / ".123-ckpt.pt").exists()
    held.close()  # as when its process ends
    assert end(start(out, *SHORT, "--stage1_only")) == 0, said(out)


def refused(path, content):
    """The one line that refuses a file of this content; "" if it is read."""
    path.write_bytes(content)
    try:
        train.read_checkpoint(path)
    except data.UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and "expected" in str(error)
        return str(error)
    return ""


def saved(config, number=train.FORMAT, **how):
    """A small file like a checkpoint, as bytes."""
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0))
    torch.save({"format": number, "config": config, "model": weights}, file := io.BytesIO(), **how)
    return file.getvalue()


def test_a_flipped_bit_in_a_weight_is_refused_and_100_others_are_or_change_nothing(tmp_path):
    path, raw, draw = tmp_path / "ckpt.pt", saved(train.default_settings()), random.Random(0)
    assert not refused(path, raw)
    whole, harmless = train.read_checkpoint(path), 0
    weight = raw.index(whole["model"].numpy().tobytes()) + 100
    for place in [weight] + [draw.randrange(len(raw)) for _ in range(100)]:
        bad = bytearray(raw)
        bad[place] ^= 1 << draw.randrange(8)
        if not refused(path, bad):  # the flip hit padding, or a date
            found, harmless = train.read_checkpoint(path), harmless + 1
            assert torch.equal(found.pop("model"), whole["model"]) and place != weight
            assert found == {"format": whole["format"], "config": whole["config"]}
    assert harmless < 50


def test_files_cut_short_foreign_with_code_or_of_another_format_are_refused_and_run_nothing(
        tmp_path):
    path, trap, raw = tmp_path / "ckpt.pt", tmp_path / "executed", saved({})
    hostile = type("Hostile", (), {"__reduce__": lambda _: (os.system, (f"touch {trap}",))})()
    for content in [b"", b"hello\n", bytes(range(256)) * 40, pickle.dumps(hostile),
                    saved(hostile),  # a valid zip, all checksums right
                    saved(hostile, _use_new_zipfile_serialization=False),
                    *(raw[:n] for n in range(0, len(raw), len(raw) // 40))]:
        assert "damaged" in refused(path, content) and not trap.exists()
    for number in (train.FORMAT - 1, None):
        line = refused(path, saved({}, number))
        assert f"format {train.FORMAT}" in line and "released" in line


@pytest.mark.parametrize("change", [
    lambda ckpt: ckpt.pop("model"), lambda ckpt: ckpt.update(stage="two"),
    lambda ckpt: ckpt.pop("optimizer 0"),
    lambda ckpt: ckpt["model"].update({"unet.conv_in.weight": torch.zeros(2)})],
    ids=["no model", "stage two", "no optimiser", "other shape"])
def test_a_checkpoint_with_a_wrong_part_is_refused_in_one_line(change, whole, tmp_path):
    ckpt, out = train.read_checkpoint(whole / "ckpt.pt"), tmp_path / "run"
    change(ckpt)
    out.mkdir()
    torch.save(ckpt, out / "ckpt.pt")
    assert end(start(out, *SHORT, "--resume")) == 2
    assert len(said(out)) == 1 and said(out)[0].startswith("error: ")


def start_together(out, *flags, second=lambda: None):
    """A run of two processes, the second one after second(): their numbers."""
    port = str(random.randrange(20_000, 30_000))  # no program is given one of these by chance
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "TORCHELASTIC_RUN_ID": "test"}  # what torchrun sets
    return [start(out, *flags, prepare=prepare, RANK=rank, LOCAL_RANK=rank, **meeting)
            for rank, prepare in (("0", lambda: None), ("1", second))]


def test_two_processes_learn_as_one_does_and_one_of_them_writes(tmp_path):
    flags = [*SMALL, "--stage1.images", "16", "--images", "1280", "--pool_images", "640"]
    pids = start_together(tmp_path / "two", *flags)
    assert [end(pid) for pid in pids] == [0, 0], said(tmp_path / "two")
    assert said(tmp_path / "two", rank=1) == []  # one process speaks
    assert end(start(tmp_path / "one", *flags)) == 0, said(tmp_path / "one")
    one, two = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert [row["images"] for row in one] == [row["images"] for row in two]
    assert [row["mean_delta"] > 0 for row in two] == [row["mean_delta"] > 0 for row in one]
    for part in (slice(0, 10), slice(30, 40)):  # another draw of images and noise, the same fall
        ours, theirs = (sum(row["loss"] for row in found[part]) / 10 for found in (one, two))
        assert theirs == pytest.approx(ours, rel=0.1)


def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path):
    dies = at_call(train, "diffusion_loss", 2, die)
    pids = start_together(tmp_path / "run", *SHORT, second=dies)
    assert end(pids[1]) == -signal.SIGKILL
    assert end(pids[0]) == 1, said(tmp_path / "run")  # and does not wait for ever
    assert train.read_checkpoint(tmp_path / "run" / "ckpt.pt")["seen"][2] == 32
