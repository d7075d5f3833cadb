"""The four official datasets, each as a small file in its true format: damage, interruptions, and the whole pipeline.

    python tests/test_sources.py 200   # 200 damaged versions of each file, about a minute; the test below makes 40
"""

import collections
import functools
import io
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402

# The factor sizes of the small versions; CelebA's number of faces.
SIZES = {"shapes3d": (2, 2, 2, 2, 2, 3), "cars3d": (4, 4, 4), "mpi3d_toy": (2, 2, 2, 2, 2, 2, 2), "celeba": (64,)}
FILES = {"shapes3d": "3dshapes.h5", "cars3d": "nips2015-analogy-data.tar.gz", "mpi3d_toy": "mpi3d_toy.npz",
         "celeba": "img_align_celeba.zip"}


def small_facts(name):
    """The entry of data.DATASETS, with fewer values per factor."""
    facts = data.DATASETS[name]
    if name == "celeba":
        return facts | dict(images=SIZES[name][0])
    return facts | dict(factors=dict(zip(facts["factors"], SIZES[name])), images=math.prod(SIZES[name]))


@pytest.fixture
def small(monkeypatch):
    """Make all four datasets small."""
    for name in SIZES:
        monkeypatch.setitem(data.DATASETS, name, small_facts(name))


def pictures(n, height=64, width=64):
    """n different smooth images, uint8 (n, height, width, 3)."""
    i, y, x = np.arange(n)[:, None, None], np.arange(height)[:, None], np.arange(width)
    return np.stack([37 * i + x + 0 * y, 11 * i + y + 0 * x, 5 * i + (x + y) // 2], -1).astype(np.uint8)


# ---- Writers: the files as they are published, but small. Keyword arguments make them wrong. ------------------------


def write_shapes3d(folder, images="images", shape=(64, 64), dtype=np.uint8, n=96, labels=True, columns=slice(None)):
    """3dshapes.h5: images in chunks under gzip, labels as factor VALUES."""
    grid = np.indices(SIZES["shapes3d"]).reshape(6, -1).T  # (96, 6)
    values = np.array([0.1, 0.1, 0.1, 0.07, 1.0, 4.3]) * grid + 0.75
    with h5py.File(folder / "3dshapes.h5", "w") as file:
        file.create_dataset(images, data=pictures(96, *shape)[:n].astype(dtype), chunks=(16, *shape, 3),
                            compression="gzip")
        if labels:
            file.create_dataset("labels", data=values[:n, columns], compression="gzip")


def write_car(path, car, key="im", dtype=np.uint8, axes=(0, 1, 2, 3, 4)):
    """One .mat file: im (128, 128, 3, azimuths, elevations)."""
    elevations, azimuths, cars = SIZES["cars3d"]
    index = np.arange(elevations * azimuths) * cars + car  # of each view in the row-major grid
    im = pictures(64, 128, 128)[index].reshape(elevations, azimuths, 128, 128, 3).transpose(2, 3, 4, 1, 0)
    scipy.io.savemat(path, {key: im.transpose(axes).astype(dtype)}, do_compression=True)


def write_cars3d(folder, cars=4, packed=True, **wrong):
    """The .tar.gz, or the folder cars that it unpacks to."""
    if not packed:
        (folder / "cars").mkdir()
        return [write_car(folder / "cars" / f"car_{car:03}_mesh.mat", car, **wrong) for car in range(cars)]
    with tarfile.open(folder / FILES["cars3d"], "w:gz") as archive:
        for car in range(cars):
            file = io.BytesIO()
            write_car(file, car, **wrong)
            entry = tarfile.TarInfo(f"data/cars/car_{car:03}_mesh.mat")
            entry.size = len(file.getvalue())
            archive.addfile(entry, io.BytesIO(file.getvalue()))


def write_mpi3d_toy(folder, save=np.savez, images="images", dtype=np.uint8, shape=(64, 64), n=128):
    """The .npz, its member stored or deflated."""
    save(folder / "mpi3d_toy.npz", **{images: pictures(128, *shape)[:n].astype(dtype)})


def write_celeba(folder, n=64, ending="txt", packed=True, size=(178, 218), values=("-1", "1"),
                 names="Bald Smiling Old"):
    """The .zip or its folder, and the attributes; every attribute is a bit of the face's number."""
    faces = {}
    for i, picture in enumerate(pictures(n, *size[::-1])):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG")
        faces[f"{i + 1:06}.jpg"] = file.getvalue()
    if packed:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for name, packed_face in faces.items():
                archive.writestr(f"img_align_celeba/{name}", packed_face)
    else:
        (folder / "img_align_celeba").mkdir()
        for name, packed_face in faces.items():
            (folder / "img_align_celeba" / name).write_bytes(packed_face)
    rows = [[name, *(values[i >> bit & 1] for bit in range(3))] for i, name in enumerate(faces)]
    head = [["image_id", *names.split()]] if ending == "csv" else [[str(n)], names.split()]
    lines = [("," if ending == "csv" else " ").join(row) for row in head + rows]
    (folder / f"list_attr_celeba.{ending}").write_text("\n".join(lines) + "\n")


WRITE = {"shapes3d": write_shapes3d, "cars3d": write_cars3d, "mpi3d_toy": write_mpi3d_toy, "celeba": write_celeba}


def pixels(dataset):
    """Every image of a dataset, uint8 (n, 64, 64, 3)."""
    return dataset.images(torch.arange(len(dataset))).permute(0, 2, 3, 1).numpy()


def command(module, *arguments):
    """The exit code of a script's main in this process, called as the command line would."""
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    try:
        data.run(module.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(autouse=True)
def keep(monkeypatch):
    """What command() changes is set back; the test runner keeps its signal handlers."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


# ---- Every source works ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_the_command_prints_file_count_and_factors_and_draws_the_grid(tmp_path, small, capsys, name):
    WRITE[name](tmp_path)
    assert command(data, "--dataset", name, "--data_dir", tmp_path, "--out", tmp_path / "grid.png") == 0
    said, bar = capsys.readouterr()
    assert f"{math.prod(SIZES[name])} images, official" in said and f"{name}-64x64.npy" in said
    factors = dict(Bald=2, Smiling=2, Old=2) if name == "celeba" else data.DATASETS[name]["factors"]
    assert all(f"{factor} {size}" in said for factor, size in factors.items())
    assert f"converting {FILES[name]}, once: 100%" in bar
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 15 * 64 and picture.height > len(factors) * 64
    # The second time there is nothing to convert.
    assert command(data, "--dataset", name, "--data_dir", tmp_path, "--out", tmp_path / "grid.png") == 0
    assert capsys.readouterr() == (said, "")


@pytest.mark.parametrize("packed, ending", [(True, "csv"), (False, "txt")])
def test_celeba_reads_a_zip_or_a_folder_and_both_kinds_of_list(tmp_path, small, packed, ending):
    write_celeba(tmp_path, packed=packed, ending=ending)
    dataset = data.load("celeba", tmp_path)
    assert dataset.factor_names == ["Bald", "Smiling", "Old"]
    assert dataset.factors(torch.tensor([0, 1, 6])).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1]]
    # The centre of each face is about the centre of the picture that was written (JPEG and shrinking are not exact).
    expected = pictures(64, 218, 178)[:, 109, 89].astype(int)
    assert np.median(np.abs(pixels(dataset)[:, 32, 32] - expected)) <= 3


FLAGS = {"shapes3d": [], "cars3d": ["--fit_every", "5"], "mpi3d_toy": [], "celeba": ["--batch", "64"]}


@pytest.mark.parametrize("name", SIZES)
def test_training_and_evaluation_run_on_it(tmp_path, small, capsys, name):
    WRITE[name](tmp_path)
    out, here = tmp_path / "run", ["--data_dir", tmp_path, "--device", "cpu"]
    assert command(train, "--dataset", name, "--preset", "tiny", "--out", out, *here, "--stage1_images", "32",
                   "--images", "320", "--epoch_images", "64", "--fit_images", "48", "--ddim_steps", "2", "--dyga.k_max",
                   "8", "--dyga.max_iter", "3", *FLAGS[name]) == 0
    fits = sum('"anchors"' in line for line in (out / "log.jsonl").read_text().splitlines())
    assert fits == (2 if name == "cars3d" else 6)       # 5 epochs, r = 5 or 1; and the last fit, of the average
    metric = "tad" if name == "celeba" else "modularity"
    assert command(evaluate, out / "ckpt.pt", *here, "--quick", "--only", f"{metric},figures") == 0
    assert {path.name for path in (out / "eval").iterdir()} >= {"metrics.json", "index.html", "units.png"}
    assert f"ours ({name}, official)" in capsys.readouterr().out


def test_r_is_5_on_cars3d_and_the_batch_64_on_celeba_in_the_paper_preset():
    found = {}
    for name in SIZES:
        args = train.build_parser().parse_args(["--dataset", name, "--preset", "paper"])
        args.device = torch.device("cpu")
        cfg = train.settings(args)
        found[name] = cfg["fit_every"], cfg["batch"]
    assert found == {"shapes3d": (1, 512), "cars3d": (5, 512), "mpi3d_toy": (1, 512), "celeba": (1, 64)}


# ---- Wrong files ----------------------------------------------------------------------------------------------------


def cut(name):
    """Write the file and cut off its last third."""
    def write(folder):
        WRITE[name](folder)
        path = folder / FILES[name]
        path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
    return write


def wrong(name, **arguments):
    return functools.partial(WRITE[name], **arguments)


def web_page(folder):
    """What a download that failed leaves."""
    (folder / "3dshapes.h5").write_text("404 not found")


def no_face(folder):
    write_celeba(folder, packed=False)
    (folder / "img_align_celeba" / "000002.jpg").unlink()


@pytest.mark.parametrize("name, write, words", [
    ("shapes3d", web_page, "signature"),
    ("shapes3d", cut("shapes3d"), "truncated"),
    ("shapes3d", wrong("shapes3d", images="pictures"), "images"),
    ("shapes3d", wrong("shapes3d", labels=False), "labels"),
    ("shapes3d", wrong("shapes3d", shape=(32, 32)), "96, 32, 32, 3"),
    ("shapes3d", wrong("shapes3d", dtype=np.float32), "float32"),
    ("shapes3d", wrong("shapes3d", n=48), "48, 64, 64, 3"),
    ("shapes3d", wrong("shapes3d", columns=[1, 2, 3, 4, 5, 0]), "row-major"),
    ("cars3d", cut("cars3d"), "end"),
    ("cars3d", wrong("cars3d", key="image"), "im"),
    ("cars3d", wrong("cars3d", axes=(0, 1, 3, 4, 2)), "128, 128, 4, 4, 3"),
    ("cars3d", wrong("cars3d", dtype=np.float64), "float64"),
    ("cars3d", wrong("cars3d", cars=3), "cars: found 3, expected 4"),
    ("mpi3d_toy", cut("mpi3d_toy"), "BadZipFile"),
    ("mpi3d_toy", wrong("mpi3d_toy", images="pictures"), "images.npy"),
    ("mpi3d_toy", wrong("mpi3d_toy", shape=(32, 32)), "128, 32, 32, 3"),
    ("mpi3d_toy", wrong("mpi3d_toy", dtype=np.int64), "int64"),
    ("mpi3d_toy", wrong("mpi3d_toy", n=127), "127, 64, 64, 3"),
    ("celeba", cut("celeba"), "BadZipFile"),
    ("celeba", no_face, "000002.jpg"),
    ("celeba", wrong("celeba", size=(64, 64)), r"jpg: size: found \(64, 64\)"),
    ("celeba", wrong("celeba", n=63), "found 63, expected 64"),
    ("celeba", wrong("celeba", values=("0", "1")), "attribute values"),
    ("celeba", wrong("celeba", names="Bald Smiling"), "words in a row"),
])
def test_a_wrong_file_is_one_line_leaves_nothing_and_the_next_run_works(tmp_path, small, name, write, words):
    write(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(data.UserError, match=words) as error:
        data.load(name, tmp_path, "official")
    assert "http" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before
    for path in tmp_path.glob("img_align_celeba/"):     # what is unpacked counts, and must go for the .zip to be read
        shutil.rmtree(path)
    WRITE[name](tmp_path)
    assert len(data.load(name, tmp_path, "official")) == math.prod(SIZES[name])


# ---- Trouble while converting: in a child process, which may be killed, or given limits -----------------------------


def child(f, *arguments, seconds=300):
    """f(*arguments) in a process that starts as a copy of this one; returns it, ended. A hang is a failure."""
    process = multiprocessing.get_context("fork").Process(target=f, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        pytest.fail(f"did not end within {seconds} s")
    return process


def data_command(name, folder, before=lambda: None):
    """In a child: `python data.py` with its errors in folder/../stderr; `before` sets limits."""
    sys.stderr = open(folder.parent / "stderr", "w", buffering=1)
    before()
    flags = ["--dataset", name, "--source", "official", "--data_dir", folder, "--out", folder / "grid.png"]
    sys.exit(command(data, *flags))


def last_line(folder):
    """What data_command wrote after its bar."""
    lines = (folder.parent / "stderr").read_text().replace("\r", "\n").split("\n")
    lines = [line for line in lines if line]            # the bar begins with a carriage return
    assert all("converting" in line for line in lines[:-1])
    return lines[-1]


@pytest.fixture
def folder(tmp_path):
    """An empty folder with room for other files beside it."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("name", SIZES)
def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(folder, small, name):
    WRITE[name](folder)
    before = sorted(os.listdir(folder))

    def limit():  # files may have 300,000 bytes: fewer than 25 images. Python ignores the signal, so write() fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    assert child(data_command, name, folder, limit).exitcode == 2
    assert f"{name}-64x64.npy" in last_line(folder) and "make room" in last_line(folder)
    assert sorted(os.listdir(folder)) == before
    assert len(data.load(name, folder, "official")) == math.prod(SIZES[name])


@pytest.mark.parametrize("name", SIZES)
def test_an_unreadable_folder_is_one_line(folder, small, name):
    WRITE[name](folder)
    folder.chmod(0)

    def nobody():  # to root every folder is readable
        if os.geteuid() == 0:
            os.setuid(65534)

    assert child(data_command, name, folder, nobody).exitcode == 2
    assert "ermission denied" in last_line(folder)
    folder.chmod(0o755)
    assert len(data.load(name, folder, "official")) == math.prod(SIZES[name])


@pytest.mark.parametrize("name", SIZES)
def test_a_killed_conversion_leaves_nothing_that_looks_complete(folder, small, monkeypatch, name):
    WRITE[name](folder)
    facts = data.DATASETS[name]

    def stalls(path, facts):                            # the first images, and then nothing more
        yield next(read(path, facts))[:10]
        (folder.parent / "halfway").touch()
        time.sleep(600)

    read = facts["read"]
    with monkeypatch.context() as patch:
        patch.setitem(data.DATASETS, name, facts | dict(read=stalls))
        process = multiprocessing.get_context("fork").Process(target=data.load, args=(name, folder, "official"))
        process.start()
        while not (folder.parent / "halfway").exists():
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
    (left,) = folder.glob(".*")                         # hidden, so nobody takes it for the converted file
    assert left.name == f".{process.pid}-{name}-64x64.npy" and not (folder / f"{name}-64x64.npy").exists()
    assert len(data.load(name, folder, "official")) == math.prod(SIZES[name])
    # Might another run be writing it? Only after an hour without a change is it deleted.
    assert left.exists()
    os.utime(left, (0, time.time() - 3601))
    (folder / f"{name}-64x64.npy").unlink()
    data.load(name, folder, "official")
    assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits all of a process's memory only on Linux")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_mpi3d_is_converted_in_less_memory_than_its_images_take(folder, method):
    n = 16_384                                          # 201 MB of images, 100 MB of memory
    factors = dict(zip(data.DATASETS["mpi3d_toy"]["factors"], (2, 2, 2, 2, 2, 16, 32)))
    with zipfile.ZipFile(folder / "mpi3d_toy.npz", "w", method, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            header = dict(descr="|u1", fortran_order=False, shape=(n, 64, 64, 3))
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(16):
                file.write(bytes(n // 16 * 64 * 64 * 3))

    # In a process of its own, which holds no freed memory of other tests that would be room beyond the limit.
    limited = f"""
import resource, numpy, data
data.DATASETS["mpi3d_toy"] |= dict(factors={factors}, images={n})
used = int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 100_000_000,) * 2)
try:
    numpy.ones({n} * 64 * 64 * 3, numpy.uint8)
except MemoryError:                                     # the limit holds: the images as a whole do not fit
    assert len(data.load("mpi3d_toy", {str(folder)!r})) == {n}
else:
    raise SystemExit("the limit does not hold")
"""
    found = subprocess.run([sys.executable, "-c", limited], cwd=Path(data.__file__).parent, timeout=300).returncode
    assert (folder / "mpi3d_toy-64x64.npy").stat().st_size == n * 64 * 64 * 3 + 128
    for path in folder.iterdir():
        path.unlink()                                   # pytest would keep these 200 to 400 MB
    assert found == 0


# ---- Fuzzing: damaged bytes anywhere -------------------------------------------------------------------------------

# What is damaged: file -> (dataset, how to write it, exact). exact: the format has checksums, so that damage must
# either be noticed or change nothing. A JPEG, the attribute list and a .mat file outside its archive have none: there a
# changed bit can change a pixel or a label, and all that can be asked for is an error in one line, or the right size.
TARGETS = {
    "3dshapes.h5": ("shapes3d", write_shapes3d, True),
    "nips2015-analogy-data.tar.gz": ("cars3d", write_cars3d, True),
    "cars/car_001_mesh.mat": ("cars3d", functools.partial(write_cars3d, packed=False), False),
    "mpi3d_toy.npz": ("mpi3d_toy", write_mpi3d_toy, True),
    "mpi3d_toy.npz, deflated": ("mpi3d_toy", functools.partial(write_mpi3d_toy, save=np.savez_compressed), True),
    "img_align_celeba.zip": ("celeba", write_celeba, True),
    "img_align_celeba/000002.jpg": ("celeba", functools.partial(write_celeba, packed=False), False),
    "list_attr_celeba.txt": ("celeba", write_celeba, False),
    "list_attr_celeba.csv": ("celeba", functools.partial(write_celeba, ending="csv"), False),
}


def mutated(content, rng):
    """A damaged copy: bits flipped, a byte set, a range zeroed or left out, or the end cut off."""
    content, kind = bytearray(content), rng.integers(5)
    # Headers are few bytes among many, so half of the damage goes to the first and last 300.
    near = [rng.integers(len(content)), rng.integers(300), len(content) - 1 - rng.integers(300)]
    at = int(min(max(near[rng.choice(3, p=[0.5, 0.25, 0.25])], 0), len(content) - 1))
    length = int(2 ** rng.uniform(0, 12))
    if kind == 0:
        content[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        content[at] = rng.integers(256)
    elif kind == 2:
        content[at:at + length] = bytes(len(content[at:at + length]))
    elif kind == 3:
        del content[at:at + length]
    else:
        del content[at:]
    return bytes(content)


def fuzz(target, count):
    """Load `count` damaged versions of a target. Returns how many were refused, equal, different; asserts the rest."""
    name, write, exact = TARGETS[target]
    data.DATASETS[name] = small_facts(name)
    if name == "celeba":
        data.DATASETS[name] |= dict(images=6)
        write = functools.partial(write, n=6)
    tally, rng = collections.Counter(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder)
        path = folder / target.split(",")[0]
        content, npy, before = path.read_bytes(), folder / f"{name}-64x64.npy", sorted(os.listdir(folder))
        expected = pixels(data.load(name, folder, "official"))
        for number in range(count):
            npy.unlink(missing_ok=True)
            path.write_bytes(mutated(content, rng))
            print(f"{target}: version {number}", flush=True)  # the last line, should it crash or hang
            try:
                dataset = data.load(name, folder, "official")
            except data.UserError as error:
                assert len(str(error).splitlines()) == 1, str(error)
                assert sorted(os.listdir(folder)) == before
                tally["refused"] += 1
                continue
            found = pixels(dataset)
            assert found.shape == expected.shape and len(dataset.factors(torch.arange(len(dataset)))) == len(dataset)
            tally["equal" if np.array_equal(found, expected) else "different"] += 1
    assert not (exact and tally["different"]), tally
    return tally


def main():
    """Fuzz every format, one after the other, and print what came of it."""
    warnings.simplefilter("error")                      # a warning would be a second line
    for target in TARGETS:
        start = time.perf_counter()
        tally = fuzz(target, int(sys.argv[1]))
        print(f"{target}: {dict(tally)} in {time.perf_counter() - start:.1f} s", flush=True)


def test_damaged_bytes_are_an_error_in_one_line_or_change_nothing():
    # In a process of its own: what libraries do with damaged files may be a crash or a hang.
    done = subprocess.run([sys.executable, __file__, "40"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    assert sum("refused" in line for line in done.stdout.splitlines()) == len(TARGETS)


if __name__ == "__main__":
    main()
