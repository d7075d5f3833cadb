"""Images with known factors: four datasets, a rendered twin of Shapes3D, and your own pictures.

The twin needs no download; it lacks Shapes3D's textures, so its scores are not Shapes3D's.
`load("shapes3d")` returns a Dataset: ask it for images by index, and for an index's factors.
`python data.py --dataset shapes3d` prints what was found, and draws each factor's effect to out/.
"""

import argparse
import contextlib
import csv
import functools
import itertools
import math
import os
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

SIZE = 64  # every image is 64 x 64 pixels
SHAPE = (SIZE, SIZE, 3)  # in files

# Facts of each dataset:
#   images    how many
#   factors   {name: number of values}, in the official order
#   files     the first found under --data_dir is read; advice: what to do if there is none
# Reading the table of CelebA, or of your own pictures, fills in what is missing, and adds:
#   pictures  file names in index order
#   labels    int64 (images, F), unless they form a grid
#   stamp     changes whenever your own pictures do
DATASETS = {
    "shapes3d": dict(
        images=480_000,
        files=["3dshapes.h5"],
        factors={"floor hue": 10, "wall hue": 10, "object hue": 10, "scale": 8, "shape": 4,
                 "orientation": 15},
        advice="get it from https://github.com/google-deepmind/3d-shapes"),
    "cars3d": dict(
        images=17_568, files=["nips2015-analogy-data.tar.gz"],
        factors={"elevation": 4, "azimuth": 24, "object type": 183},
        advice="get it from http://www.scottreed.info/files/nips2015-analogy-data.tar.gz"),
    "mpi3d_toy": dict(
        images=1_036_800, files=["mpi3d_toy.npz"],
        factors={"object colour": 6, "object shape": 6, "object size": 2, "camera height": 3,
                 "background colour": 3, "first DOF": 40, "second DOF": 40},
        advice="get it from https://github.com/rr-learning/disentanglement_dataset"),
    "celeba": dict(
        images=202_599, factors={},  # 40 attributes, named in list_attr_celeba
        files=["img_align_celeba.zip", "img_align_celeba/img_align_celeba", "img_align_celeba"],
        advice="get it from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"),
    "folder": dict(  # your own pictures: see own_pictures()
        files=["."], factors={},  # named in labels.csv, if there is one
        advice="put PNG or JPEG files there; labels.csv has a header, file,NAME,NAME,..., and "
               "below it a row for each picture: its name, then whole numbers"),
}

def load(dataset, data_dir="data", source="auto", device="cpu", vary=""):
    """Open a Dataset. UserError: files missing, damaged or impossible to convert; no such factors.
    source, of shapes3d: "official" (its file), "rendered" (the twin), "auto" (the twin if no file).
    vary: "NAME,NAME", some of a grid's factors; the others stay at their middle values."""
    if source == "rendered" and dataset != "shapes3d":
        raise UserError(f"no rendered images of {dataset}, only of shapes3d: choose auto")
    facts = DATASETS[dataset]
    folder = Path(data_dir)
    if dataset == "folder":
        facts = own_pictures(folder, facts)
    npy = folder / f"{dataset}-64x64{facts.get('stamp', '')}.npy"
    # Once the .npy file is made, the official one may go (not CelebA's table, nor your pictures).
    paths = [npy, *(folder / file for file in facts["files"])]
    found = next(filter(Path.exists, paths), None)
    if source == "rendered" or (dataset == "shapes3d" and source == "auto" and not found):
        source, get = "rendered", rendered(device)
        note = f"not {paths[1]} but the rendered twin of Shapes3D: its scores are not Shapes3D's"
    elif found:
        if dataset == "celeba":
            table = folder / "list_attr_celeba.txt"  # a number, names, and a row for each picture
            with readable(table, facts["advice"]):
                _, names, *rows = map(str.split, table.read_text("utf-8").splitlines())
                expect("rows", len(rows), facts["images"])
                facts = table_facts(names, rows, facts)
        if found != npy:
            convert(dataset, found, npy, facts)
        source, get = "official", stored(npy, facts, device)
        note = f"images from {npy}"
    else:
        raise UserError(f"no {paths[1].name} in {folder}: {facts['advice']} and put it there, or "
                        "name its folder with --data_dir")
    if vary:
        get, facts = hold_others([*map(str.strip, vary.split(","))], get, facts, device)
    return Dataset(dataset, source, note, get, facts, device)

def hold_others(vary, get, facts, device):
    """get and facts (see Dataset) of that part of a grid where only the factors in vary change."""
    sizes = facts["factors"]
    if "labels" in facts:
        raise UserError("--vary: these images are a table; expected one of each combination")
    if set(vary) - set(sizes):
        raise UserError(f"cannot vary {vary}: expected some of the factors {list(sizes)}")
    held = [range(size) if name in vary else [size // 2] for name, size in sizes.items()]
    kept = torch.arange(facts["images"]).view(*sizes.values())[np.ix_(*held)].flatten().to(device)
    factors = {name: sizes[name] for name in sizes if name in vary}
    return lambda idx: get(kept[idx.to(device)]), dict(images=len(kept), factors=factors)

class Dataset:
    """Images by index, and the F factors that an index stands for; every answer lies on `device`.
    get: a function idx int64 (B,) -> uint8 (B, 3, 64, 64); facts: see DATASETS.
    source: "rendered", "official" or, in evaluate.py, "codes"; source_note: where images come from.
    is_grid: one image of each combination of factors, in row-major order, so the factors are the
    digits of the index and the last one changes fastest. Otherwise it is a table."""
    def __init__(self, name, source, source_note, get, facts, device):
        self.name, self.device = name, device
        self.source, self.source_note = source, source_note
        self.factor_names = list(facts["factors"])
        self.factor_sizes = list(facts["factors"].values())
        self.is_grid = "labels" not in facts
        self._get, self._facts = get, facts

    def __len__(self):
        return self._facts["images"]

    def images(self, idx):
        """idx int64 (B,) -> uint8 (B, 3, 64, 64). IndexError: no such image, if idx is on a CPU."""
        self._check(idx)
        return self._get(idx)

    def _check(self, idx):
        # On the CPU only: to look at a GPU's, the CPU would have to wait for it at every batch.
        if idx.is_cpu and ((idx < 0) | (idx >= len(self))).any():
            raise IndexError(f"{self.name} has no image {idx}: expected 0 and below {len(self)}")

    def factors(self, idx):
        """idx int64 (B,) -> int64 (B, F), the value of every factor. IndexError: as in images()."""
        self._check(idx)
        if self.is_grid:
            return torch.stack(torch.unravel_index(idx.to(self.device), self.factor_sizes), 1)
        return self._facts["labels"][idx.cpu()].to(self.device)

    def index(self, factors):
        """Of a grid: factors int64 (B, F) -> idx int64 (B,). ValueError: no such value."""
        idx = np.ravel_multi_index(factors.cpu().numpy().T, self.factor_sizes)  # (B,)
        return torch.from_numpy(idx).to(self.device)

# ---- The rendered twin of Shapes3D --------------------------------------------------------------
# A room, an object in it, and a camera that circles the object. Scale, shape and orientation decide
# what is seen where (8 * 4 * 15 = 480 cases); the hues only paint it, linearly in their colours. So
# each case is drawn ONCE, as five weight maps: how much of the floor's, wall's, object's and sky's
# colour and of white reaches each pixel. An image is the sum of five maps times five colours.
# Points and directions are tensors (3, n), or (3, 1) for a single one: x right, y away from the
# camera at orientation 7, z up, floor at z = 0, object on the z axis, camera 2.5 from that axis.
# The numbers were fitted to the original's frames. Missing: textures, and facets of round objects.

def vector(x, y, z):
    """Three numbers as a column, float32 (3, 1)."""
    return torch.tensor([[x], [y], [z]]).float()

FLOOR, WALL, OBJECT, SKY, WHITE = range(5)  # the weight maps
HUES = 10  # rows 0 to 9 of the palette; then sky and white
PALETTE = [ImageColor.getrgb(f"hsv({36 * k}, 100%, 100%)") for k in range(HUES)]
PALETTE = torch.tensor([*PALETTE, (153, 226, 249), (255, 255, 255)]).float()
SIDE = 3 * SIZE  # drawn at 192 x 192, then shrunk
FOCAL = SIZE / 2 / math.tan(math.radians(25))  # in pixels: a field of view of 50 degrees
WALL_AT = 3.5  # walls at x = +-3.5 and y = 3.5
UP = vector(0, 0, 1)
LIGHT = vector(-1.5, 0.5, 7.5)  # a spot light that points straight down
# At scale 1: radius (cube: half a side), half-height of the straight part, half-height in all.
SHAPES = {"cube": (0.350, 0.350, 0.350), "cylinder": (0.3735, 0.375, 0.375),
          "sphere": (0.4236, 0.0, 0.4236), "capsule": (0.3228, 0.3267, 0.6495)}

def rendered(device):
    """The function idx int64 (B,) -> uint8 (B, 3, 64, 64) of the rendered twin."""
    # Weights are float16 numbers, colours at most 255: a GPU's TF32 holds both exactly.
    maps, palette = weight_maps().to(device, torch.float32), PALETTE.to(device)
    def draw(idx):
        *hues, case = torch.unravel_index(idx, (HUES, HUES, HUES, len(maps)))
        sky = torch.full_like(idx, HUES)
        colours = palette[torch.stack([*hues, sky, sky + 1], 1)].mT  # (B, 3, 5)
        pixels = colours @ maps.index_select(0, case)  # (B, 3, 5) @ (B, 5, 4096): (B, 3, 4096)
        # Clipped only now: until here an image is linear in its colours.
        return pixels.round_().clamp_(0, 255).byte().view(-1, 3, SIZE, SIZE)  # (B, 3, 64, 64)

    # 64 images at a time: on a CPU three times as fast as 512 at once.
    return lambda idx: torch.cat([draw(part) for part in idx.to(device).split(64)])

@functools.cache
def weight_maps():
    """All 480 geometries in index order, float16 (480, 5, 4096): FLOOR, WALL, and so on."""
    # On the CPU: a sample on an edge then falls on the same side of it everywhere.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on arrays this small
    views = [camera(orientation) for orientation in range(15)]
    rooms = [draw_room(*view) for view in views]
    maps = []
    for scale, shape, (room, view) in itertools.product(range(8), SHAPES, zip(rooms, views)):
        picture = draw_object(*room, *view, shape, 0.75 + 0.5 * scale / 7)  # (5, n)
        for one in picture.view(5, SIDE, SIDE).numpy():
            maps.append(np.array(Image.fromarray(one).resize((SIZE, SIZE), Image.LANCZOS)))
    torch.set_num_threads(threads)
    maps = torch.from_numpy(np.stack(maps)).half()  # (2400, 64, 64)
    return maps.view(480, 5, -1)  # (480, 5, 4096)

def camera(orientation):
    """Orientation 0..14 (-30 to 30 degrees) -> eye (3, 1), forward (3, 1), rays (3, n = 192**2)."""
    t = (orientation - 7) / 7 * math.radians(30)
    sin, cos = math.sin(t), math.cos(t)
    eye = vector(2.5 * sin, -2.5 * cos, 0.75)
    forward = vector(-sin, cos, 0)
    right = vector(cos, sin, 0)
    offset = (torch.arange(SIDE) + 0.5 - SIDE / 2) / 3 / FOCAL  # (192,) of the samples' centres
    v, u = torch.cartesian_prod(offset, offset).T  # (n,) each: down, and to the right
    return eye, forward, forward + u * right - v * UP  # a sample sees a point eye + depth * ray

def shade(ambient, points, normals, forward):
    """Brightness (n,) of points (3, n) with outward unit normals (3, n): three lights."""
    headlight = -(normals * forward).sum(0)  # along the camera's view, equally strong everywhere
    to_light = torch.nn.functional.normalize(LIGHT - points, dim=0)  # (3, n)
    spot = (normals * to_light).sum(0).clamp(min=0) * to_light[2] ** 10  # cosine law times cone
    return ambient + 0.58 * headlight.clamp(min=0) + 0.95 * spot

# A ray start + depth * ray is inside a convex solid for ONE interval of depths, (near, far), and
# inside two at once for (the larger near, the smaller far). So boxes and balls make all shapes.
def box(start, ray, half):
    """(near, far) between which all coordinates are within +-half: 3 a cube, 2 walls, 1 a slab.
    start (k, 1) or (k, n), ray (k, n), for k = 3, 2 or 1 coordinates; near and far are (n,)."""
    a, b = (-half - start) / ray, (half - start) / ray  # where each coordinate is -half, +half
    return a.minimum(b).amax(0), a.maximum(b).amin(0)  # the last to come within, the first to leave

def ball(start, ray, radius):
    """(near, far) within radius of the origin in all 3 coordinates (a ball), or in 2 (a bar)."""
    # Where |start + depth ray|^2 - radius^2 = a depth^2 + 2 b depth + c is 0; nan for a miss.
    a = (ray * ray).sum(0)
    b = (start * ray).sum(0)
    c = (start * start).sum(0) - radius ** 2
    root = (b * b - a * c).sqrt()
    return (-b - root) / a, (-b + root) / a

def first_hit(shape, radius, half, start, ray):
    """Depth (n,) at which rays (3, n) enter an object centred at 0; inf where they miss it."""
    if shape == "cube":
        solids = [box(start, ray, radius)]
    if shape == "sphere":
        solids = [ball(start, ray, radius)]
    if shape in ("cylinder", "capsule"):  # inside an endless round bar and a slab at once
        near, far = ball(start[:2], ray[:2], radius)
        bottom, top = box(start[2:], ray[2:], half)
        solids = [(near.maximum(bottom), far.minimum(top))]
    if shape == "capsule":  # a cylinder with a ball at each end
        solids += [ball(start - end * UP, ray, radius) for end in (half, -half)]
    # The first solid that it enters counts. One that it misses has far < near, or nan.
    depths = [torch.where(near < far, near, torch.inf) for near, far in solids]
    return torch.stack(depths).amin(0)

def outward(shape, radius, half, points):
    """Unit normals (3, n) at surface points (3, n) of an object centred at 0."""
    if shape == "cube":  # out of the face along whose axis the point is furthest out
        return torch.where(points.abs() == points.abs().amax(0), points.sign(), 0.0)
    if shape == "cylinder":
        lid = points[2].abs() > 0.9999 * half  # on a flat end; 0.9999 forgives rounding
        return torch.where(lid, points[2].sign() * UP, points * vector(1, 1, 0) / radius)
    return (points - points[2].clamp(-half, half) * UP) / radius  # from the axis's nearest point

def draw_room(eye, forward, rays):
    """The empty room: its five weight maps (5, n), and the points seen, (3, n), of floor, walls."""
    # The walls are a box seen from inside; that behind the camera is never seen.
    _, to_wall = box(eye[:2], rays[:2], WALL_AT)
    to_floor = torch.where(rays[2] < 0, -eye[2] / rays[2], torch.inf)
    points = eye + to_floor.minimum(to_wall) * rays
    floor = to_floor < to_wall
    wall = ~floor & (points[2] < 2.0)  # above is sky
    inwards = -outward("cube", WALL_AT, WALL_AT, points * vector(1, 1, 0))  # z = 0: walls alone
    maps = torch.zeros(5, len(floor))
    maps[FLOOR] = floor * shade(0.354, points, UP, forward)
    maps[WALL] = wall * shade(0.352, points, inwards, forward)
    maps[SKY] = ~(floor | wall)
    return maps, points

def draw_object(room, points, eye, forward, rays, shape, scale):
    """A copy of the room (5, n), whose floor and walls are at points (3, n), with an object."""
    radius, half, rise = SHAPES[shape]
    middle = scale * rise * UP  # it stands on the floor
    solid = shape, scale * radius, scale * half
    maps = room.clone()
    # A floor point lies in shadow if the way from it to the light meets the object.
    blocked = first_hit(*solid, points - middle, LIGHT - points).isfinite()
    maps[FLOOR, blocked & (room[FLOOR] > 0)] = 0.337
    # Nothing hides the object: where it is hit, it is seen. What faces up has a flat white sheen.
    depth = first_hit(*solid, eye - middle, rays)
    seen = depth.isfinite()
    surface = eye + depth[seen] * rays[:, seen]
    normals = outward(*solid, surface - middle)
    maps[:, seen] = 0
    maps[OBJECT, seen] = shade(0.364, surface, normals, forward)
    maps[WHITE, seen] = 0.118 * ((normals * vector(-0.255, 0.168, 0.952)).sum(0) > 0)
    return maps

# ---- Helpers that train.py and evaluate.py use too ----------------------------------------------
class UserError(Exception):
    """A mistake that the user can mend. ONE line: what was found, what was expected, what to do."""

class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and exit code 2; --help shows every default."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs,  # or --see would pass for --seed
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

def run(main):
    """Call main() and end as a command should: an error in one line and exit code 2, Ctrl-C 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    # OSError: in the system's own words. Any other exception is a bug and keeps its traceback.
    except (UserError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it over `path`, or delete it on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps two runs apart. In front, as Pillow and NumPy look at a name's end.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary  # close the file in the block: Windows renames no open one
        os.replace(temporary, path)  # atomic: a reader finds the old file or the whole new one
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); what was there before "
                        "stays; make room, or choose a folder that you may write to") from error
    finally:
        temporary.unlink(missing_ok=True)

def image_grid(images, row_labels=(), col_labels=(), title="", scale=1):
    """Draw uint8 images (R, C, 3, H, W) as a PIL.Image, every pixel `scale` wide, with texts."""
    tiles = images.cpu().movedim(2, -1).numpy().repeat(scale, 2).repeat(scale, 3)
    R, C, H, W, _ = tiles.shape  # H and W after scaling
    font = ImageFont.load_default(size=13)
    left, label, heading = [math.ceil(max(map(font.getlength, texts), default=-8)) + 8
                            for texts in (row_labels, col_labels, [title])]
    top = 36 if title or col_labels else 0  # two lines of text
    across, down = max(W, label) + 2, H + 2
    sheet = Image.new("RGB", (max(left + C * across, heading), top + R * down), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 0), title, "black", font)
    for c, text in enumerate(col_labels):
        draw.text((left + c * across + W / 2, 27), text, "black", font, "mm")
    for r, text in enumerate(row_labels):
        draw.text((left - 4, top + r * down + H / 2), text, "black", font, "rm")
    for r, c in np.ndindex(R, C):
        sheet.paste(Image.fromarray(tiles[r, c]), (left + c * across, top + r * down))
    return sheet

def main():
    """Print what a dataset holds, and draw it: each factor alone, or images from all over it."""
    p = Parser(description="Say what a dataset holds, and draw a grid with a row per factor.")
    p.add_argument("--dataset", default="shapes3d", choices=DATASETS, help="which images")
    p.add_argument("--data_dir", default="data", help="folder with the files or pictures")
    ds = load(**vars(p.parse_args()))
    idx = torch.arange(60) * len(ds) // 60
    if ds.is_grid:  # a row per factor, which alone changes; the others are those of just any image
        factors = ds.factors(idx[20:21]).repeat(len(ds.factor_sizes), 15, 1)  # (F, 15, F)
        for f, size in enumerate(ds.factor_sizes):
            factors[f, :, f] = torch.arange(15) * size // 15
        idx = ds.index(factors.flatten(0, 1))
    images = ds.images(idx).unflatten(0, (-1, 15))  # (R, 15, 3, 64, 64)
    out = Path(f"out/data-{ds.name}.png")
    with replacing(out) as temporary:
        names = ds.factor_names if ds.is_grid else ()
        image_grid(images, names, title=f"{ds.name}, {ds.source}").save(temporary)
    print(f"{ds.source_note}\n{len(ds):,} images; factors:",
          dict(zip(ds.factor_names, ds.factor_sizes)), f"\nwrote {out}")

# ---- Files: SKIP THIS AT FIRST READING ----------------------------------------------------------
# Readers yield the images at `path`, uint8 (64, 64, 3), in index order. convert() writes them ONCE
# to a plain .npy file, which is then memory-mapped: a batch reads only its own images.

@contextlib.contextmanager
def readable(path, advice):
    """Turn trouble while reading `path` into one line: what was found, and what mends it."""
    try:
        yield
    except (UserError, ImportError, AttributeError, NameError):
        raise  # a line already, or a bug of ours
    except Exception as error:  # every file library has its own names for damage
        raise UserError(f"{path}: {type(error).__name__}, {error} (if it is damaged: {advice})")

def expect(what, found, expected):
    """ValueError, for readable(), unless found equals expected."""
    if found != expected:
        raise ValueError(f"{what}: found {found}, expected {expected}")

def convert(dataset, path, npy, facts):
    """Write the images at `path` to the file `npy`, all or none."""
    def images():
        count = 0
        with readable(path, facts["advice"]):
            for count, image in enumerate(READERS[dataset](path, facts), 1):
                expect("an image", (image.shape, image.dtype), (SHAPE, "uint8"))
                yield image
            expect("images", count, facts["images"])
    print(f"converting {path}, once", file=sys.stderr)
    for old in npy.parent.glob(f"{dataset}-64x64-*.npy"):  # of a folder before it changed
        old.unlink()
    header = dict(descr="|u1", fortran_order=False, shape=(facts["images"], *SHAPE))
    with replacing(npy) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for image in tqdm(images(), total=facts["images"], disable=None):  # None: on a terminal
            file.write(image.tobytes())

def stored(npy, facts, device):
    """The function idx int64 (B,) -> uint8 (B, 3, 64, 64) of a converted file."""
    with readable(npy, "remove it and run this again"):
        array = np.load(npy, mmap_mode="c")  # "c": on disk, and PyTorch may think it can write
        expect("images", (array.shape, array.dtype), ((facts["images"], *SHAPE), "uint8"))
    pixels = torch.from_numpy(array)  # (images, 64, 64, 3)
    return lambda idx: pixels[idx.cpu()].to(device).permute(0, 3, 1, 2).contiguous()

def own_pictures(folder, facts):
    """Facts of the PNG and JPEG files in a folder: all by name, or those that labels.csv lists."""
    files = [path for path in sorted(folder.glob("[!.]*"))  # hidden ones left out
             if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    names, rows = [], [[path.name] for path in files]
    table = folder / "labels.csv"
    with readable(folder, facts["advice"]):
        if table.exists():
            lines = table.read_text("utf-8-sig").splitlines()  # sig: Windows' byte-order mark
            header, *rows = filter(None, csv.reader(lines))  # empty lines left out
            names = header[1:]  # after "file"
            files.append(table)
        if len(rows) < 2:
            raise ValueError(f"found {len(rows)} pictures, expected 2 or more")
        facts = table_facts(names, rows, facts)
    # When a file comes, goes or changes, so does this part of the .npy file's name.
    stamp = repr([(path.name, path.stat().st_mtime_ns) for path in files])
    return facts | dict(stamp=f"-{zlib.crc32(stamp.encode()):08x}")

def table_facts(names, rows, facts):
    """facts, and what rows [file, F numbers] say. A column's values become 0 .. size - 1."""
    numbers = {file: tuple(map(int, texts)) for file, *texts in rows}
    expect("different pictures", len(numbers), len(rows))
    widths = {len(row) for row in numbers.values()}
    expect("numbers in a row, one for each different name", widths, {len(set(names))})
    labels = torch.tensor(list(numbers.values())).long()  # (images, F)
    for column in labels.T:
        column[:] = column.unique(return_inverse=True)[1]
    sizes = (labels.amax(0) + 1).tolist()
    facts = facts | dict(images=len(rows), factors=dict(zip(names, sizes)))
    if len(set(numbers.values())) == len(rows) == math.prod(sizes):  # each combination once
        return facts | dict(pictures=sorted(numbers, key=numbers.get))  # a grid, row-major
    return facts | dict(pictures=list(numbers), labels=labels)

def read_pictures(path, facts):
    """The pictures facts["pictures"], in this order, of a folder or of CelebA's .zip."""
    if path.is_file():
        path = zipfile.Path(path, "img_align_celeba/")
    for name in facts["pictures"]:
        with readable(path / name, facts["advice"]), (path / name).open("rb") as file:
            photo = Image.open(file, formats=["JPEG", "PNG"])
            if photo.mode[0] in "IF":  # Pillow would make all of it white
                raise ValueError(f"more than 8 bits a channel (mode {photo.mode}), expected 8")
            photo = ImageOps.exif_transpose(photo).convert("RGB")  # upright, as EXIF says
            # The central square. Paper: CelebA is "resized", with no word on a crop.
            yield np.asarray(ImageOps.fit(photo, (SIZE, SIZE), Image.LANCZOS))

def read_shapes3d(path, facts):
    """3dshapes.h5: images uint8 (480000, 64, 64, 3), in row-major order of the factors."""
    import h5py  # here and not above: nothing else needs it
    with h5py.File(path, "r") as file:
        images = file["images"]
        for start in range(0, len(images), 1024):  # packed in chunks, so not one by one
            yield from images[start:start + 1024]

def read_cars3d(path, facts):
    """cars/car_*.mat, one per car: key im, uint8 (128, 128, 3, 24 azimuths, 4 elevations)."""
    import scipy.io  # slow to import, like h5py
    cars = {}  # file name -> its 96 views, uint8 (64, 64, 3)
    with tarfile.open(path) as archive:
        for entry in archive:  # it also holds other datasets of Reed et al. (2015)
            if Path(entry.name).match("cars/car_*.mat"):
                im = scipy.io.loadmat(archive.extractfile(entry))["im"]
                views = im.transpose(4, 3, 0, 1, 2).reshape(-1, 128, 128, 3)  # (96, 128, 128, 3)
                small = [Image.fromarray(view).resize((SIZE, SIZE), Image.LANCZOS)
                         for view in views]
                cars[entry.name] = list(map(np.asarray, small))
        while archive.fileobj.read(1 << 20):
            pass  # to the very end: there gzip compares its checksum
    # Row-major in (elevation, azimuth, object type): the car changes fastest.
    for views in zip(*[cars[name] for name in sorted(cars)]):
        yield from views

def read_mpi3d_toy(path, facts):
    """mpi3d_toy.npz: a zip archive with images.npy, uint8 (1036800, 64, 64, 3), 12 GB."""
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        np.lib.format.read_magic(file)  # the first 8 bytes
        found = np.lib.format.read_array_header_1_0(file)
        expect("images", found, ((facts["images"], *SHAPE), False, "uint8"))
        for _ in range(facts["images"]):
            yield np.frombuffer(file.read(math.prod(SHAPE)), "uint8").reshape(SHAPE)

READERS = {"shapes3d": read_shapes3d, "cars3d": read_cars3d, "mpi3d_toy": read_mpi3d_toy,
           "celeba": read_pictures, "folder": read_pictures}

if __name__ == "__main__":
    run(main)
