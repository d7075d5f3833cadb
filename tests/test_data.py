"""Facts about data.py: the rendered scene, the order of factors, each official file format, and how errors read.

What damaged, wrong or interrupted official files do is in test_sources.py.
"""

import colorsys
import io
import math
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data

ROOT = Path(data.__file__).parent


@pytest.fixture(scope="module")
def twin():
    return data.load("shapes3d", source="rendered")


def image(twin, *factors):
    """One image as int64 (3, 64, 64)."""
    return twin.images(twin.index(torch.tensor([factors])))[0].long()


# ---- the rendered twin ----------------------------------------------------------------------------------------------


def test_sky_line_rings_as_in_the_original_to_the_grey_level(twin):
    # Blue channel, sky (249) above a red wall (0), at the frontal orientation: the overshoot of a Lanczos-3 filter.
    column = image(twin, 2, 0, 5, 0, 0, 7)[2, :, 5].tolist()
    assert column[:15] == [249] * 15
    assert column[15:21] == [245, 255, 166, 0, 4, 0]


def test_colour_of_hue_k_is_hsv_k_tenths():
    for k in range(10):
        expected = [round(255 * value) for value in colorsys.hsv_to_rgb(k / 10, 1, 1)]
        assert data.PALETTE[k].tolist() == expected
    assert data.PALETTE[10].tolist() == [153, 226, 249]


def test_a_floor_in_shadow_has_shade_0_337_and_loses_its_spot_light(twin):
    # The longest shadow: the largest capsule. (56, 45) is in the middle of it, at the right of the object's foot.
    shadowed = image(twin, 0, 5, 5, 7, 3, 14)[0, 56, 45]
    assert shadowed == round(0.337 * 255)
    # The same floor point with a small object is lit.
    assert image(twin, 0, 5, 5, 0, 3, 14)[0, 56, 45] > 2 * shadowed


def test_cube_front_face_at_orientation_7_has_shade_0_945(twin):
    # Hue 0 is pure red, so that red = 255 * shade; the patch is well inside the front face.
    face = image(twin, 5, 5, 0, 3, 0, 7)[0, 40:44, 30:34].float().mean()
    assert abs(face / 255 - 0.945) < 0.01


def test_highlight_adds_white_to_the_top_of_the_object_only(twin):
    picture = image(twin, 5, 5, 0, 7, 2, 7)             # a red sphere: green and blue can only come from the highlight
    top, bottom = picture[:, 31, 31], picture[:, 50, 31]
    assert top[1] == top[2] == 30 and bottom[1] == bottom[2] == 0


def test_geometry_is_mirrored_between_orientation_k_and_14_minus_k_but_light_is_not():
    for k in range(7):
        seen = []
        for orientation in (k, 14 - k):
            centre, forward, rays = data.camera(orientation)
            room, _ = data.draw_room(centre, forward, rays)
            middle = data.vector(0, 0, 0.35)            # a cube at scale 1, and a cylinder inside it
            hits = [data.first_hit(shape, 0.35, 0.35, (centre - middle).expand_as(rays), rays).isfinite()
                    for shape in ("cube", "cylinder")]
            seen.append(torch.stack([*(room > 0), *hits]).view(5, 192, 192))  # floor, wall, sky, cube, cylinder
        assert torch.equal(seen[0], seen[1].flip(-1))   # left and right change places
    maps = data.weight_maps().float().view(8, 4, 15, 5, 64, 64)
    mirrored = maps.flip(2).flip(-1)                    # orientation k -> 14 - k, left -> right
    floor, sky = 0, 3
    assert torch.allclose(maps[..., sky, :, :], mirrored[..., sky, :, :], atol=1e-3)
    # The lamp hangs to the left, so the floor is brighter there.
    left, right = maps[0, 0, 7, floor, 60, 2], maps[0, 0, 7, floor, 60, 61]
    assert left > right + 0.05
    assert not torch.allclose(maps[..., floor, :, :], mirrored[..., floor, :, :], atol=1e-2)


def test_scale_multiplies_every_dimension_of_the_object():
    # At orientation 7 the cube's front face is flat: width = 2 * 0.35 s * focal / (2.5 - 0.35 s) pixels.
    maps = data.weight_maps().float().view(8, 4, 15, 5, 64, 64)
    for scale in range(8):
        s = 0.75 + scale / 14
        width = 2 * 0.35 * s * 32 / math.tan(math.radians(25)) / (2.5 - 0.35 * s)
        found = (maps[scale, 0, 7, 2, 40] > 0.5).sum()  # row 40 crosses the front face at every scale
        assert abs(found - width) <= 1


def test_surface_normals_have_length_one_and_points_lie_on_the_surface():
    g = torch.Generator().manual_seed(0)
    d = torch.randn(3, 2000, generator=g)
    o = torch.randn(3, 2000, generator=g) * 0.1 - 3 * d / d.norm(dim=0)  # start 3 away, aim near the centre
    for shape, (radius, half) in data.SHAPES.items():
        depth = data.first_hit(shape, radius, half, o, d)
        hit = depth.isfinite()
        assert hit.sum() > 1000
        points = (o + depth * d)[:, hit]
        normals = data.outward(shape, radius, half, points)
        assert torch.allclose(normals.norm(dim=0), torch.ones(len(points[0])), atol=1e-3)
        assert ((normals * d[:, hit]).sum(0) < 0).all()  # a ray enters against the outward normal
        outside = data.first_hit(shape, radius, half, points + 1e-3 * normals, normals)
        assert outside[outside.isfinite()].lt(0).all()  # from just outside, the object lies behind


def test_a_batch_equals_its_single_images_and_does_not_depend_on_its_size(twin):
    idx = torch.randint(480_000, (130,), generator=torch.Generator().manual_seed(0))
    batch = twin.images(idx)
    assert batch.dtype == torch.uint8 and batch.shape == (130, 3, 64, 64) and batch.is_contiguous()
    assert torch.equal(batch, torch.cat([twin.images(idx[i:i + 1]) for i in range(130)]))
    assert twin.images(idx[:0]).shape == (0, 3, 64, 64)


def test_an_image_is_the_rounded_sum_of_weight_maps_times_colours(twin):
    factors = [3, 7, 1, 5, 1, 2]
    maps = data.weight_maps()[(5 * 4 + 1) * 15 + 2].double()  # (5, 4096)
    colours = data.PALETTE[[3, 7, 1, 10, 11]].double()  # (5, 3)
    expected = (colours.T @ maps).round().clamp(0, 255).view(3, 64, 64)
    assert (image(twin, *factors) - expected).abs().max() <= 1


# ---- factors and indices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes3d", "cars3d", "mpi3d_toy"])
def test_factors_of_an_index_are_its_row_major_digits(name):
    facts = data.DATASETS[name]
    sizes = list(facts["factors"].values())
    assert math.prod(sizes) == facts["images"]
    dataset = data.Dataset(name, "official", "", None, facts, torch.device("cpu"))
    idx = torch.randint(len(dataset), (1000,), generator=torch.Generator().manual_seed(0))
    idx = torch.cat([idx, torch.tensor([0, len(dataset) - 1])])
    factors = dataset.factors(idx)
    assert np.array_equal(factors.numpy().T, np.unravel_index(idx.numpy(), sizes))
    assert torch.equal(dataset.index(factors), idx)


def test_known_shapes3d_indices(twin):
    idx = torch.tensor([0, 1, 15, 60, 480, 479_999])
    assert twin.factors(idx).tolist() == [[0, 0, 0, 0, 0, 0],
                                          [0, 0, 0, 0, 0, 1],  # orientation is fastest
                                          [0, 0, 0, 0, 1, 0],  # then shape
                                          [0, 0, 0, 1, 0, 0],  # then scale
                                          [0, 0, 1, 0, 0, 0],  # then object hue
                                          [9, 9, 9, 7, 3, 14]]
    assert twin.factor_names == ["floor hue", "wall hue", "object hue", "scale", "shape", "orientation"]
    assert twin.factor_sizes == [10, 10, 10, 8, 4, 15] and len(twin) == 480_000


def test_an_index_out_of_range_is_an_index_error(twin):
    for bad in (-1, 480_000):
        for ask in (twin.images, twin.factors):
            with pytest.raises(IndexError, match="0 to 479999"):
                ask(torch.tensor([0, bad]))


# ---- the official files, written here at a small size in their true formats -----------------------------------------


def shrink_grid(monkeypatch, name, sizes, images=None):
    """Let the dataset have fewer values per factor; returns as many distinct random images, (n, 64, 64, 3)."""
    facts = data.DATASETS[name]
    factors = dict(zip(facts["factors"], sizes))
    monkeypatch.setitem(data.DATASETS, name, facts | dict(factors=factors, images=images or math.prod(sizes)))
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (images or math.prod(sizes), 64, 64, 3), dtype=np.uint8)


def pixels(dataset):
    """Every image of a dataset as (n, 64, 64, 3)."""
    return dataset.images(torch.arange(len(dataset))).permute(0, 2, 3, 1).numpy()


def write_h5(path, images, sizes):
    grid = np.indices(sizes).reshape(len(sizes), -1).T
    labels = np.array([0.1, 0.1, 0.1, 0.07, 1.0, 4.3]) * grid + 0.75  # values, not indices, as in the original
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, labels


def nothing_left_but(folder, *names):
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


SIZES = (2, 2, 2, 2, 2, 3)


def test_shapes3d_h5_is_converted_once_and_then_memory_mapped(tmp_path, monkeypatch):
    images = shrink_grid(monkeypatch, "shapes3d", SIZES)
    write_h5(tmp_path / "3dshapes.h5", images, SIZES)
    dataset = data.load("shapes3d", tmp_path)           # auto: the official file is there
    assert dataset.source == "official" and np.array_equal(pixels(dataset), images)
    assert nothing_left_but(tmp_path, "3dshapes.h5", "shapes3d-64x64.npy")
    (tmp_path / "3dshapes.h5").unlink()                 # from now on the converted file is enough
    assert np.array_equal(pixels(data.load("shapes3d", tmp_path, "official")), images)


def test_a_damaged_converted_file_is_named(tmp_path, monkeypatch):
    shrink_grid(monkeypatch, "shapes3d", SIZES)
    (tmp_path / "shapes3d-64x64.npy").write_bytes(b"half")
    with pytest.raises(data.UserError, match="shapes3d-64x64.npy.*delete it"):
        data.load("shapes3d", tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_cars3d_mat_files_land_at_elevation_azimuth_type(tmp_path, monkeypatch, packed):
    sizes = (2, 3, 4)
    shrink_grid(monkeypatch, "cars3d", sizes)
    grey = 10 * np.arange(24).reshape(sizes)            # one grey level per (elevation, azimuth, type)
    folder = tmp_path / "data" / "cars"
    folder.mkdir(parents=True)
    for car in range(4):
        im = np.broadcast_to(grey[:, :, car].T, (128, 128, 3, 3, 2)).astype(np.uint8)  # (h, w, rgb, azimuth, elevation)
        scipy.io.savemat(folder / f"car_{car:03}_mesh.mat", {"im": im})
    if packed:
        with tarfile.open(tmp_path / "nips2015-analogy-data.tar.gz", "w:gz") as archive:
            for car in (3, 1, 0, 2):                    # the order inside the archive must not matter
                archive.add(folder / f"car_{car:03}_mesh.mat", f"data/cars/car_{car:03}_mesh.mat")
            archive.addfile(tarfile.TarInfo("data/sprites/car_like.mat"))
            for path in folder.iterdir():
                path.unlink()
        folder.rmdir()
    dataset = data.load("cars3d", tmp_path)
    assert np.array_equal(pixels(dataset)[:, 30, 30, 1], grey.reshape(-1))
    e, a, t = dataset.factors(torch.arange(24)).T
    assert np.array_equal(pixels(dataset)[:, 0, 0, 0], grey[e, a, t])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_mpi3d_npz_is_read_stored_or_compressed(tmp_path, monkeypatch, save):
    images = shrink_grid(monkeypatch, "mpi3d_toy", (2, 2, 2, 3, 3, 2, 2))
    save(tmp_path / "mpi3d_toy.npz", images=images)
    dataset = data.load("mpi3d_toy", tmp_path)
    assert np.array_equal(pixels(dataset), images)
    assert dataset.factors(torch.tensor([1, 2, 287])).tolist() == [[0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0],
                                                                   [1, 1, 1, 2, 2, 1, 1]]


def test_an_npz_whose_member_ends_early_is_refused(tmp_path, monkeypatch):
    images, member = shrink_grid(monkeypatch, "mpi3d_toy", (2, 1, 2, 1, 1, 2, 2)), io.BytesIO()
    np.save(member, images)
    with zipfile.ZipFile(tmp_path / "mpi3d_toy.npz", "w") as archive:
        archive.writestr("images.npy", member.getvalue()[:-5000])
    with pytest.raises(data.UserError, match="mpi3d_toy.npz.*rr-learning"):
        data.load("mpi3d_toy", tmp_path)
    assert nothing_left_but(tmp_path, "mpi3d_toy.npz")


def write_celeba(folder, ending, nested=False):
    """Three faces, red, green and blue in the central square and white outside, with two attributes."""
    faces = folder / "img_align_celeba" / "img_align_celeba" if nested else folder / "img_align_celeba"
    faces.mkdir(parents=True)
    for i, colour in enumerate(["red", "lime", "blue"]):
        picture = Image.new("RGB", (178, 218), "white")
        picture.paste(colour, (0, 20, 178, 198))
        picture.save(faces / f"00000{i + 1}.jpg", quality=95)
    rows = [("000001.jpg", -1, 1), ("000002.jpg", 1, -1), ("000003.jpg", 1, 1)]
    if ending == "csv":
        text = "image_id,Bald,Smiling\n" + "".join("{},{},{}\n".format(*row) for row in rows)
    else:
        text = "3\nBald Smiling \n" + "".join("{} {:2d} {:2d}\n".format(*row) for row in rows)
    (folder / f"list_attr_celeba.{ending}").write_text(text)


@pytest.mark.parametrize("ending, nested", [("txt", False), ("csv", True)])
def test_celeba_is_cropped_to_the_centre_and_labelled_0_or_1(tmp_path, monkeypatch, ending, nested):
    shrink_grid(monkeypatch, "celeba", (), images=3)
    write_celeba(tmp_path, ending, nested)
    dataset = data.load("celeba", tmp_path)
    assert dataset.factor_names == ["Bald", "Smiling"] and dataset.factor_sizes == [2, 2] and len(dataset) == 3
    assert dataset.factors(torch.arange(3)).tolist() == [[0, 1], [1, 0], [1, 1]]
    found = dataset.images(torch.arange(3)).float()
    assert (found - 255 * torch.eye(3)[:, :, None, None])[..., 2:-2, :].abs().max() < 12  # JPEG is not exact
    with pytest.raises(data.UserError, match="not a grid"):
        dataset.index(torch.tensor([[0, 1]]))


def test_celeba_without_its_attributes_is_refused(tmp_path, monkeypatch):
    shrink_grid(monkeypatch, "celeba", (), images=3)
    write_celeba(tmp_path, "txt")
    (tmp_path / "list_attr_celeba.txt").unlink()
    with pytest.raises(data.UserError, match="no list_attr_celeba.txt"):
        data.load("celeba", tmp_path)


# ---- load() and the helpers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.DATASETS)
def test_a_missing_file_is_named_with_the_folder_and_the_address(tmp_path, name):
    with pytest.raises(data.UserError) as error:
        data.load(name, tmp_path, source="official")
    text = str(error.value)
    assert data.DATASETS[name]["paths"][0] in text and str(tmp_path) in text and "http" in text and "\n" not in text


def test_shapes3d_without_its_file_is_rendered_and_says_so(tmp_path):
    dataset = data.load("shapes3d", tmp_path)
    assert dataset.source == "rendered"
    assert "no 3dshapes.h5" in dataset.source_note and "not Shapes3D" in dataset.source_note
    assert nothing_left_but(tmp_path)


def test_unknown_names_are_refused():
    for arguments in (("shapes4d",), ("shapes3d", "data", "downloaded"), ("cars3d", "data", "rendered")):
        with pytest.raises(data.UserError, match="choose"):
            data.load(*arguments)


def test_replacing_swaps_the_file_on_success_and_leaves_nothing_on_error(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with data.replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".txt"
    assert path.read_text() == "first"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), data.replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "first" and nothing_left_but(path.parent, "file.txt")


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, code", [(data.UserError("two\nlines"), 2), (OSError(28, "No space left", "x"), 2),
                                         (KeyboardInterrupt(), 130)])
def test_run_ends_with_one_line_and_an_exit_code(capsys, error, code):
    with pytest.raises(SystemExit) as end:
        data.run(raising(error))
    assert end.value.code == code
    assert capsys.readouterr().err.count("\n") == (1 if code == 2 else 0)


def test_run_keeps_the_traceback_of_a_bug():
    with pytest.raises(ZeroDivisionError):
        data.run(raising(ZeroDivisionError()))


@pytest.mark.parametrize("arguments", [["--colour"], ["--see", "1"], ["--seed", "many"], ["--dataset", "shapes4d"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    with pytest.raises(SystemExit) as end:
        data.run(data.main)
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith("data.py: error: ") and "--help" in output.err


def test_the_image_grid_places_every_tile_unchanged():
    tiles = torch.randint(256, (2, 3, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plain = torch.from_numpy(np.array(data.image_grid(tiles, scale=2)))  # (height, width, 3)
    for r in range(2):
        for c in range(3):
            found = plain[r * 12:r * 12 + 10, c * 16:c * 16 + 14].permute(2, 0, 1)
            assert torch.equal(found, tiles[r, c].repeat_interleave(2, 1).repeat_interleave(2, 2))
    labelled = data.image_grid(tiles, ["one", "two"], range(3), "a title")
    assert labelled.width > 3 * 9 and labelled.height > 2 * 7 + 30


def test_the_command_writes_a_picture_with_a_row_per_factor(tmp_path):
    command = [sys.executable, ROOT / "data.py", "--data_dir", tmp_path, "--out", tmp_path / "grid.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "480,000 images" in done.stdout
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.height > 6 * 64 and picture.width > 15 * 64
    assert nothing_left_but(tmp_path, "grid.png")


def test_the_command_says_what_is_missing_and_writes_nothing(tmp_path):
    command = [sys.executable, ROOT / "data.py", "--dataset", "mpi3d_toy", "--data_dir", tmp_path / "data"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "mpi3d_toy.npz" in done.stderr and "rr-learning" in done.stderr and nothing_left_but(tmp_path)
