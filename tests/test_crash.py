"""Facts about runs that go wrong: killed, out of disk, damaged checkpoints, numbers that are not
finite; and runs of more than one process.

A run is a fork of this process, which has torch and the rendered images in memory already: a short
course then takes a few seconds, and a kill is a real one. SLOW=1 adds kills at 20 random moments.
"""

import io
import json
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
import zipfile
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
# Three steps of stage 1, four of stage 2, a fit after every second one.
SHORT = [*SMALL, "--stage1.images", "48", "--images", "128", "--pool_images", "64"]


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


def error(out):
    """The error line that a run ended with (a bar's last state may follow it)."""
    lines = [line for line in said(out) if line.startswith("error: ")]
    assert len(lines) == 1, said(out)
    return lines[0]


def at_call(owner, name, number, action):
    """Let the number-th call of owner.name do action(*args) in place of the function."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        return (action if len(calls) == number else function)(*args, **kwargs)

    setattr(owner, name, counted)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def flat(value, name=""):
    """All that a checkpoint holds, as name -> value, without what the clock decides."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    clock = ("/minutes", "/log_bytes", "/config/out", "/config/resume")
    return {} if name in clock else {name: value}


def rows(out):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "minutes"} for row in found]


def assert_same_end(a, b):
    """Weights, averages, anchors, optimisers, position and log are the same, bit for bit."""
    ours, theirs = (flat(train.read_checkpoint(out / "ckpt.pt")) for out in (a, b))
    assert ours.keys() == theirs.keys() and "/average/dyga.anchors" in ours
    for name, value in ours.items():
        other = theirs[name]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(out, *SHORT)) == 0, said(out)
    return out


# ---- killed ----


def die_in_stage1():
    at_call(train, "stage1_losses", 2, die)


def die_in_a_fit():
    at_call(train.DyGA, "fit", 1, die)


def die_writing_a_checkpoint():
    def half(descriptor):
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()

    at_call(os, "fsync", 6, half)


def die_writing_the_log():
    def half(run, **row):
        run.log_path.write_text(run.log_path.read_text() + '{"stage": 2, "ima')
        die()

    at_call(train.Run, "log", 6, half)


@pytest.mark.parametrize("moment", [die_in_stage1, die_in_a_fit, die_writing_a_checkpoint,
                                    die_writing_the_log])
def test_a_killed_run_resumes_and_ends_like_one_that_was_never_killed(moment, whole, tmp_path):
    out = tmp_path / "run"
    assert end(start(out, *SHORT, prepare=moment)) == -signal.SIGKILL, said(out)
    assert end(start(out, *SHORT, "--resume")) == 0, said(out)
    assert_same_end(whole, out)
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl"}  # nothing half-written


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 kills at 20 random moments")
def test_a_run_killed_at_20_random_moments_ends_like_one_that_was_never_killed(whole, tmp_path):
    began = time.monotonic()
    assert end(start(tmp_path / "timed", *SHORT)) == 0
    longest, draw, kills = time.monotonic() - began, random.Random(0), 0
    while kills < 20:
        out = tmp_path / f"{draw.random()}"
        pid = start(out, *SHORT)
        time.sleep(draw.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        kills += end(pid) == -signal.SIGKILL  # else it had ended; to resume must be harmless too
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []
        assert end(start(out, *SHORT, *resume)) == 0, said(out)
        assert_same_end(whole, out)


def signalled(number, owner, name, call):
    """A prepare() that sends itself a signal before this call, then goes on with it."""
    def prepare():
        function = getattr(owner, name)

        def send(*args, **kwargs):
            os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        at_call(owner, name, call, send)

    return prepare


@pytest.mark.parametrize("number, owner, name, call, seen", [
    (signal.SIGINT, train.VQGAN, "encode", 3, 0),  # while the pool is encoded
    (signal.SIGTERM, train, "fit_anchors", 1, 64)])  # the step in which it came is finished
def test_a_signal_makes_the_run_save_say_how_to_resume_and_leave(
        number, owner, name, call, seen, whole, tmp_path):
    out = tmp_path / "run"
    prepare = signalled(number, owner, name, call)
    assert end(start(out, *SHORT, prepare=prepare)) == 130
    words = f"stopped by signal {int(number)}; go on with the same command and --resume"
    assert words in said(out)
    kept = train.read_checkpoint(out / "ckpt.pt")
    assert (kept["stage"], kept["seen"][2]) == (2, seen)
    assert end(start(out, *SHORT, "--resume")) == 0, said(out)
    assert_same_end(whole, out)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before_it(whole, tmp_path):
    def no_room(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        return save(*args)

    save, out = torch.save, tmp_path / "run"
    assert end(start(out, *SHORT, prepare=lambda: at_call(torch, "save", 6, no_room))) == 2
    assert "cannot be written" in error(out) and "File too large" in error(out)
    assert train.read_checkpoint(out / "ckpt.pt")["seen"][2] == 32
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl"}
    assert end(start(out, *SHORT, "--resume")) == 0, said(out)
    assert_same_end(whole, out)


def test_a_second_run_in_the_folder_of_a_living_one_is_refused_a_dead_ones_folder_is_not(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    held = train.lock(out / "log.jsonl")
    (out / ".123-ckpt.pt").write_text("what the first run is writing")
    assert end(start(out, *SHORT)) == 2
    assert len(said(out)) == 1 and "another run writes there" in said(out)[0]
    assert (out / ".123-ckpt.pt").exists()
    held.close()  # as when its process ends
    assert end(start(out, *SHORT)) == 0, said(out)


def test_a_folder_whose_name_the_terminal_cannot_show_is_written_to(tmp_path):
    out = Path(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9"))
    assert end(start(out, *SHORT, "--stage1_only")) == 0, said(out)
    assert (out / "ckpt.pt").exists()


# ---- damaged checkpoints ----


@pytest.fixture
def small(tmp_path):
    """A small file like a checkpoint, and what it holds."""
    generator = torch.Generator().manual_seed(0)
    state = {"format": train.FORMAT, "config": train.default_settings(), "stage": 2,
             "model": {"w": torch.randn(200, generator=generator)}}
    torch.save(state, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", state


def refused(path):
    """The one line that refuses this file; "" if it was read."""
    try:
        train.read_checkpoint(path)
    except data.UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and "expected" in str(error)
        return str(error)
    return ""


def test_a_flipped_bit_in_a_weight_which_torch_does_not_notice_is_refused(small):
    path, state = small
    raw = bytearray(path.read_bytes())
    raw[raw.index(state["model"]["w"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(raw)
    assert not torch.equal(torch.load(path)["model"]["w"], state["model"]["w"])
    assert "damaged" in refused(path)


def test_of_100_flipped_bits_each_is_refused_or_changes_nothing(small):
    path, state = small
    raw, draw, harmless = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        bad = bytearray(raw)
        bad[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        if not refused(path):  # the flip hit padding, or a date
            found, harmless = train.read_checkpoint(path), harmless + 1
            assert torch.equal(found["model"]["w"], state["model"]["w"])
            assert found["config"] == state["config"]
    assert harmless < 50


def test_files_cut_short_foreign_or_of_another_format_are_refused(small):
    path, state = small
    raw = path.read_bytes()
    for content in [b"", b"hello\n", bytes(range(256)) * 40,
                    *(raw[:n] for n in range(0, len(raw), len(raw) // 40))]:
        path.write_bytes(content)
        assert "damaged" in refused(path)
    for change in ({"format": train.FORMAT - 1}, {"format": None}):
        torch.save(state | change, path)
        assert f"format {train.FORMAT}" in refused(path) and "released" in refused(path)


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "inside a valid zip"])
def test_code_in_a_file_is_not_executed(kind, small):
    path, trap = small[0], small[0].with_name("executed")

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {trap}",)

    if kind in ("torch", "old torch"):
        hostile, new = {"format": train.FORMAT, "config": Hostile()}, kind == "torch"
        torch.save(hostile, path, _use_new_zipfile_serialization=new)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    else:  # the pickle of a good checkpoint exchanged, all checksums right
        with zipfile.ZipFile(path) as good:
            parts = {name: good.read(name) for name in good.namelist()}
        with zipfile.ZipFile(path, "w") as bad:
            for name, content in parts.items():
                code = name.endswith("data.pkl")
                bad.writestr(name, pickle.dumps(Hostile(), 2) if code else content)
    assert refused(path) and not trap.exists()


@pytest.mark.parametrize("change", [
    lambda ckpt: ckpt.pop("model"), lambda ckpt: ckpt.update(stage="two"),
    lambda ckpt: ckpt.pop("optimizer 0"),
    lambda ckpt: ckpt["model"].update({"unet.conv_in.weight": torch.zeros(2)})],
    ids=["no model", "stage two", "no optimiser", "other shape"])
def test_a_checkpoint_with_a_wrong_part_is_refused_in_one_line(change, whole, tmp_path):
    ckpt = train.read_checkpoint(whole / "ckpt.pt")
    change(ckpt)
    (tmp_path / "run").mkdir()
    torch.save(ckpt, tmp_path / "run" / "ckpt.pt")
    assert end(start(tmp_path / "run", *SHORT, "--resume")) == 2
    assert len(said(tmp_path / "run")) == 1 and said(tmp_path / "run")[0].startswith("error: ")


# ---- numbers ----


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_stage_and_checkpoint(tmp_path):
    def steep(unet, z0, c_tilde, *args):
        return loss(unet, z0, c_tilde, *args) + (0 * c_tilde.sum()).sqrt()  # slope: infinite

    loss, out = train.diffusion_loss, tmp_path / "run"
    assert end(start(out, *SHORT, prepare=lambda: at_call(train, "diffusion_loss", 3, steep))) == 2
    for words in ("stage 2, image 96", "'grad_norm': nan", str(out / "ckpt.pt"), "--lr"):
        assert words in error(out)
    kept = train.read_checkpoint(out / "ckpt.pt")
    assert kept["seen"][2] == 64 and all(w.isfinite().all() for w in kept["model"].values())


def test_units_that_are_not_finite_are_not_fitted_and_end_the_run_in_one_line(tmp_path):
    def bad(model, images):
        return units(model, images) * float("nan")

    units, out = train.Model.units, tmp_path / "run"
    assert end(start(out, *SHORT, prepare=lambda: at_call(train.Model, "units", 1, bad))) == 2
    assert "units are not finite" in error(out)


# ---- many processes (plain DistributedDataParallel): the same course, not the same numbers ----


def start_together(out, *flags, prepares):
    """A run of several processes, one for each prepare(): their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": str(len(prepares)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "TORCHELASTIC_RUN_ID": "test"}  # what torchrun sets
    return [start(out, *flags, prepare=prepare, RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            for rank, prepare in enumerate(prepares)]


def nothing():
    pass


def test_two_processes_learn_as_one_does_and_one_of_them_writes(tmp_path):
    flags = [*SMALL, "--stage1.images", "16", "--images", "1280", "--pool_images", "640"]
    pids = start_together(tmp_path / "two", *flags, prepares=[nothing, nothing])
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
    def second():
        at_call(train, "diffusion_loss", 2, die)

    pids = start_together(tmp_path / "run", *SHORT, prepares=[nothing, second])
    assert end(pids[1]) == -signal.SIGKILL
    assert end(pids[0]) == 1, said(tmp_path / "run")  # and does not wait for ever
    assert train.read_checkpoint(tmp_path / "run" / "ckpt.pt")["seen"][2] == 32


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(data.UserError, match="--batch.*: found 512, expected a multiple of 3"):
        train.check_settings(train.default_settings(), world=3)
