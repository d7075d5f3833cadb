"""Facts about data.py: the rendered scene, the order of factors, load() and the shared helpers.
The official files, right and wrong, are in test_sources.py."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data

@pytest.fixture(scope="module")
def twin():
    return data.load("shapes3d", source="rendered")

@pytest.fixture(scope="module")
def maps():
    return data.weight_maps().float().view(8, 4, 15, 5, 64, 64)

def image(twin, *factors):
    """One image as int64 (3, 64, 64)."""
    return twin.images(twin.index(torch.tensor([factors])))[0].long()

def test_sky_line_rings_as_in_the_original_to_the_grey_level(twin):
    # Blue, sky (249) above a red wall (0), frontal: the overshoot of a Lanczos-3 filter.
    column = image(twin, 2, 0, 5, 0, 0, 7)[2, :, 5].tolist()
    assert column[:21] == [249] * 15 + [245, 255, 166, 0, 4, 0]

def test_the_palette_and_the_factors_are_those_of_the_original_in_its_order(twin):
    assert twin.is_grid and len(twin) == 480_000 and twin.factor_names == [
        "floor hue", "wall hue", "object hue", "scale", "shape", "orientation"]
    assert data.PALETTE.tolist() == [
        [255, 0, 0], [255, 153, 0], [204, 255, 0], [51, 255, 0], [0, 255, 102], [0, 255, 255],
        [0, 102, 255], [51, 0, 255], [204, 0, 255], [255, 0, 153], [153, 226, 249], [255] * 3]

@pytest.mark.parametrize("what, factors, place, value", [
    ("a floor in shadow: 0.337", (0, 5, 5, 7, 3, 14), (0, 56, 45), 86),
    ("the same floor beside a small object, lit", (0, 5, 5, 0, 3, 14), (0, 56, 45), 247),
    ("front face of a cube: 0.945", (5, 5, 0, 3, 0, 7), (0, 42, 32), 241),
    ("white highlight on top of a red sphere: 0.118", (5, 5, 0, 7, 2, 7), (1, 31, 31), 30),
    ("none below it", (5, 5, 0, 7, 2, 7), (1, 50, 31), 0)])
def test_shades_are_those_of_the_original(twin, what, factors, place, value):
    assert abs(image(twin, *factors)[place] - value) <= 2

def test_geometry_is_mirrored_between_orientation_k_and_14_minus_k():
    for k in range(7):
        seen = []
        for orientation in (k, 14 - k):
            eye, forward, rays = data.camera(orientation)
            start = (eye - data.vector(0, 0, 0.35)).expand_as(rays)
            hits = [data.first_hit(shape, 0.35, 0.35, start, rays).isfinite()
                    for shape in ("cube", "cylinder")]
            room = data.draw_room(eye, forward, rays)[0] > 0
            seen.append(torch.stack([*room, *hits]).view(7, 192, 192))
        assert torch.equal(seen[0], seen[1].flip(-1))  # left and right change places

def test_scale_multiplies_every_dimension_of_the_object_and_the_lamp_hangs_to_the_left(maps):
    floor = maps[0, 0, 7, data.FLOOR, 60]
    assert floor[2] > floor[61] + 0.05
    # At orientation 7 the cube's front face is flat: 2 * 0.35 s * focal / (2.5 - 0.35 s) pixels.
    for scale in range(8):
        s = 0.75 + scale / 14
        width = 2 * 0.35 * s * 32 / math.tan(math.radians(25)) / (2.5 - 0.35 * s)
        assert abs((maps[scale, 0, 7, data.OBJECT, 40] > 0.5).sum() - width) <= 1

@pytest.mark.parametrize("shape", data.SHAPES)
def test_normals_have_length_one_and_rays_enter_against_them_at_the_surface(shape):
    g = torch.Generator().manual_seed(0)
    ray = torch.randn(3, 2000, generator=g)
    start = torch.randn(3, 2000, generator=g) * 0.1 - 3 * ray / ray.norm(dim=0)  # 3 away
    radius, half, _ = data.SHAPES[shape]
    depth = data.first_hit(shape, radius, half, start, ray)
    hit = depth.isfinite()
    assert hit.sum() > 1000
    points = (start + depth * ray)[:, hit]
    normals = data.outward(shape, radius, half, points)
    assert torch.allclose(normals.norm(dim=0), torch.ones(len(points[0])), atol=1e-3)
    assert ((normals * ray[:, hit]).sum(0) < 0).all()
    outside = data.first_hit(shape, radius, half, points + 1e-3 * normals, normals)
    assert outside[outside.isfinite()].lt(0).all()  # from just outside, it lies behind

def test_a_batch_equals_its_single_images_and_each_is_the_rounded_sum_of_maps_times_colours(
        twin, maps):
    idx = torch.randint(480_000, (130,), generator=torch.Generator().manual_seed(0))
    batch = twin.images(idx)
    assert batch.dtype == torch.uint8 and batch.shape == (130, 3, 64, 64) and batch.is_contiguous()
    assert torch.equal(batch, torch.cat([twin.images(idx[i:i + 1]) for i in range(130)]))
    assert twin.images(idx[:0]).shape == (0, 3, 64, 64)
    colours = data.PALETTE[[3, 7, 1, 10, 11]]  # (5, 3)
    expected = torch.einsum("kc,khw->chw", colours, maps[5, 1, 2]).round().clamp(0, 255)
    assert (image(twin, 3, 7, 1, 5, 1, 2) - expected).abs().max() <= 1

@pytest.mark.parametrize("name", ["shapes3d", "cars3d", "mpi3d_toy"])
def test_factors_of_an_index_are_its_row_major_digits(name):
    facts = data.DATASETS[name]
    sizes = list(facts["factors"].values())
    assert math.prod(sizes) == facts["images"]
    ds = data.Dataset(name, "official", "", None, facts, torch.device("cpu"))
    idx = torch.randint(len(ds), (1000,), generator=torch.Generator().manual_seed(0))
    idx = torch.cat([idx, torch.tensor([0, len(ds) - 1])])
    assert np.array_equal(ds.factors(idx).T, np.unravel_index(idx.numpy(), sizes))
    assert torch.equal(ds.index(ds.factors(idx)), idx)

@pytest.mark.parametrize("bad", [-1, 480_000])
def test_an_index_a_value_or_a_source_that_is_not_there_is_an_error(twin, bad):
    for ask in twin.images, twin.factors:
        with pytest.raises(IndexError, match="below 480000"):
            ask(torch.tensor([0, bad]))
    with pytest.raises(ValueError):
        twin.index(torch.tensor([[0, 0, 0, 0, bad, 0]]))
    with pytest.raises(data.UserError, match="no rendered images of cars3d"):
        data.load("cars3d", source="rendered")

@pytest.mark.parametrize("folder", [".", "no such folder"])
def test_shapes3d_without_its_file_is_rendered_and_says_so(tmp_path, folder):
    ds = data.load("shapes3d", tmp_path / folder)
    assert ds.source == "rendered" and ds.source_note.startswith("not ")
    assert str(tmp_path / folder / "3dshapes.h5") in ds.source_note
    assert not list(tmp_path.iterdir())

def test_replacing_swaps_the_file_on_success_and_leaves_nothing_on_error(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with data.replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".txt"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), data.replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file.txt"]

@pytest.mark.parametrize("error, end, lines", [
    (data.UserError("two\nlines"), 2, 1), (OSError(28, "No space left", "x"), 2, 1),
    (KeyboardInterrupt(), 130, 0), (ZeroDivisionError(), None, 0)])
def test_run_ends_in_one_line_and_an_exit_code_or_a_bugs_traceback(capsys, error, end, lines):
    def main():
        raise error
    with pytest.raises(SystemExit if end else ZeroDivisionError) as raised:
        data.run(main)
    assert getattr(raised.value, "code", None) == end
    assert capsys.readouterr().err.count("\n") == lines

@pytest.mark.parametrize("arguments", [["--colour"], ["--o", "x"], ["--dataset", "shapes4d"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(arguments, capsys, main):
    assert main(data, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("data.py: error: ") and "--help" in err

def test_the_image_grid_places_every_tile_unchanged():
    g = torch.Generator().manual_seed(0)
    tiles = torch.randint(256, (2, 3, 3, 5, 7), generator=g).to(torch.uint8)
    plain = torch.from_numpy(np.array(data.image_grid(tiles, scale=2)))  # (height, width, 3)
    for r, c in np.ndindex(2, 3):
        found = plain[r * 12:r * 12 + 10, c * 16:c * 16 + 14].permute(2, 0, 1)
        assert torch.equal(found, tiles[r, c].repeat_interleave(2, 1).repeat_interleave(2, 2))
    labelled = data.image_grid(tiles, ["one", "two"], ["a", "b", "c"], "a title")
    assert labelled.width > 3 * 9 and labelled.height > 2 * 7 + 30

def test_the_command_alone_draws_the_twin_into_a_folder_out_and_complains_of_nothing(tmp_path):
    done = subprocess.run([sys.executable, data.__file__], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"480,000 images" in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "data-shapes3d.png"]

def test_held_factors_stay_at_the_middle_of_their_values_and_the_rest_is_a_smaller_grid(twin):
    small = data.load("shapes3d", source="rendered", vary="shape,wall hue")
    assert small.factor_names == ["wall hue", "shape"] and small.factor_sizes == [10, 4]
    idx = torch.arange(len(small))
    wall, shape = small.factors(idx).T
    held = torch.full_like(idx, 5)
    full = torch.stack([held, wall, held, held - 1, shape, held + 2], 1)  # 10, 10, 10, 8, 4, 15
    assert len(small) == 40 and torch.equal(small.images(idx), twin.images(twin.index(full)))
    assert torch.equal(small.index(small.factors(idx)), idx)
    with pytest.raises(data.UserError, match="cannot vary .*size.*floor hue"):
        data.load("shapes3d", vary="size")

def pictures(folder, table=None):
    """Six pictures of different sizes, the k-th of brightness 40 k, and labels.csv."""
    for k, ending in enumerate(["JPG", "png"] * 3):
        Image.new("RGB", (80 + 10 * k, 64 + k), (40 * k,) * 3).save(folder / f"{k}.{ending}")
    if table is not None:
        (folder / "labels.csv").write_text(table)

def brightness(ds):
    return (ds.images(torch.arange(len(ds))).float().mean((1, 2, 3)) / 40).round().tolist()

GRID = "file,size,hue\n0.JPG,7,1\n1.png,7,0\n2.JPG,9,1\n3.png,9,0\n"

@pytest.mark.parametrize("table, grid, order, factors, last", [
    (None, False, [0, 1, 2, 3, 4, 5], {}, []),
    (GRID, True, [1, 0, 3, 2], {"size": 2, "hue": 2}, [1, 1]),
    (GRID + "4.JPG,9,0\n", False, [0, 1, 2, 3, 4], {"size": 2, "hue": 2}, [1, 0])])
def test_a_folder_is_its_pictures_and_with_labels_those_named_a_grid_if_all_combinations_occur_once(
        table, grid, order, factors, last, tmp_path):
    pictures(tmp_path, table)
    ds = data.load("folder", tmp_path)
    assert ds.is_grid is grid and brightness(ds) == order
    assert dict(zip(ds.factor_names, ds.factor_sizes)) == factors
    assert ds.factors(torch.tensor([len(ds) - 1])).tolist() == [last]

def test_a_folder_is_converted_again_when_it_changes_and_only_then(tmp_path, capsys):
    pictures(tmp_path)
    for change, conversions in (lambda: None, 1), (lambda: None, 0), (lambda: Image.new(
            "RGB", (64, 64), "white").save(tmp_path / "0.JPG"), 1):
        change()
        ds = data.load("folder", tmp_path)
        assert capsys.readouterr().err.count("converting") == conversions
    assert brightness(ds)[0] == 6 and len(list(tmp_path.glob("*.npy"))) == 1

def test_a_table_may_have_quotes_and_empty_lines(tmp_path):
    for name, colour in ("a b.png", "black"), ("c,d.png", "white"):
        Image.new("RGB", (70, 64), colour).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text('\ufefffile,"hue, x"\r\n\r\n"c,d.png","7"\r\na b.png,3\n',
                                         "utf-8")
    ds = data.load("folder", tmp_path)
    assert ds.factor_names == ["hue, x"] and ds.images(torch.arange(2))[:, 0, 0, 0].tolist() == [
        0, 255]

@pytest.mark.parametrize("change, words", [
    ("", "not enough values"), ("file,size\n", "found 0 pictures, expected 2 or more"),
    ("file,size\n0.JPG,1\n", "found 1 pictures"),
    ("file,size\n0.JPG\n1.png\n", "numbers in a row.*found .0., expected .1."),
    ("file,a,a\n0.JPG,1,1\n1.png,1,1\n", "for each different name: found .2., expected .1."),
    ("file,size\n0.JPG,big\n1.png,2\n", "'big'"),
    (f"file,size\n0.JPG,{2**64}\n1.png,2\n", "Overflow"),
    ("file,size\n0.JPG,1\n0.JPG,2\n", "different pictures: found 1, expected 2"),
    ("file,size\n9.png,1\n0.JPG,2\n", "9.png: .*No such file"),
    (lambda folder: Image.new("I;16", (64, 64), 30_000).save(folder / "3.png"),
     "3.png: .*more than 8 bits a channel"),
    (lambda folder: (folder / "2.JPG").write_bytes(b"no picture"), "2.JPG: .*cannot identify"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "found 0 pictures")])
def test_a_wrong_table_or_picture_of_a_folder_is_told_and_nothing_is_written(
        change, words, tmp_path):
    pictures(tmp_path, None if callable(change) else change)
    if callable(change):
        change(tmp_path)
    with pytest.raises(data.UserError, match=f"{words}.*put PNG or JPEG files there"):
        data.load("folder", tmp_path)
    assert not list(tmp_path.glob("*.npy"))
