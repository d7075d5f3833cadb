"""Facts about runs that go wrong: killed, out of disk, damaged checkpoints, not finite; and runs of
two processes. A run is a fork of this process, whose torch and images it has in memory already: a
short course then takes a few seconds, and a kill is a real one."""
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
from conftest import TINY

resource = pytest.importorskip("resource")  # Windows has none, nor fork and SIGKILL
KILL = signal.SIGKILL
SMALL = TINY + ("--dataset shapes3d --device cpu --fit_images 100 --ddim_steps 1 "
                "--dyga.k_max 8 --dyga.max_iter 3").split()
# Three steps of stage 1, four of stage 2, a fit after every second one; both optimisers.
SHORT = SMALL + "--stage1.images 48 --images 128 --pool_images 64 --optimizer muon".split()

def run(out, *flags, processes=1, prepare=lambda: None):
    """train.py in so many processes, the last one after prepare() -> their exit codes, or minus the
    signals that killed them."""
    def course(rank):
        if processes > 1:  # what torchrun sets
            os.environ.update(
                WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = ["train.py", "--out", str(out), *flags]
        sys.stdout = sys.stderr = open(f"{out}-{rank}.txt", "w", buffering=1)
        # A row and a checkpoint after every step; no pictures, which nothing here looks at.
        train.LOG_STEPS, train.SAVE_MINUTES, train.Run.picture = 1, -1, lambda run: None
        if rank == processes - 1:
            prepare()
        data.run(train.main)

    data.weight_maps()  # what is slow at first: a fork finds it done
    torch.optim.Adam([torch.zeros(1)])
    port = str(random.randrange(20_000, 30_000))  # no program is given one of these by chance
    fork = multiprocessing.get_context("fork")
    forks = [fork.Process(target=course, args=[rank]) for rank in range(processes)]
    for process in forks:
        process.start()
    for process in forks:
        process.join()
    return [process.exitcode for process in forks]

def said(out, rank=0):
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

def left(out):
    """What a run leaves, but for what the clock decides: weights, averages, anchors, optimisers,
    place; settings; log."""
    ckpt = train.read_checkpoint(out / "ckpt.pt") | {"minutes": 0, "log_bytes": 0}
    log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    settings = ckpt.pop("config") | {"out": "", "resume": 0}
    return ckpt, settings, [row | {"minutes": 0} for row in log]

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out, *SHORT) == [0], said(out)
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
    ((train.Model, "units", 1, lambda model, _: model.extractor.to_scalars[-1].bias.data.fill_(
        math.nan)), 2, "error: units are not finite.*--lr", (2, 32))],
    ids="stage1 checkpoint log SIGINT SIGTERM disk nan-gradient nan-units".split())
def test_a_run_killed_stopped_out_of_disk_or_not_finite_resumes_and_ends_like_one_that_was_not(
        moment, code, words, place, whole, tmp_path):
    out, files = tmp_path / "run", {"ckpt.pt", "log.jsonl"}
    assert run(out, *SHORT, prepare=at_call(*moment)) == [code], said(out)
    assert re.search(words, said(out)) and said(out).count("error: ") == (code == 2)
    ckpt = train.read_checkpoint(out / "ckpt.pt")
    assert (ckpt["stage"], ckpt["seen"][2]) == place
    assert code < 0 or set(os.listdir(out)) == files
    assert run(out, *SHORT, "--resume") == [0], said(out)
    (ours, *settings), (theirs, *others) = left(out), left(whole)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # bit for bit
    assert settings == others and ours["average"]["dyga.mask"].any()
    assert set(os.listdir(out)) == files  # nothing half-written

def test_a_folder_is_refused_while_a_run_writes_there_and_taken_when_it_died(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    held = train.lock(out / "log.jsonl")
    (out / ".123-ckpt.pt").write_text("what the first run is writing")
    assert run(out, *SHORT) == [2]
    assert said(out).count("\n") == 1 and "another run writes there" in said(out)
    assert (out / ".123-ckpt.pt").exists()
    held.close()  # as when its process ends
    assert run(out, *SHORT, "--stage1_only") == [0], said(out)

def test_a_damaged_or_foreign_file_is_refused_or_as_it_was_and_no_code_in_it_runs(tmp_path):
    path, trap, draw = tmp_path / "ckpt.pt", tmp_path / "executed", random.Random(0)
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0))
    settings = vars(train.build_parser().parse_args([]))
    def saved(config, number=train.FORMAT, **how):
        torch.save({"format": number, "config": config, "model": weights}, path, **how)
        return path.read_bytes()
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

    raw = saved(settings)
    hostile = type("Hostile", (), {"__reduce__": lambda _: (os.system, (f"touch {trap}",))})()
    for content in [b"", b"hello\n", bytes(range(256)) * 40, pickle.dumps(hostile),
                    saved(hostile),  # a valid zip, all checksums right
                    saved(hostile, _use_new_zipfile_serialization=False),
                    *(raw[:n] for n in range(0, len(raw), len(raw) // 40))]:
        assert "cannot be read as a checkpoint" in refused(content) and not trap.exists()
    for number in (train.FORMAT - 1, None):
        assert f"format {number}, expected {train.FORMAT}" in refused(saved(settings, number))
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
    torch.save(train.read_checkpoint(whole / "ckpt.pt") | {name: wrong}, tmp_path / "ckpt.pt")
    assert main(train, "--out", tmp_path, "--resume") == 2
    assert re.fullmatch("error: .*not as this train.py wrote it.*\n", capsys.readouterr().err)

def test_two_processes_learn_as_one_does_one_of_them_writes_and_none_waits_for_one_that_dies(
        tmp_path):
    one, two, dying = (tmp_path / name for name in ("one", "two", "dying"))
    flags = SMALL + ("--stage1.images 16 --images 1280 --pool_images 640 "
                     "--select_at 0.5 --unmix_at 0.5").split()
    assert run(two, *flags, processes=2) == [0, 0], said(two)
    assert said(two, rank=1) == ""  # one process speaks
    assert run(one, *flags) == [0], said(one)
    logs = [[row for row in left(out)[-1] if "loss" in row] for out in (one, two)]
    ours, theirs = ([(row["images"], row["mean_delta"] > 0) for row in log] for log in logs)
    assert ours == theirs
    for part in (slice(0, 10), slice(30, 40)):  # another draw of images and noise, the same fall
        ours, theirs = (sum(row["loss"] for row in log[part]) / 10 for log in logs)
        assert theirs == pytest.approx(ours, rel=0.1)
    dies = at_call(train, "diffusion_loss", 2, KILL)
    assert run(dying, *SHORT, processes=2, prepare=dies) == [1, -KILL]
    assert train.read_checkpoint(dying / "ckpt.pt")["seen"][2] == 32
