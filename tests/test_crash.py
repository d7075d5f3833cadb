"""Facts about runs that go wrong: killed, out of disk, damaged checkpoints, not finite; and runs of
two processes. A run is a fork of this process, which has torch and the images in memory already: a
short course then takes a few seconds, and a kill is a real one.
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

resource = pytest.importorskip("resource")  # Windows has none, nor fork and SIGKILL
KILL = signal.SIGKILL
SMALL = ("--dataset shapes3d --preset tiny --device cpu --fit_images 100 --ddim_steps 1 "
         "--dyga.k_max 8 --dyga.max_iter 3").split()
# Three steps of stage 1, four of stage 2, a fit after every second one; both optimisers.
SHORT = SMALL + "--stage1.images 48 --images 128 --pool_images 64 --optimizer muon".split()


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
    """What a run printed."""
    return Path(f"{out}-{rank}.txt").read_text()


def at_call(owner, name, number, action):
    """A prepare(): the number-th call of owner.name begins with a signal, or action(arguments)."""
    def counted(*args, **kwargs):
        if next(calls) == number:
            action(*args, **kwargs) if callable(action) else signal.raise_signal(action)
        return function(*args, **kwargs)

    function, calls = getattr(owner, name), itertools.count(1)
    return lambda: setattr(owner, name, counted)  # in the fork only


def die_writing_a_checkpoint(descriptor):
    os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
    signal.raise_signal(KILL)


def die_writing_the_log(run, **row):
    run.log_path.write_text(run.log_path.read_text() + '{"stage": 2, "ima')
    signal.raise_signal(KILL)


def rows(out):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row | {"minutes": 0} for row in found]


def left(out):
    """What a run leaves: weights, averages, anchors, optimisers, place; settings; log. Not what the
    clock decides."""
    ckpt = train.read_checkpoint(out / "ckpt.pt") | {"minutes": 0, "log_bytes": 0}
    return ckpt, ckpt.pop("config") | {"out": "", "resume": 0}, rows(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(out, *SHORT)) == 0, said(out)
    return out


# Before which call what happens; how the run ends, what it says; stage and images in what is left.
@pytest.mark.parametrize("moment, code, words, place", [
    ((train, "stage1_losses", 2, KILL), -KILL, "", (1, 0)),
    ((os, "fsync", 6, die_writing_a_checkpoint), -KILL, "", (2, 32)),
    ((train.Run, "log", 6, die_writing_the_log), -KILL, "", (2, 32)),
    # While the pool is encoded; in a step, which is finished.
    ((train.VQGAN, "encode", 3, signal.SIGINT), 130, "signal 2; .* and --resume", (2, 0)),
    ((train, "fit_anchors", 1, signal.SIGTERM), 130, "signal 15; .* and --resume", (2, 64)),
    ((torch, "save", 6, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, -1))), 2,
     "error: .*cannot be written.*File too large", (2, 32)),
    ((train, "diffusion_loss", 3, lambda *inputs: inputs[2].register_hook(lambda x: x * math.nan)),
     2, "error: stage 2, image 96.*'grad_norm': nan.* --lr .*ckpt.pt", (2, 64)),
    ((train.Model, "units", 1, lambda model, _: model.extractor.to_scalars[-1].bias.fill_(
        math.nan)), 2, "error: units are not finite.*--lr", (2, 32))],
    ids="stage1 checkpoint log SIGINT SIGTERM disk nan-gradient nan-units".split())
def test_a_run_killed_stopped_out_of_disk_or_not_finite_resumes_and_ends_like_one_that_was_not(
        moment, code, words, place, whole, tmp_path):
    out, files = tmp_path / "run", {"ckpt.pt", "log.jsonl"}
    assert end(start(out, *SHORT, prepare=at_call(*moment))) == code, said(out)
    assert re.search(words, said(out)) and said(out).count("error: ") == (code == 2)
    ckpt = train.read_checkpoint(out / "ckpt.pt")
    assert (ckpt["stage"], ckpt["seen"][2]) == place
    assert code < 0 or set(os.listdir(out)) == files
    assert end(start(out, *SHORT, "--resume")) == 0, said(out)
    (ours, *settings), (theirs, *others) = left(out), left(whole)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # bit for bit
    assert settings == others and ours["average"]["dyga.mask"].any()
    assert set(os.listdir(out)) == files  # nothing half-written


def test_a_folder_of_any_name_is_refused_while_a_run_writes_there_and_taken_when_it_died(tmp_path):
    out = Path(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9"))  # no terminal can show this
    out.mkdir()
    held = train.lock(out / "log.jsonl")
    (out / ".123-ckpt.pt").write_text("what the first run is writing")
    assert end(start(out, *SHORT)) == 2
    assert said(out).count("\n") == 1 and "another run writes there" in said(out)
    assert (out / ".123-ckpt.pt").exists()
    held.close()  # as when its process ends
    assert end(start(out, *SHORT, "--stage1_only")) == 0, said(out)


def test_a_damaged_or_foreign_file_is_refused_or_as_it_was_and_no_code_in_it_runs(tmp_path):
    path, trap, draw = tmp_path / "ckpt.pt", tmp_path / "executed", random.Random(0)
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0))

    def saved(config, number=train.FORMAT, **how):
        file = io.BytesIO()
        torch.save({"format": number, "config": config, "model": weights}, file, **how)
        return file.getvalue()

    def refused(content):
        """The one line that refuses a file of this content; "" if it is read, as it was."""
        path.write_bytes(content)
        try:
            found = train.read_checkpoint(path)
        except data.UserError as error:
            assert "\n" not in str(error) and f"{path}: " in str(error) and "expected" in str(error)
            return str(error)
        assert torch.equal(found["model"], weights) and found["config"] == settings
        return ""

    settings = train.default_settings()
    raw = saved(settings)
    hostile = type("Hostile", (), {"__reduce__": lambda _: (os.system, (f"touch {trap}",))})()
    for content in [b"", b"hello\n", bytes(range(256)) * 40, pickle.dumps(hostile),
                    saved(hostile),  # a valid zip, all checksums right
                    saved(hostile, _use_new_zipfile_serialization=False),
                    *(raw[:n] for n in range(0, len(raw), len(raw) // 40))]:
        assert "damaged" in refused(content) and not trap.exists()
    for number in (train.FORMAT - 1, None):
        assert f"format {train.FORMAT}" in refused(saved(settings, number))
    places = [raw.index(weights.numpy().tobytes()) + 100, *draw.choices(range(len(raw)), k=100)]
    lines = []
    for place in places:  # flip a bit: in a weight, or in padding, or in a date
        bad = bytearray(raw)
        bad[place] ^= 1 << draw.randrange(8)
        lines.append(refused(bad))
    assert lines[0] and lines.count("") < 50 and refused(raw) == ""


@pytest.mark.parametrize("name, wrong", [("stage", "two"), ("optimizer 0", None), ("model", {})])
def test_a_checkpoint_with_a_wrong_part_is_refused_in_one_line(
        name, wrong, whole, tmp_path, main, capsys):
    ckpt = train.read_checkpoint(whole / "ckpt.pt")
    torch.save(ckpt | {name: wrong}, tmp_path / "ckpt.pt")
    assert main(train, "--out", tmp_path, "--resume") == 2
    assert re.fullmatch("error: .*not as this train.py wrote it.*\n", capsys.readouterr().err)


def end_of_two(out, *flags, second=lambda: None):
    """Exit codes of a run of two processes, the second one after second()."""
    port = str(random.randrange(20_000, 30_000))  # no program is given one of these by chance
    meeting = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                   TORCHELASTIC_RUN_ID="test")  # what torchrun sets
    both = [start(out, *flags, prepare=prepare, RANK=rank, LOCAL_RANK=rank, **meeting)
            for rank, prepare in (("0", lambda: None), ("1", second))]
    return [end(process) for process in both]


def test_two_processes_learn_as_one_does_one_of_them_writes_and_none_waits_for_one_that_dies(
        tmp_path):
    flags = SMALL + "--stage1.images 16 --images 1280 --pool_images 640".split()
    assert end_of_two(tmp_path / "two", *flags) == [0, 0], said(tmp_path / "two")
    assert said(tmp_path / "two", rank=1) == ""  # one process speaks
    assert end(start(tmp_path / "one", *flags)) == 0, said(tmp_path / "one")
    one, two = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert [(row["images"], row["mean_delta"] > 0) for row in one] == [
        (row["images"], row["mean_delta"] > 0) for row in two]
    for part in (slice(0, 10), slice(30, 40)):  # another draw of images and noise, the same fall
        ours, theirs = (sum(row["loss"] for row in found[part]) / 10 for found in (one, two))
        assert theirs == pytest.approx(ours, rel=0.1)

    dies = at_call(train, "diffusion_loss", 2, KILL)
    assert end_of_two(tmp_path / "run", *SHORT, second=dies) == [1, -KILL]
    assert train.read_checkpoint(tmp_path / "run" / "ckpt.pt")["seen"][2] == 32
