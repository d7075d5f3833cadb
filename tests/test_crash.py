"""Facts about runs that go wrong: killed, out of disk, damaged checkpoints, numbers that are not
finite; and runs of more than one process.

A run is a fork of this process, which has torch and the rendered images in memory already: a short
course then takes a few seconds, and a kill is a real one. SLOW=1 adds kills at 20 random moments.
"""

import json
import math
import os
import pickle
import random
import re
import signal
import socket
import sys
import time
import traceback
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
    """Run train.py in a process of its own, after prepare() -> its number, at once."""
    data.weight_maps()  # what is slow at first: a fork finds it done
    torch.optim.Adam([torch.zeros(1)])
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        sys.argv = ["train.py", "--out", str(out), *map(str, flags)]
        sys.stdout = sys.stderr = open(f"{out}-{environment.get('RANK', 0)}.txt", "w", buffering=1)
        # A row and a checkpoint after every step; no pictures, which nothing here looks at.
        train.LOG_STEPS, train.SAVE_MINUTES, train.Run.picture = 1, -1, lambda run: None
        prepare()
        data.run(train.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(code)  # without the test runner's own good-byes


def end(pid):
    """Wait for a run: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(out, rank=0):
    """What a run printed, as lines."""
    return Path(f"{out}-{rank}.txt").read_text().replace("\r", "\n").strip().splitlines()


def at_call(owner, name, number, action):
    """A prepare(): the number-th call of owner.name begins with action(its arguments)."""
    def prepare():
        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                action(*args, **kwargs)
            return function(*args, **kwargs)

        function, calls = getattr(owner, name), []
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


def fill_the_disk(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))


def rows(out):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "minutes"} for row in found]


def state(out):
    """What a checkpoint holds, without what the clock decides: settings, and all the rest."""
    ckpt = train.read_checkpoint(out / "ckpt.pt")
    rest = {name: held for name, held in ckpt.items() if name not in ("minutes", "log_bytes")}
    return rest.pop("config") | {"out": "", "resume": False}, rest


def assert_same_end(a, b):
    """Weights, averages, anchors, optimisers, place, settings, log are the same, bit for bit."""
    (settings, ours), (others, theirs) = state(a), state(b)
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
    ((torch, "save", 6, fill_the_disk), 2, "error: .*cannot be written.*File too large", (2, 32))],
    ids=["stage 1", "fit", "checkpoint", "log", "SIGINT", "SIGTERM", "disk full"])
def test_a_run_that_is_killed_stopped_or_out_of_disk_resumes_and_ends_like_one_that_was_not(
        moment, code, words, place, whole, tmp_path):
    out = tmp_path / "run"
    assert end(start(out, *SHORT, prepare=at_call(*moment))) == code, said(out)
    assert re.search(words, "\n".join(said(out)))
    ckpt = train.read_checkpoint(out / "ckpt.pt")
    assert (ckpt["stage"], ckpt["seen"][2]) == place
    files = {"ckpt.pt", "log.jsonl"}
    assert code < 0 or {p.name for p in out.iterdir()} == files
    assert end(start(out, *SHORT, "--resume")) == 0, said(out)
    assert_same_end(whole, out)
    assert {p.name for p in out.iterdir()} == files  # nothing half-written


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 kills at 20 random moments")
@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_a_random_moment_ends_like_one_that_was_never_killed(
        number, whole, tmp_path):
    out, longest = tmp_path / "run", 60 * train.read_checkpoint(whole / "ckpt.pt")["minutes"]
    pid = start(out, *SHORT)
    time.sleep(random.Random(number).uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    end(pid)  # if it had ended before, to resume must be harmless too
    resume = ["--resume"] if (out / "ckpt.pt").exists() else []
    assert end(start(out, *SHORT, *resume)) == 0, said(out)
    assert_same_end(whole, out)


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


@pytest.fixture
def small(tmp_path):
    """A small file like a checkpoint, and what it holds."""
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0))
    held = {"format": train.FORMAT, "config": train.default_settings(), "model": weights}
    torch.save(held, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", held


def refused(path):
    """The one line that refuses this file; "" if it was read."""
    try:
        train.read_checkpoint(path)
    except data.UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and "expected" in str(error)
        return str(error)
    return ""


def test_a_flipped_bit_in_a_weight_is_refused_and_100_others_are_or_change_nothing(small):
    path, state = small
    raw, draw, harmless = path.read_bytes(), random.Random(0), 0
    weight = raw.index(state["model"].numpy().tobytes()) + 100
    for place in [weight] + [draw.randrange(len(raw)) for _ in range(100)]:
        bad = bytearray(raw)
        bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        if place == weight:  # torch does not notice
            assert not torch.equal(torch.load(path)["model"], state["model"]) and refused(path)
        elif not refused(path):  # the flip hit padding, or a date
            found, harmless = train.read_checkpoint(path), harmless + 1
            assert torch.equal(found["model"], state["model"])
            assert found["config"] == state["config"]
    assert harmless < 50


def test_files_cut_short_foreign_or_of_another_format_are_refused(small):
    path, state = small
    raw = path.read_bytes()
    for content in [b"", b"hello\n", bytes(range(256)) * 40,
                    *(raw[:n] for n in range(0, len(raw), len(raw) // 40))]:
        path.write_bytes(content)
        assert "damaged" in refused(path)
    for version in (train.FORMAT - 1, None):
        torch.save(state | {"format": version}, path)
        assert f"format {train.FORMAT}" in refused(path) and "released" in refused(path)


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_code_in_a_file_is_not_executed(kind, small):
    path, trap = small[0], small[0].with_name("executed")
    hostile = type("Hostile", (), {"__reduce__": lambda _: (os.system, (f"touch {trap}",))})()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    else:  # a valid zip, all checksums right; or the format before it
        held = {"format": train.FORMAT, "config": hostile}
        torch.save(held, path, _use_new_zipfile_serialization=kind == "torch")
    assert refused(path) and not trap.exists()


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


def spoil_the_gradient(unet, z0, c_tilde, *rest):
    c_tilde.register_hook(lambda gradient: gradient * math.nan)


def spoil_the_units(model, images):
    torch.nn.init.constant_(model.extractor.to_scalars[-1].bias, math.nan)


@pytest.mark.parametrize("moment, seen, words", [
    ((train, "diffusion_loss", 3, spoil_the_gradient), 64,
     ["stage 2, image 96", "'grad_norm': nan", "ckpt.pt", "--lr"]),
    ((train.Model, "units", 1, spoil_the_units), 32, ["units are not finite", "--lr"])])
def test_numbers_that_are_not_finite_end_the_run_in_one_line_and_are_not_saved(
        moment, seen, words, tmp_path):
    out = tmp_path / "run"
    assert end(start(out, *SHORT, prepare=at_call(*moment))) == 2
    errors = [line for line in said(out) if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words)
    kept = train.read_checkpoint(out / "ckpt.pt")
    assert kept["seen"][2] == seen and all(w.isfinite().all() for w in kept["model"].values())


def start_together(out, *flags, second=lambda: None):
    """A run of two processes, the second one after second(): their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
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
