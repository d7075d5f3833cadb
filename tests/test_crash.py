"""Facts about runs that go wrong: killed, out of disk, damaged checkpoints, numbers that are not finite; and runs of
more than one process.

A run is a fork of this process, which has torch and the rendered images in memory already: a short course then takes a
few seconds, and a kill is a real one. SLOW=1 adds the kills at 20 random moments.
"""

import io
import json
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import pytest
import torch

import data
import train

ROOT = Path(train.__file__).parent
SMALL = ["--dataset", "shapes3d", "--preset", "tiny", "--device", "cpu", "--fit_images", "100", "--ddim_steps", "1",
         "--dyga.k_max", "8", "--dyga.max_iter", "3"]
# Three steps of stage 1, four of stage 2, a fit after every second one.
SHORT = [*SMALL, "--stage1_images", "48", "--images", "128", "--epoch_images", "64"]


def start(out, *flags, prepare=lambda: None, **environment):
    """Run train.py with these flags in a process of its own, after prepare(); returns its number at once."""
    # What is slow at first: a fork finds it done.
    data.weight_maps()
    torch.optim.Adam([torch.zeros(1)])
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        sys.argv = ["train.py", "--out", str(out), *map(str, flags)]
        sys.stdout = sys.stderr = open(f"{out}-{environment.get('RANK', 0)}.txt", "w", buffering=1)
        prepare()
        data.run(train.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without the test runner's own good-byes


def end(pid):
    """Wait for a run: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(out, rank=0):
    """What a run printed since it last drew its bar, as lines."""
    return Path(f"{out}-{rank}.txt").read_text().replace("\r", "\n").strip().splitlines()


def save_always():
    """A checkpoint after every step; no pictures, which nothing here looks at."""
    train.SAVE_MINUTES = -1
    train.Run.pictures = lambda self: None


def at_call(owner, name, number, action):
    """Let the number-th call of owner.name do action(*args) in place of the function; other calls are as ever."""
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
    return {} if name in ("/minutes", "/stage1_minutes", "/log_bytes") else {name: value}


def rows(out, clock=("minutes", "images_per_s", "fit_s")):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in found]


def assert_same_end(a, b):
    """Weights, averages, anchors, optimiser, random state, position and log are the same, bit for bit."""
    ours, theirs = (flat(train.read_checkpoint(out / "ckpt.pt")) for out in (a, b))
    assert ours.keys() == theirs.keys() and "/rng" in ours and "/average/dyga.anchors" in ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name], name
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(out, *SHORT, prepare=save_always)) == 0, said(out)
    return out


# ---- killed ----


def die_in_a_step_of_stage1():
    at_call(train.Run, "tally", 2, die)  # the weights have moved, and nothing says so yet


def die_in_a_fit():
    at_call(train.DyGA, "_filter", 1, die)


def die_writing_a_checkpoint():
    def half(state, f):
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[:whole.tell() // 2])
        f.flush()
        die()

    save = torch.save
    at_call(torch, "save", 6, half)


def die_writing_the_log():
    def half(run, stage, images, **row):
        run.log_path.write_text(run.log_path.read_text() + '{"stage": 2, "ima')
        die()

    at_call(train.Run, "log", 6, half)


@pytest.mark.parametrize("moment", [die_in_a_step_of_stage1, die_in_a_fit, die_writing_a_checkpoint,
                                    die_writing_the_log])
def test_a_killed_run_resumes_and_ends_like_one_that_was_never_killed(moment, whole, tmp_path):
    out = tmp_path / "run"
    assert end(start(out, *SHORT, prepare=lambda: (save_always(), moment()))) == -signal.SIGKILL, said(out)
    assert end(start(out, *SHORT, "--resume", prepare=save_always)) == 0, said(out)
    assert_same_end(whole, out)
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl"}  # no half-written file is left


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="set SLOW=1 for kills at 20 random moments")
def test_a_run_killed_at_20_random_moments_ends_like_one_that_was_never_killed(whole, tmp_path):
    out = tmp_path / "timed"
    began = time.monotonic()
    assert end(start(out, *SHORT, prepare=save_always)) == 0
    longest, draw, kills = time.monotonic() - began, random.Random(0), 0
    while kills < 20:
        out = tmp_path / f"{draw.random()}"
        pid = start(out, *SHORT, prepare=save_always)
        time.sleep(draw.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        kills += end(pid) == -signal.SIGKILL  # else it was faster than we thought; resuming it must be harmless too
        resume = ["--resume"] if (out / "ckpt.pt").exists() else []  # killed before the first checkpoint: start again
        kept = train.read_checkpoint(out / "ckpt.pt") if resume else {}
        print(f"{kills} kills, resumes at stage {kept.get('stage')}, image {kept.get('images_seen')}")
        assert end(start(out, *SHORT, *resume, prepare=save_always)) == 0, said(out)
        assert_same_end(whole, out)


def test_a_signal_while_the_pool_is_encoded_stops_the_run_before_its_first_step(whole, tmp_path):
    def send(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return encode(*args)

    encode, out = train.VQGAN.encode, tmp_path / "run"

    def prepare():
        train.Run.pictures = lambda run: None
        at_call(train.VQGAN, "encode", 2, send)  # the first call only tries whether the settings fit together

    assert end(start(out, *SHORT, prepare=prepare)) == 130
    kept = train.read_checkpoint(out / "ckpt.pt")
    assert (kept["stage"], kept["images_seen"]) == (2, 0)
    assert end(start(out, *SHORT, "--resume", prepare=save_always)) == 0, said(out)
    assert_same_end(whole, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_makes_the_run_save_say_how_to_resume_and_leave(number, whole, tmp_path):
    def send(run, *args, **kwargs):
        os.kill(os.getpid(), number)
        return fit(run, *args, **kwargs)

    fit, out = train.Run.fit_anchors, tmp_path / "run"

    def prepare():
        train.Run.pictures = lambda run: None
        at_call(train.Run, "fit_anchors", 1, send)

    assert end(start(out, *SHORT, prepare=prepare)) == 130
    assert said(out)[-1] == f"stopped by {number.name}; go on with the same command and --resume"
    assert train.read_checkpoint(out / "ckpt.pt")["images_seen"] == 64  # the step in which it came is finished
    if number == signal.SIGTERM:
        assert end(start(out, *SHORT, "--resume", prepare=save_always)) == 0, said(out)
        assert_same_end(whole, out)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before_it(whole, tmp_path):
    def no_room(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))  # bytes in one file
        return save(*args)

    save, out = torch.save, tmp_path / "run"
    assert end(start(out, *SHORT, prepare=lambda: (save_always(), at_call(torch, "save", 5, no_room)))) == 2
    assert "cannot be written" in said(out)[-1] and "File too large" in said(out)[-1], said(out)
    assert train.read_checkpoint(out / "ckpt.pt")["images_seen"] == 32
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "log.jsonl"}
    assert end(start(out, *SHORT, "--resume", prepare=save_always)) == 0, said(out)
    assert_same_end(whole, out)


# ---- damaged checkpoints ----


@pytest.fixture
def small(tmp_path):
    """A small file like a checkpoint, and what it holds."""
    draw = torch.Generator().manual_seed(0)
    state = {"format": train.FORMAT, "config": {"lr": 0.1}, "model": {"w": torch.randn(200, generator=draw)}}
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


def test_torch_itself_does_not_notice_a_flipped_bit_in_a_weight(small):
    path, state = small
    raw = bytearray(path.read_bytes())
    raw[raw.index(state["model"]["w"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(raw)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["w"], state["model"]["w"])
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
            assert torch.equal(found["model"].pop("w"), state["model"]["w"])
            assert found == {"format": train.FORMAT, "config": {"lr": 0.1}, "model": {}}
    assert harmless < 50


def test_a_file_cut_short_anywhere_is_refused(small):
    raw = small[0].read_bytes()
    for length in range(0, len(raw), len(raw) // 40):
        small[0].write_bytes(raw[:length])
        assert "damaged" in refused(small[0])


@pytest.mark.parametrize("change", [{"format": train.FORMAT - 1}, {"format": None}, {"config": 3}])
def test_another_format_is_refused(change, small):
    torch.save(small[1] | change, small[0])
    line = refused(small[0])
    assert f"not a checkpoint of format {train.FORMAT}" in line and "--released" in line


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle", "inside a valid zip"])
def test_code_in_a_file_is_not_executed(kind, small):
    path, trap = small[0], small[0].with_name("executed")

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {trap}",)

    if kind in ("torch", "old torch"):
        torch.save({"format": train.FORMAT, "config": Hostile()}, path, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    else:  # the pickle of a good checkpoint exchanged, all checksums right
        with zipfile.ZipFile(path) as good:
            parts = {name: good.read(name) for name in good.namelist()}
        with zipfile.ZipFile(path, "w") as bad:
            for name, content in parts.items():
                bad.writestr(name, pickle.dumps(Hostile(), 2) if name.endswith("data.pkl") else content)
    assert refused(path) and not trap.exists()


@pytest.mark.parametrize("change", [
    lambda ckpt: ckpt.pop("model"), lambda ckpt: ckpt.update(stage="two"), lambda ckpt: ckpt["config"].pop("lr"),
    lambda ckpt: ckpt.update(training=[]), lambda ckpt: ckpt.update(rng=torch.zeros(3)),
    lambda ckpt: ckpt["model"].update({"unet.conv_in.weight": torch.zeros(2)})],
    ids=["no model", "stage two", "no lr", "no optimiser", "no random state", "other shape"])
def test_resuming_a_checkpoint_with_a_wrong_part_ends_in_one_line_and_exit_code_2(change, whole, tmp_path):
    ckpt = train.read_checkpoint(whole / "ckpt.pt")
    change(ckpt)
    (tmp_path / "run").mkdir()
    torch.save(ckpt, tmp_path / "run" / "ckpt.pt")
    assert end(start(tmp_path / "run", *SHORT, "--resume")) == 2
    assert len(said(tmp_path / "run")) == 1 and said(tmp_path / "run")[0].startswith("error: ")


# ---- numbers ----


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_step_stage_and_checkpoint(tmp_path):
    def steep(unet, z0, context, *args):
        return loss(unet, z0, context, *args) + (0 * context.sum()).sqrt()  # adds 0, whose slope is infinite

    loss, out = train.diffusion_loss, tmp_path / "run"
    assert end(start(out, *SHORT, prepare=lambda: (save_always(), at_call(train, "diffusion_loss", 2, steep)))) == 2
    line = said(out)[-1]
    for words in ("grad_norm of stage 2 is not finite at step 2 (image 64)", str(out / "ckpt.pt"), "lower --lr"):
        assert words in line
    kept = train.read_checkpoint(out / "ckpt.pt")
    assert kept["images_seen"] == 32 and all(w.isfinite().all() for w in kept["model"].values())


def test_anchors_that_cannot_be_fitted_leave_the_epoch_unaligned_and_are_counted(tmp_path):
    def fail(*args):
        raise ValueError("as this test wants")

    out = tmp_path / "run"
    flags = [*SHORT, "--images", "192"]
    assert end(start(out, *flags, prepare=lambda: (save_always(), at_call(train.DyGA, "_filter", 2, fail)))) == 0
    assert "no anchors at image 128 (as this test wants): unaligned until the next fit" in said(out)
    fits = [row for row in rows(out) if "anchors" in row]
    assert [row["failed_fits"] for row in fits] == [0, 1, 1, 1]
    assert sum(fits[1]["anchors"]) == 0 and sum(fits[2]["anchors"]) > 0
    deltas = {row["images"]: row["mean_delta"] for row in rows(out) if "loss" in row}
    # Aligned after the first fit, not after the second, which failed.
    assert [deltas[image] > 0 for image in (64, 96, 128, 160, 192)] == [False, True, True, False, False]


# ---- many processes ----


def test_two_processes_of_torchrun_train_like_one(tmp_path):
    # 20 steps with all that is random (times, noise, dropout, skip dropout), BatchNorm, and a fit of anchors halfway.
    # One anchor a unit, its mean: how many there are is a decision, which rounding in the last digit can tip.
    flags = [*SMALL, "--stage1_images", "16", "--images", "640", "--epoch_images", "320", "--dyga.k_init", "1",
             "--dyga.k_max", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.run([*command, str(ROOT / "train.py"), "--out", str(tmp_path / "two"), *flags], text=True,
                         capture_output=True, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("preset tiny") == 1  # one process speaks
    assert end(start(tmp_path / "one", *flags)) == 0, said(tmp_path / "one")
    ours, theirs = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(ours) == len(theirs) and sum("loss" in row for row in ours) == 20
    assert [row["mean_delta"] > 0 for row in ours if "loss" in row] == 10 * [False] + 10 * [True]
    for a, b in zip(ours, theirs):
        for key in ("loss", "mean_delta", "reconstruction_psnr"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), abs=1e-4, rel=0)
    # The random numbers have not parted either: one process can go on with what two have begun.
    one, both = (train.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    assert torch.equal(one["rng"], both["rng"])
    norm = "extractor.cnn.1.running_var"
    torch.testing.assert_close(one["model"][norm], both["model"][norm], atol=1e-4, rtol=1e-3)


def start_together(out, *flags, prepares):
    """A run of several processes, one for each prepare(): their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": str(len(prepares)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "TORCHELASTIC_RUN_ID": "test"}  # what torchrun sets
    return [start(out, *flags, prepare=prepare, RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            for rank, prepare in enumerate(prepares)]


def test_a_process_that_dies_ends_the_others_with_an_error(tmp_path):
    def second():
        at_call(train.Run, "tally", 5, die)  # the second step of stage 2

    pids = start_together(tmp_path / "run", *SHORT, prepares=[save_always, second])
    assert end(pids[1]) == -signal.SIGKILL
    assert end(pids[0]) == 1, said(tmp_path / "run")  # and does not wait for ever
    assert train.read_checkpoint(tmp_path / "run" / "ckpt.pt")["images_seen"] == 32


def test_a_signal_to_one_of_four_processes_stops_all_after_the_same_step(tmp_path):
    def last():
        def send(run, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

        at_call(train.Run, "tally", 5, send)  # the second step of stage 2

    out = tmp_path / "run"
    pids = start_together(out, *SHORT, prepares=[save_always, save_always, save_always, last])
    assert [end(pid) for pid in pids] == 4 * [130], said(out)
    assert train.read_checkpoint(out / "ckpt.pt")["images_seen"] == 64
    # What four began, two can go on with.
    pids = start_together(out, *SHORT, "--resume", prepares=2 * [save_always])
    assert [end(pid) for pid in pids] == [0, 0], said(out)
    assert train.read_checkpoint(out / "ckpt.pt")["finished"]


def test_minutes_ends_all_processes_after_the_same_step(tmp_path):
    pids = start_together(tmp_path / "run", *SMALL, "--minutes", "0.1", prepares=2 * [save_always])
    assert [end(pid) for pid in pids] == [0, 0], said(tmp_path / "run")
    assert train.read_checkpoint(tmp_path / "run" / "ckpt.pt")["finished"]


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 3)
    args = train.build_parser().parse_args([*SHORT, "--out", str(tmp_path)])
    args.device = torch.device("cpu")
    with pytest.raises(data.UserError, match="--batch 32 .* 3 processes"):
        train.Run(args, train.settings(args))
