"""Images with known factors: four datasets, and a rendered twin of Shapes3D without a download.

The twin draws the same room, objects and colours, for the same 480,000 combinations of factors in
the same order. It has no textures, so it is not the data: its scores are not Shapes3D's.

`load("shapes3d")` returns one small object, whatever lies behind it: ask it for images by index,
and for the factors that an index stands for. `python data.py --dataset shapes3d` prints what was
found, and draws out/data-shapes3d.png: a grid with a row per factor in which only that one changes.
"""

import argparse
import colorsys
import contextlib
import errno
import functools
import io
import math
import os
import sys
import tarfile
import time
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

SIZE = 64  # every image is 64 x 64 pixels

# Factors and their numbers of values, in the order of the official files. The first of `files` that
# is found under --data_dir is read: the archive as published, or what it unpacks to.
DATASETS = {
    "shapes3d": dict(
        images=480_000,
        factors={"floor hue": 10, "wall hue": 10, "object hue": 10,
                 "scale": 8, "shape": 4, "orientation": 15},
        files=["3dshapes.h5"],
        advice="get it from https://github.com/google-deepmind/3d-shapes"),
    "cars3d": dict(
        images=17_568,
        factors={"elevation": 4, "azimuth": 24, "object type": 183},
        files=["nips2015-analogy-data.tar.gz", "data/cars", "cars"],
        advice="get it from http://www.scottreed.info/files/nips2015-analogy-data.tar.gz"),
    "mpi3d_toy": dict(
        images=1_036_800,
        factors={"object colour": 6, "object shape": 6, "object size": 2, "camera height": 3,
                 "background colour": 3, "first DOF": 40, "second DOF": 40},
        files=["mpi3d_toy.npz"],
        advice="get it from https://github.com/rr-learning/disentanglement_dataset"),
    "celeba": dict(
        images=202_599,
        factors={},  # 40 attributes, named in list_attr_celeba
        files=["img_align_celeba.zip", "img_align_celeba/img_align_celeba", "img_align_celeba"],
        advice="get it from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"),
}


def load(dataset, data_dir="data", source="auto", device="cpu", reserve=None):
    """Open a Dataset.

    source: "official" reads files in data_dir; "rendered" draws the twin, for shapes3d only; "auto"
    is official, or the twin where the file of shapes3d is missing.
    reserve: bytes of a GPU's memory that the images must leave free; None is half of what is free.
    UserError: unknown names; files that are missing, damaged, or cannot be read or converted.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if source not in ("auto", "official") and (dataset, source) != ("shapes3d", "rendered"):
        raise UserError(f"{dataset} has no source {source!r}: choose auto or official "
                        "(or rendered, for shapes3d only)")
    facts, data_dir, device = DATASETS[dataset], Path(data_dir), torch.device(device)
    npy = data_dir / f"{dataset}-64x64.npy"  # once this is made, the official file may go
    found = [data_dir / file for file in facts["files"] if (data_dir / file).exists()]
    lack = ""
    if not found and not npy.exists():
        where = f"in {data_dir}" if data_dir.exists() else f"({data_dir} does not exist)"
        lack = f"no {facts['files'][0]} {where}"
    if dataset == "shapes3d" and (source == "rendered" or (source == "auto" and lack)):
        note = f"{lack or 'as asked'}: the rendered twin of Shapes3D; its scores are not Shapes3D's"
        return Dataset(dataset, "rendered", note, rendered(device), facts, device)
    if lack:
        raise UserError(f"{dataset}: {lack}; {facts['advice']} and put it there, "
                        "or name its folder with --data_dir")
    if dataset == "celeba":
        facts = facts | read_celeba_attributes(data_dir, facts, device)
    if not npy.exists():
        convert(dataset, found[0], npy, facts)
    images = stored(npy, facts, device, reserve)
    return Dataset(dataset, "official", f"official images, from {npy}", images, facts, device)


class Dataset:
    """Images by index, and the factors that an index stands for; every answer lies on `device`.

    source is "rendered" or "official"; source_note says in one line where the images come from.
    factor_names are F texts, factor_sizes F whole numbers, len() counts the images.
    is_grid: there is one image of each combination of factors, in row-major order, so the factors
    are the digits of the index and the last one changes fastest. CelebA is no grid: a table.
    """

    def __init__(self, name, source, source_note, images, facts, device):
        self.name, self.source, self.source_note = name, source, source_note
        self.factor_names = list(facts["factors"])
        self.factor_sizes = list(facts["factors"].values())
        self.is_grid = "labels" not in facts
        self.device = device
        self._images, self._facts = images, facts

    def __len__(self):
        return self._facts["images"]

    def _check(self, idx):
        # CPU indices only: to look at a GPU's, the CPU would have to wait for it at every batch.
        if idx.device.type == "cpu" and ((idx < 0) | (idx >= len(self))).any():
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}")

    def images(self, idx):
        """idx int64 (B,), on any device -> uint8 (B, 3, 64, 64). IndexError: no such image."""
        self._check(idx)
        return self._images(idx)

    def factors(self, idx):
        """idx int64 (B,) -> int64 (B, F), the value of every factor. IndexError: no such image."""
        self._check(idx)
        idx = idx.to(self.device)
        if self.is_grid:
            return torch.stack(torch.unravel_index(idx, self.factor_sizes), 1)  # (B, F)
        return self._facts["labels"][idx].long()  # (B, F)

    def index(self, factors):
        """factors int64 (B, F) -> idx int64 (B,), the inverse of factors(). UserError: no grid."""
        if not self.is_grid:
            raise UserError(f"{self.name} is not a grid: no image can be looked up by its factors")
        idx = 0
        for digit, size in zip(factors.to(self.device).T, self.factor_sizes):
            idx = idx * size + digit  # (B,)
        return idx


# ---- The rendered twin of Shapes3D --------------------------------------------------------------
# A room with a coloured floor and walls, one coloured object, and a camera that circles the object.
# Scale, shape and orientation decide what is seen where (8 * 4 * 15 = 480 cases); the three hues
# only paint it. And light is linear: twice the colour gives twice the pixel. So each case is drawn
# ONCE, as five weight maps that say how much of the floor colour, wall colour, object colour, sky
# colour and white reaches each pixel; an image is the sum of five maps times five colours.
#
# Points and directions are tensors (3, n), or (3, 1) for a single one: x right, y away from the
# camera at orientation 7, z up, floor at z = 0, object on the z axis, camera 2.5 from that axis.
# All numbers were fitted to real frames. Wall and floor patterns are left out (0.1 dB).


def vector(x, y, z):
    """Three numbers as a column, float32 (3, 1)."""
    return torch.tensor([x, y, z], dtype=torch.float32)[:, None]  # (3, 1)


FLOOR, WALL, OBJECT, SKY, WHITE = range(5)  # the weight maps
HUES = 10  # rows 0 to 9 of the palette; then sky and white
PALETTE = [colorsys.hsv_to_rgb(k / HUES, 1, 1) for k in range(HUES)]
PALETTE = (torch.tensor([*PALETTE, (0.6, 226 / 255, 249 / 255), (1, 1, 1)]) * 255).round()
SIDE = 3 * SIZE  # drawn at 192 x 192, then shrunk
FOCAL = SIZE / 2 / math.tan(math.radians(25))  # in pixels: a field of view of 50 degrees
WALL_AT = 3.5  # walls at x = +-3.5 and y = 3.5
UP, LIGHT = vector(0, 0, 1), vector(-1.5, 0.5, 7.5)  # a spot light that points straight down
HIGHLIGHT_FROM = vector(-0.255, 0.168, 0.952)
# Radius (cube: half a side) and half-height of the straight part, both at scale 1.
SHAPES = {"cube": (0.350, 0.350), "cylinder": (0.3735, 0.375),
          "sphere": (0.4236, 0.0), "capsule": (0.3228, 0.3267)}


def rendered(device):
    """The function idx int64 (B,) -> uint8 (B, 3, 64, 64) of the rendered twin."""
    # The values were float16, so a GPU's TF32 products round nothing: every device draws the same.
    maps, palette = weight_maps().to(device, torch.float32), PALETTE.to(device)

    def draw(idx):
        hues, sky = idx // len(maps), torch.full_like(idx, 10)  # hues: three digits
        rows = [hues // HUES ** 2, hues // HUES % HUES, hues % HUES, sky, sky + 1]  # of the palette
        colours = palette[torch.stack(rows, 1)].mT  # (B, 3, 5)
        # (B, 3, 5) @ (B, 5, 4096) = (B, 3, 4096)
        pixels = colours @ maps.index_select(0, idx % len(maps))
        # Clipped only now, after shrinking, like the original: it keeps the ringing at sharp edges.
        return pixels.round_().clamp_(0, 255).byte().view(-1, 3, SIZE, SIZE)  # (B, 3, 64, 64)

    # 64 images at a time: on a CPU three times as fast as 512 at once.
    return lambda idx: torch.cat([draw(part) for part in idx.to(device).split(64)])


@functools.lru_cache(maxsize=1)
def weight_maps():
    """All 480 geometries in index order: float16 (480, 5, 4096), floor, wall, object, sky, white.

    Drawn on the CPU, where a sample on an edge always falls on the same side.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two gain nothing on arrays this small
    # The Lanczos filter shrinks one side of a picture; d is in output pixels.
    d = (torch.arange(SIDE) - (3 * torch.arange(SIZE)[:, None] + 1)) / 3  # (64, 192)
    shrink = torch.where(d.abs() < 3, torch.sinc(d) * torch.sinc(d / 3), 0.0)
    shrink = shrink / shrink.sum(1, keepdim=True)
    maps = torch.zeros(8, len(SHAPES), 15, 5, SIZE, SIZE)
    for orientation in range(15):
        view = camera(orientation)
        room, points = draw_room(*view)  # shared by the 32 objects that may stand in it
        for scale in range(8):
            for k, shape in enumerate(SHAPES):
                picture = draw_object(room, points, *view, shape, 0.75 + 0.5 * scale / 7)
                picture = picture.view(5, SIDE, SIDE)  # (5, 192, 192)
                maps[scale, k, orientation] = shrink @ picture @ shrink.T  # (5, 64, 64)
    torch.set_num_threads(threads)
    return maps.view(-1, 5, SIZE * SIZE).half()  # (480, 5, 4096)


def camera(orientation):
    """Camera at orientation 0..14 (-30 to 30 degrees): eye (3, 1), forward (3, 1), rays (3, n).

    There is a ray for each of the n = 192 * 192 samples: a sample sees a point eye + depth * ray.
    """
    t = (orientation - 7) / 7 * math.radians(30)
    eye = vector(2.5 * math.sin(t), -2.5 * math.cos(t), 0.75)
    forward, right = vector(-math.sin(t), math.cos(t), 0), vector(math.cos(t), math.sin(t), 0)
    offset = (torch.arange(SIDE) + 0.5 - SIDE / 2) / 3 / FOCAL  # (192,) of the samples' centres
    v, u = torch.meshgrid(offset, offset, indexing="ij")  # (192, 192): down, and to the right
    return eye, forward, forward + u.reshape(1, -1) * right - v.reshape(1, -1) * UP


def shade(ambient, points, normals, forward):
    """Brightness (n,) of points (3, n) with outward unit normals (3, n): three lights."""
    headlight = -(normals * forward).sum(0)  # at the camera, but as strong at every distance
    to_light = torch.nn.functional.normalize(LIGHT - points, dim=0)  # (3, n)
    spot = (normals * to_light).sum(0).clamp(min=0) * to_light[2] ** 10  # cosine law times cone
    return ambient + 0.58 * headlight.clamp(min=0) + 0.95 * spot


def draw_room(eye, forward, rays):
    """The empty room: its five weight maps (5, n), and the points seen, (3, n), of floor, walls."""
    x, y, z = rays
    to_floor = torch.where(z < 0, -eye[2] / z, torch.inf)  # depths
    to_side = (x.sign() * WALL_AT - eye[0]) / x  # left or right wall, whichever lies ahead
    to_back = (WALL_AT - eye[1]) / y  # y > 0 always: the camera never turns that far
    to_wall = to_side.minimum(to_back)
    points = eye + to_floor.minimum(to_wall) * rays
    floor = to_floor < to_wall
    wall = ~floor & (points[2] < 2.0)  # no ceiling: above the walls is sky
    inwards = torch.where(to_side < to_back, -x.sign() * vector(1, 0, 0), vector(0, -1, 0))
    maps = torch.zeros(5, len(x))
    maps[FLOOR] = floor * shade(0.354, points, UP, forward)
    maps[WALL] = wall * shade(0.352, points, inwards, forward)
    maps[SKY] = ~(floor | wall)
    return maps, points


def draw_object(room, points, eye, forward, rays, shape, scale):
    """A copy of the room (5, n), whose floor and walls are at points (3, n), with an object."""
    radius, half = SHAPES[shape]
    rise = half if shape in ("cube", "cylinder") else half + radius  # it stands on the floor
    middle = scale * rise * UP
    size = shape, scale * radius, scale * half
    maps = room.clone()
    # A floor point lies in shadow if the way from it to the light meets the object.
    blocked = first_hit(*size, points - middle, LIGHT - points).isfinite()
    maps[FLOOR, blocked & (room[FLOOR] > 0)] = 0.337
    # Nothing in the room can stand in front of the object: where it is hit, it is what we see.
    depth = first_hit(*size, (eye - middle).expand_as(rays), rays)
    seen = depth.isfinite()
    surface = eye + depth[seen] * rays[:, seen]
    normals = outward(*size, surface - middle)
    maps[:, seen] = 0
    maps[OBJECT, seen] = shade(0.364, surface, normals, forward)
    maps[WHITE, seen] = 0.118 * ((normals * HIGHLIGHT_FROM).sum(0) > 0)  # a step
    return maps


# A ray start + depth * ray is in a convex solid for ONE interval of depths, (near, far). To cut two
# solids is to cut their intervals. So all four shapes are made of boxes and balls.


def box(start, ray, half):
    """(near, far) between which all of 3 coordinates (a cube) or 1 (a slab) lie within +-half."""
    a, b = (-half - start) / ray, (half - start) / ray
    return a.minimum(b).amax(0), a.maximum(b).amin(0)


def ball(start, ray, radius):
    """(near, far) between which 3 coordinates (a ball) or 2 (a bar) are within the radius of 0."""
    # Where |start + depth ray|^2 - radius^2 = a depth^2 + 2 b depth + c is 0; nan for a miss.
    a, b, c = (ray * ray).sum(0), (start * ray).sum(0), (start * start).sum(0) - radius ** 2
    root = (b * b - a * c).sqrt()
    return (-b - root) / a, (-b + root) / a


def entry(near, far):
    """The depth at which an interval begins, inf if it is empty or nan."""
    return torch.where(near < far, near, torch.inf)


def first_hit(shape, radius, half, start, ray):
    """Depth (n,) at which rays (3, n) enter an object centred at 0; inf where they miss it."""
    if shape == "cube":
        return entry(*box(start, ray, radius))
    bar, lids = ball(start[:2], ray[:2], radius), box(start[2:], ray[2:], half)
    body = entry(bar[0].maximum(lids[0]), bar[1].minimum(lids[1]))
    if shape == "cylinder":
        return body
    top = entry(*ball(start - half * UP, ray, radius))
    bottom = entry(*ball(start + half * UP, ray, radius))
    return body.minimum(top).minimum(bottom)  # a sphere is a capsule with half = 0


def outward(shape, radius, half, points):
    """Unit normals (3, n) at surface points (3, n) of an object centred at 0."""
    if shape == "cube":  # the face is the axis along which the point is furthest out
        return torch.where(points.abs() == points.abs().amax(0), points.sign(), 0.0)
    if shape == "cylinder":
        lid = points[2].abs() > 0.9999 * half  # on a flat end; 0.9999 forgives rounding
        return torch.where(lid, points[2].sign() * UP, points * vector(1, 1, 0) / radius)
    return (points - points[2].clamp(-half, half) * UP) / radius  # from the axis's nearest point


# ---- Helpers that train.py and evaluate.py use too ----------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend. ONE line: what was found, what was expected, what to do."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and exit code 2; --help shows every default."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)  # or --see would pass for --seed

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Call main() and end as a command should: an error in one line and exit code 2, Ctrl-C 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    # OSError: the system's own words name the path. Any other exception is a bug of ours, and keeps
    # its traceback.
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
    finally:
        temporary.unlink(missing_ok=True)  # after the rename there is nothing left to delete


def image_grid(images, row_labels=None, col_labels=None, title=None, scale=1):
    """Draw uint8 images (R, C, 3, H, W) as a PIL.Image, every pixel `scale` wide, with labels."""
    tiles = torch.as_tensor(images).cpu().repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    R, C, _, H, W = tiles.shape  # (R, C, 3, scale H, scale W)
    rows, cols, title = list(row_labels or []), list(col_labels or []), title or ""
    font = ImageFont.load_default(size=13)

    def width(text):
        return math.ceil(font.getlength(str(text))) + 8

    left = max(map(width, rows), default=0)
    top = 18 * (bool(title) + bool(cols))  # lines of 18 pixels
    across, down = max([W, *map(width, cols)]) + 2, H + 2
    cells = torch.nn.functional.pad(tiles, (0, across - W, 0, 2), value=255)
    cells = cells.permute(0, 3, 1, 4, 2).reshape(R * down, C * across, 3)
    wide = max(left + C * across, width(title))
    sheet = Image.new("RGB", (wide, top + R * down), "white")
    sheet.paste(Image.fromarray(cells.numpy()), (left, top))
    write = ImageDraw.Draw(sheet).text
    write((4, 9), title, "black", font, "lm")  # the place of the text's left end, at half height
    for c, text in enumerate(cols):
        write((left + c * across + W / 2, top - 9), str(text), "black", font, "mm")
    for r, text in enumerate(rows):
        write((left - 4, top + r * down + H / 2), str(text), "black", font, "rm")
    return sheet


def sample_grid(ds, columns=15):
    """A PIL.Image with a row per factor: it takes its values from left to right, the others stay.

    Where images are no grid, a row shows some that have the attribute.
    """
    start = ds.factors(torch.tensor([len(ds) * 3 // 7]))  # (1, F) of just any image
    rows = []
    for f, size in enumerate(ds.factor_sizes):
        if ds.is_grid:
            factors = start.repeat(columns, 1)  # (columns, F)
            factors[:, f] = torch.arange(columns) * size // columns
            idx = ds.index(factors)
        else:
            idx = ds.factors(torch.arange(len(ds)))[:, f].argsort(descending=True)[:columns]
        rows.append(ds.images(idx))
    return image_grid(torch.stack(rows), ds.factor_names, title=f"{ds.name}, {ds.source}")


def main():
    """Print what a dataset holds, and draw its sample grid."""
    p = Parser(description="Say what a dataset holds, and draw a grid with a row per factor.")
    p.add_argument("--dataset", default="shapes3d", choices=DATASETS, help="which images")
    p.add_argument("--data_dir", default="data", help="folder with the official files")
    p.add_argument("--source", default="auto", help="auto, official or rendered")
    p.add_argument("--out", help="picture to write; None means out/data-DATASET.png")
    args = p.parse_args()
    ds = load(args.dataset, args.data_dir, args.source)
    print(ds.source_note)
    print(f"{ds.name}: {len(ds):,} images, {ds.source}")
    print("factors:", dict(zip(ds.factor_names, ds.factor_sizes)))
    out = Path(args.out or f"out/data-{ds.name}.png")
    with replacing(out) as temporary:
        sample_grid(ds).save(temporary, format="PNG")
    print(f"wrote {out}")


# ---- The official files: SKIP THIS AT FIRST READING ---------------------------------------------
# Each reader checks a file and yields its images, uint8 (64, 64, 3), in index order. convert()
# writes them ONCE to a plain .npy file, which is then memory-mapped: a batch reads only its own
# images from disk.

SHAPE = (SIZE, SIZE, 3)
# How file libraries report damage. Any other exception is a bug of ours and keeps its traceback.
DAMAGE = (OSError, EOFError, LookupError, MemoryError, RuntimeError, ValueError,
          tokenize.TokenError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


@contextlib.contextmanager
def readable(path, advice, *more):
    """Turn trouble while reading `path` into one line: the system's reason, or what is damaged."""
    try:
        yield
    except (*DAMAGE, *more) as error:
        code = getattr(error, "errno", None)
        # These are damage: a picture is missing, or a broken number tells zipfile where to go.
        if code not in (None, errno.ENOENT, errno.EINVAL):
            raise UserError(f"cannot read {path}: {os.strerror(code)}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {reason}; if it is damaged or not the official file, "
                        f"remove it and {advice}") from error


def expect(what, found, expected):
    """ValueError, for readable(), unless found equals expected."""
    if found != expected:
        raise ValueError(f"{what}: found {found}, expected {expected}")


def convert(dataset, path, npy, facts):
    """Write the official images at `path` to the file `npy`, or nothing at all."""
    header = dict(descr="|u1", fortran_order=False, shape=(facts["images"], *SHAPE))
    print(f"converting {path.name}, once", file=sys.stderr)
    try:
        # A killed run leaves its large temporary file. Unchanged for an hour, it is such a one.
        for left in npy.parent.glob(f".*-{npy.name}"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
        with replacing(npy) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            images = checked(READERS[dataset](path, facts), path, facts)
            for image in tqdm(images, total=facts["images"], disable=None):  # None: on a terminal
                file.write(image.tobytes())
    except OSError as error:  # of writing: those of reading have become UserErrors
        advice = f"make room there for {facts['images'] * math.prod(SHAPE) / 1e9:.1f} GB"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"name a folder that can be, with --data_dir, and link {path.name} there"
        raise UserError(f"{npy} cannot be written ({error.strerror}): {advice}") from error


def checked(images, path, facts):
    """The same images; UserError for trouble with reading them."""
    with readable(path, facts["advice"]):
        yield from images


def stored(npy, facts, device, reserve):
    """The function idx int64 (B,) -> uint8 (B, 3, 64, 64) of a converted file."""
    with readable(npy, "run this again"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the file cannot be written to: fine
        pixels = torch.from_numpy(np.load(npy, mmap_mode="r"))  # (images, 64, 64, 3), on disk
        found = (*pixels.shape, pixels.dtype)
        expect("images", found, (facts["images"], *SHAPE, torch.uint8))
    if device.type == "cuda" and fits(pixels.nbytes, device, reserve):
        pixels = pixels.to(device)

    def read(idx):
        images = pixels[idx.to(pixels.device)].to(device)  # (B, 64, 64, 3)
        return images.permute(0, 3, 1, 2).contiguous()  # (B, 3, 64, 64)

    return read


def fits(nbytes, device, reserve):
    """Whether a GPU has room for nbytes beside `reserve` bytes (None: half of what is free)."""
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= free - (free / 2 if reserve is None else reserve)


def read_shapes3d(path, facts):
    """3dshapes.h5: images uint8 (480000, 64, 64, 3), labels float (480000, 6), factor VALUES."""
    import h5py  # here and not above: nothing else needs it
    with h5py.File(path, "r", locking=False) as file:  # others may have it open
        images, labels = file["images"], file["labels"][:]
        found = (*images.shape, images.dtype.name)
        expect("images", found, (facts["images"], *SHAPE, "uint8"))
        # Published libraries have had the factor order wrong. So turn each column of values (0.75
        # ... 1.25) into value indices (0 ... 7), and compare all with Dataset.factors().
        found = [np.unique(column, return_inverse=True)[1] for column in labels.T]
        sizes = tuple(facts["factors"].values())
        grid = np.unravel_index(np.arange(len(images)), sizes)  # (F, images)
        expect("labels in row-major order of the factors", np.array_equal(found, grid), True)
        for start in range(0, len(images), 1024):  # packed in chunks, so not one by one
            yield from images[start:start + 1024]


def read_cars3d(path, facts):
    """One .mat file per car: key im, uint8 (128, 128, 3, 24 azimuths, 4 elevations)."""
    import scipy.io  # slow to import, like h5py
    elevations, azimuths, types = facts["factors"].values()
    cars = {}  # file name -> its views, uint8 (64, 64, 3)
    for name, file in car_files(path):
        with readable(f"{path}/{name}", facts["advice"], TypeError, scipy.io.matlab.MatReadError):
            im = scipy.io.loadmat(file)["im"]
            expected = (128, 128, 3, azimuths, elevations, "uint8")
            expect("im", (*im.shape, im.dtype.name), expected)
        views = im.transpose(4, 3, 0, 1, 2).reshape(-1, 128, 128, 3)  # (96, 128, 128, 3)
        cars[name] = [np.asarray(Image.fromarray(view).resize((SIZE, SIZE), Image.LANCZOS))
                      for view in views]
    expect("files cars/car_*.mat", len(cars), types)
    # Row-major in (elevation, azimuth, object type): the car changes fastest. Which car is number 0
    # is only a name: disentanglement_lib takes the order of the folder on disk, we sort.
    for view in range(elevations * azimuths):
        for name in sorted(cars):
            yield cars[name][view]


def car_files(path):
    """Yield the name of each car's file, and the file, from the folder or the archive."""
    if path.is_dir():
        yield from ((file.name, file) for file in path.glob("car_*.mat"))
        return
    with tarfile.open(path) as archive:
        for entry in archive:  # it also holds that paper's other datasets
            if Path(entry.name).match("cars/car_*.mat"):
                yield Path(entry.name).name, archive.extractfile(entry)
        while archive.fileobj.read(1 << 20):
            pass  # to the very end: there gzip compares its checksum


def read_mpi3d_toy(path, facts):
    """mpi3d_toy.npz: a zip archive with images.npy, uint8 (1036800, 64, 64, 3), 12 GB."""
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        np.lib.format.read_magic(file)  # the first 8 bytes
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        expected = (facts["images"], *SHAPE, "uint8", False)
        expect("images", (*shape, dtype.name, fortran_order), expected)
        for _ in range(facts["images"]):
            yield np.frombuffer(file.read(math.prod(SHAPE)), np.uint8).reshape(SHAPE)
        expect("bytes after the last image", len(file.read(1)), 0)  # makes zip check its checksum


def read_celeba(path, facts):
    """A folder or .zip of .jpg files, yielded in the order of the attribute list."""
    folder = path
    if path.is_file():
        folder = zipfile.Path(path, "img_align_celeba/")
        found = [entry.name for entry in folder.parent.iterdir()]
        expect("first entry", found[:1], ["img_align_celeba"])
    for name in facts["names"]:
        with readable(folder / name, facts["advice"]):
            packed = (folder / name).read_bytes()
            try:
                photo = Image.open(io.BytesIO(packed), formats=["JPEG"])
            except UnidentifiedImageError:  # its own text shows a BytesIO
                raise ValueError(f"begins with {packed[:4]}, expected a JPEG file") from None
            expect("size", photo.size, (178, 218))
            # Paper: "resized", with no word on a crop. Some cut to the middle 148; the full width
            # keeps hair and hats.
            face = ImageOps.fit(photo.convert("RGB"), (SIZE, SIZE), Image.LANCZOS)
        yield np.asarray(face)


def read_celeba_attributes(data_dir, facts, device):
    """list_attr_celeba.csv or .txt -> names of files, factors, labels bool (images, F)."""
    path = data_dir / "list_attr_celeba.csv"
    if not path.exists():
        path = data_dir / "list_attr_celeba.txt"
    with readable(path, facts["advice"]):
        text = path.read_text(encoding="utf-8-sig").replace(",", " ")  # sig: a mark of Windows
        # More than one word: the .txt begins with a count, which is not needed.
        head, *rows = [line for line in text.splitlines() if len(line.split()) > 1]
        attributes = head.removeprefix("image_id").split()  # the .csv names this column too
        expect("images", len(rows), facts["images"])
        expect("words in a row", len(rows[0].split()), 1 + len(attributes))
        columns = range(1, 1 + len(attributes))
        labels = np.loadtxt(rows, dtype=np.int8, usecols=columns, ndmin=2)  # (images, F)
        expect("attribute values", np.unique(labels).tolist(), [-1, 1])
    return dict(names=[row.split()[0] for row in rows], factors=dict.fromkeys(attributes, 2),
                labels=torch.from_numpy(labels > 0).to(device))


READERS = {"shapes3d": read_shapes3d, "cars3d": read_cars3d, "mpi3d_toy": read_mpi3d_toy,
           "celeba": read_celeba}

if __name__ == "__main__":
    run(main)
