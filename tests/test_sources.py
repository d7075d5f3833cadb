"""The four official datasets as small files in their true formats: order, damage, trouble."""
import io
import math
import os
import shutil
import tarfile
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data
import evaluate
import train
from conftest import TINY

# The factor sizes of the small versions; CelebA's number of faces.
SIZES = {"shapes3d": (2, 2, 2, 2, 2, 3), "cars3d": (4, 4, 4), "mpi3d_toy": (2, 2, 2, 2, 2, 2, 2),
         "celeba": (64,)}

@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make all four datasets small: fewer values per factor."""
    for name, sizes in SIZES.items():
        facts = data.DATASETS[name] | dict(images=math.prod(sizes))
        facts["factors"] = dict(zip(facts["factors"], sizes))
        monkeypatch.setitem(data.DATASETS, name, facts)

def pictures(n, height=64, width=64):
    """n different smooth images, uint8 (n, height, width, 3)."""
    i, y, x = np.arange(n)[:, None, None], np.arange(height)[:, None], np.arange(width)
    channels = [37 * i + x + 0 * y, 11 * i + y + 0 * x, 5 * i + (x + y) // 2]
    return np.stack(channels, -1).astype(np.uint8)

# ---- Writers: the files as they are published, but small. Keyword arguments make them wrong. -----

def write_shapes3d(folder, images="images", shape=(64, 64), dtype=np.uint8, n=96):
    """3dshapes.h5: images in chunks under gzip (and labels, which nobody reads)."""
    with h5py.File(folder / "3dshapes.h5", "w") as file:
        file.create_dataset(images, data=pictures(96, *shape)[:n].astype(dtype),
                            chunks=(16, *shape, 3), compression="gzip")

def write_cars3d(folder, cars=(3, 1, 0, 2), key="im", dtype=np.uint8):
    """The .tar.gz: a .mat file per car, in any order, and another dataset."""
    views = pictures(64, 128, 128).reshape(4, 4, 4, 128, 128, 3)  # elevation, azimuth, car, ...
    views = views.transpose(2, 3, 4, 5, 1, 0).astype(dtype)  # car; 128, 128, 3, azimuth, elevation
    with tarfile.open(folder / "nips2015-analogy-data.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("data/sprites/car_like.mat"))
        for car in cars:
            scipy.io.savemat(folder / "car.mat", {key: views[car]}, do_compression=True)
            archive.add(folder / "car.mat", f"data/cars/car_{car:03}_mesh.mat")
    (folder / "car.mat").unlink()

def write_mpi3d_toy(folder, save=np.savez, images="images", dtype=np.uint8, shape=(64, 64), n=128,
                    short=0):
    """The .npz, its member stored or deflated, or `short` bytes too short."""
    save(folder / "mpi3d_toy.npz", **{images: pictures(128, *shape)[:n].astype(dtype)})
    if short:
        with zipfile.ZipFile(folder / "mpi3d_toy.npz") as archive:
            member = archive.read("images.npy")
        with zipfile.ZipFile(folder / "mpi3d_toy.npz", "w") as archive:
            archive.writestr("images.npy", member[:-short])

def write_celeba(folder, n=64, inside="img_align_celeba/", names="Bald Smiling Old", unpack=None):
    """The .zip, or the folder `unpack`, and the list: attributes are bits of a face's number."""
    rows = []
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i, picture in enumerate(pictures(n, 218, 178)):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG")
            archive.writestr(f"{inside}{i + 1:06}.jpg", file.getvalue())
            rows.append([f"{i + 1:06}.jpg", *(("-1", "1")[i >> bit & 1] for bit in range(3))])
        if unpack is not None:
            archive.extractall(folder / unpack)
    if unpack is not None:
        (folder / "img_align_celeba.zip").unlink()
    lines = [" ".join(row) for row in [[str(n)], names.split(), *rows]]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

WRITE = {"shapes3d": write_shapes3d, "cars3d": write_cars3d, "mpi3d_toy": write_mpi3d_toy,
         "celeba": write_celeba}

def write(folder, name, without=None, cut=False, **how):
    """Write a dataset's files, but for one of them, or but for the last third of the first."""
    WRITE[name](folder, **how)
    if without:
        (folder / without).unlink()
    if cut:
        path = folder / data.DATASETS[name]["files"][0]
        path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])

def pixels(dataset):
    """Every image of a dataset, uint8 (n, 64, 64, 3)."""
    return dataset.images(torch.arange(len(dataset))).permute(0, 2, 3, 1).numpy()

@pytest.mark.parametrize("name, how", [
    ("shapes3d", {}), ("cars3d", {}), ("mpi3d_toy", {}),
    ("mpi3d_toy", dict(save=np.savez_compressed)), ("celeba", {}),
    ("celeba", dict(unpack="")), ("celeba", dict(unpack="img_align_celeba"))])
def test_images_come_in_row_major_order_whatever_the_form_and_then_the_npy_is_enough(
        tmp_path, name, how):
    n = math.prod(SIZES[name])
    WRITE[name](tmp_path, **how)
    ds = data.load(name, tmp_path)  # auto: the official file is there
    assert ds.source == "official" and len(ds) == n and ds.is_grid == (name != "celeba")
    # The published sizes; the central square of a face.
    tall, wide = {"celeba": (218, 178), "cars3d": (128, 128)}.get(name, (64, 64))
    square = pictures(n, tall, wide)[:, (tall - wide) // 2:][:, :wide]
    expected = np.stack([Image.fromarray(image).resize((64, 64), Image.LANCZOS)
                         for image in square]).astype(int)
    if name == "celeba":
        # JPEG and shrinking are not exact, and a fold at 256 is sharp, so the median.
        assert np.median(np.abs(pixels(ds) - expected)) <= 3
        assert ds.factor_names == ["Bald", "Smiling", "Old"] and ds.factor_sizes == [2, 2, 2]
        assert ds.factors(torch.tensor([0, 1, 6])).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1]]
    else:
        assert np.array_equal(pixels(ds), expected)
        assert np.array_equal(ds.factors(torch.arange(n)).T, np.indices(SIZES[name]).reshape(-1, n))
    for path in tmp_path.iterdir():
        if not path.name.startswith((f"{name}-64x64", "list")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert np.array_equal(pixels(data.load(name, tmp_path, "official")), pixels(ds))

@pytest.mark.parametrize("name", SIZES)
def test_data_train_and_evaluate_run_on_it(tmp_path, capsys, monkeypatch, name, main):
    WRITE[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    out, here = tmp_path / "run", ["--data_dir", tmp_path]
    assert main(data, "--dataset", name, *here) == 0
    said, log = capsys.readouterr()
    ds = data.load(name, tmp_path)
    assert f"{len(ds)} images" in said and f"{name}-64x64.npy" in said
    assert str(dict(zip(ds.factor_names, ds.factor_sizes))) in said
    with Image.open(f"out/data-{name}.png") as grid:
        assert grid.width > 15 * 64 and grid.height > len(ds.factor_names) * 64
    assert log.count("converting") == 1  # and not the second time:
    assert main(data, "--dataset", name, *here) == 0
    assert capsys.readouterr() == (said, "")
    every = 5 if name == "cars3d" else 1
    assert main(train, *TINY, "--dataset", name, "--out", out, *here, "--device",
                "cpu", "--stage1.images", 32, "--images", 320, "--pool_images", 64, "--batch", 64,
                "--fit_images", 48, "--ddim_steps", 2, "--dyga.k_max", 8, "--dyga.max_iter", 3,
                "--fit_every", every) == 0
    fits = (out / "log.jsonl").read_text().count('"anchors"')
    assert fits == 5 // every + 1  # 5 epochs, and the last one
    metric = "tad" if name == "celeba" else "modularity"
    assert main(evaluate, out / "ckpt.pt", *here, "--device", "cpu", "--quick", "--only",
                f"{metric},figures") == 0
    assert {"metrics.json", "index.html", "units.png"} <= set(os.listdir(out / "eval"))
    assert f"{name}, official" in capsys.readouterr().out

@pytest.mark.parametrize("name, how, words", [
    ("shapes3d", lambda folder: (folder / "3dshapes.h5").write_text("404 not found"), "signature"),
    ("shapes3d", lambda folder: (folder / "shapes3d-64x64.npy").write_text("half"),
     "shapes3d-64x64.npy: .*remove it and run this again"),
    ("shapes3d", lambda folder: np.save(folder / "shapes3d-64x64.npy", np.zeros(5)), "float64"),
    ("shapes3d", dict(cut=True), "truncated"),
    ("shapes3d", dict(images="pictures"), "images"),
    ("shapes3d", dict(shape=(32, 32)), "32, 32, 3"),
    ("shapes3d", dict(dtype=np.float32), "float32"),
    ("shapes3d", dict(n=48), "images: found 48, expected 96"),
    ("cars3d", dict(cut=True), "end"),
    ("cars3d", dict(key="image"), "im"),
    ("cars3d", dict(dtype=np.float64), "data type"),
    ("cars3d", dict(cars=(0, 1, 3)), "images: found"),
    ("mpi3d_toy", dict(cut=True), "not a zip file"),
    ("mpi3d_toy", dict(images="pictures"), "images.npy"),
    ("mpi3d_toy", dict(shape=(32, 32)), "32, 32, 3"),
    ("mpi3d_toy", dict(dtype=np.int64), "int64"),
    ("mpi3d_toy", dict(n=127), r"images: found \(\(127,"),
    ("mpi3d_toy", dict(short=5000), "mpi3d_toy.npz: "),
    ("celeba", dict(cut=True), "not a zip file"),
    ("celeba", dict(inside=""), "img_align_celeba/000001.jpg"),
    ("celeba", dict(without="img_align_celeba/000002.jpg", unpack=""), "000002.jpg"),
    ("celeba", dict(without="list_attr_celeba.txt"), "list_attr_celeba.txt: .*No such file"),
    ("celeba", dict(n=63), "found 63, expected 64"),
    ("celeba", dict(names="Bald Smiling"), "in a row.*found .3., expected .2.")])
def test_a_wrong_file_is_told_leaves_nothing_and_the_right_one_then_works(
        tmp_path, name, how, words):
    how(tmp_path) if callable(how) else write(tmp_path, name, **how)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(data.UserError, match=words) as error:
        data.load(name, tmp_path, "official")
    text = str(error.value)
    assert "object at" not in text and ("http" in text or "again" in text)
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / f"{name}-64x64.npy").unlink(missing_ok=True)
    WRITE[name](tmp_path)  # CelebA's .zip wins over a broken folder
    assert len(data.load(name, tmp_path, "official")) == math.prod(SIZES[name])

@pytest.mark.parametrize("name", SIZES)
def test_a_missing_file_is_named_with_the_folder_and_the_address(tmp_path, name):
    for folder in tmp_path, tmp_path / "no such folder":
        words = f"no {data.DATASETS[name]['files'][0]} in {folder}: .*http"
        with pytest.raises(data.UserError, match=words):
            data.load(name, folder, source="official")

def test_a_bug_in_a_reader_is_no_damage(tmp_path, monkeypatch):
    write_mpi3d_toy(tmp_path)
    monkeypatch.setitem(data.READERS, "mpi3d_toy", lambda path, facts: iter([None.missing]))
    with pytest.raises(AttributeError):
        data.load("mpi3d_toy", tmp_path)

def test_on_a_full_disk_the_systems_own_reason_is_told_and_nothing_is_left(tmp_path):
    resource = pytest.importorskip("resource")  # Windows has no limits
    write_mpi3d_toy(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # fewer than 25 images
    with pytest.raises(data.UserError, match="npy cannot be written .File too large.; .*room"):
        data.load("mpi3d_toy", tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["mpi3d_toy.npz"]

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mpi3d_is_converted_in_a_small_part_of_its_images_memory(tmp_path, monkeypatch, save):
    n = 4096
    save(tmp_path / "mpi3d_toy.npz", images=np.zeros((n, 64, 64, 3), np.uint8))  # 50 MB
    monkeypatch.setitem(data.DATASETS, "mpi3d_toy", data.DATASETS["mpi3d_toy"] | dict(images=n))
    tracemalloc.start()  # it counts NumPy's arrays, too
    data.load("mpi3d_toy", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
