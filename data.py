"""Images with known factors: four real datasets, and a rendered twin of Shapes3D that needs no download.

The twin is a drawing of the same room, objects and colours, for the same 480,000 combinations of factors in the same
order. It is not the data: textures are missing, and a score on it is not a score on Shapes3D.

This is the input of every stage. `load("shapes3d")` returns one small object, whatever lies behind it (a renderer, a
memory-mapped file, a tensor on the GPU): ask it for images by index, and for the factors that an index stands for.
First reading: `load` and `Dataset` at the end, then the rendered twin in the middle; shared helpers and official files
can wait. Try it alone: `python data.py --dataset shapes3d` prints what was found (source, number of images, factors and
their sizes) and draws out/data-shapes3d.png, a grid with one row per factor in which only that factor changes.
"""

import argparse
import contextlib
import functools
import io
import math
import os
import sys
import tarfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ---- Shared helpers: errors, the command line, files, pictures (train.py and evaluate.py use them too) --------------
class UserError(Exception):
    """A mistake that the user can mend. Its text is ONE line: what was found, what was expected, what to do."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line on stderr and exit code 2; --help shows every default."""

    def __init__(self, **kwargs):
        kwargs = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | kwargs
        super().__init__(allow_abbrev=False, **kwargs)  # or --see would pass for --seed

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Call main() and end as a command should: an error in one line and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    # OSError: disk full, no permission, a file where a folder should be. The system's own words name the path. And a
    # GPU's memory is full: smaller batches are the way out. Every other exception is a bug of ours, and keeps its
    # traceback.
    except (UserError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it over `path` on success, delete it on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps two runs apart. It goes in front, because Pillow and NumPy look at how a name ends.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)  # atomic: a reader finds the old file or the whole new one
    finally:
        temporary.unlink(missing_ok=True)  # after the rename there is nothing left to delete


def image_grid(images, row_labels=None, col_labels=None, title=None, scale=1):
    """Draw uint8 images (R, C, 3, H, W) with R row and C column labels, every pixel `scale` wide, as a PIL.Image."""
    tiles = torch.as_tensor(images).cpu().repeat_interleave(scale, 3).repeat_interleave(scale, 4).movedim(2, 4)
    R, C, H, W, _ = tiles.shape  # (R, C, scale H, scale W, 3)
    rows, cols, titles = ([str(text) for text in texts or []] for texts in (row_labels, col_labels, title and [title]))
    font, line, gap = ImageFont.load_default(size=13), 18, 2
    rows_width, cols_width, title_width = (max([math.ceil(font.getlength(text)) + 8 for text in texts], default=0)
                                           for texts in (rows, cols, titles))
    left, top = rows_width, line * (bool(titles) + bool(cols))
    pitch = max(W, cols_width) + gap  # columns move apart where a label is wider than an image
    sheet = Image.new("RGB", (max(left + C * pitch, title_width), top + R * (H + gap)), "white")
    # Text, its place, and which point of it goes there: left, middle or right, at the vertical middle.
    texts = [(text, (4, line / 2), "lm") for text in titles]
    texts += [(text, (left + c * pitch + W / 2, top - line / 2), "mm") for c, text in enumerate(cols)]
    texts += [(text, (left - 4, top + r * (H + gap) + H / 2), "rm") for r, text in enumerate(rows)]
    for text, place, anchor in texts:
        ImageDraw.Draw(sheet).text(place, text, fill="black", font=font, anchor=anchor)
    for r, c in np.ndindex(R, C):
        sheet.paste(Image.fromarray(tiles[r, c].contiguous().numpy()), (left + c * pitch, top + r * (H + gap)))
    return sheet


# ---- The rendered twin of Shapes3D ----------------------------------------------------------------------------------
# A room with a coloured floor and walls, one coloured object, and a camera that circles the object. Scale, shape and
# orientation decide what is seen where (8 * 4 * 15 = 480 cases); the three hues only paint it. And light is linear:
# twice the colour gives twice the pixel. So each of the 480 cases is drawn ONCE, as five weight maps that say how much
# of the floor colour, wall colour, object colour, sky colour and white reaches each pixel; an image is the sum of five
# maps times five colours. That makes all 480,000 images cheap without storing one of them.
#
# Points and directions are tensors (3, n), or (3, 1) for a single one: x right, y away from the camera at orientation
# 7, z up, floor at z = 0, object on the z axis. The unit of length puts the camera 2.5 from that axis. All numbers
# were fitted to real frames. The original's faint wall and floor patterns are left out: they would gain 0.1 dB.


def vector(x, y, z):
    """Three numbers as a column, float32 (3, 1)."""
    return torch.tensor([x, y, z], dtype=torch.float32)[:, None]


SIZE, OVER, SQUARE = 64, 3, (64, 64)  # images are 64x64, drawn with OVER samples per pixel and side, at 192x192
FOCAL = SIZE / 2 / math.tan(math.radians(25))  # 68.62 pixels: a vertical field of view of 50 degrees
WALL_AT, WALL_HEIGHT = 3.5, 2.0  # walls at x = +-3.5 and y = 3.5, no ceiling, so sky above
UP, LIGHT = vector(0, 0, 1), vector(-1.5, 0.5, 7.5)  # a spot light that points straight down
AMBIENT = {"floor": 0.354, "wall": 0.352, "object": 0.364}
HEADLIGHT, SPOT, SHADOW = 0.58, 0.95, 0.337  # SHADOW is all the light that a floor point in shadow gets
HIGHLIGHT, HIGHLIGHT_FROM = 0.118, vector(-0.255, 0.168, 0.952)  # white added to surfaces that face this way
# Radius (cube: half a side) and half-height of the straight part, both at scale 1.
SHAPES = {"cube": (0.350, 0.350), "cylinder": (0.3735, 0.375), "sphere": (0.4236, 0.0), "capsule": (0.3228, 0.3267)}
PALETTE = torch.tensor([[255, 0, 0], [255, 153, 0], [204, 255, 0], [51, 255, 0], [0, 255, 102], [0, 255, 255],
                        [0, 102, 255], [51, 0, 255], [204, 0, 255], [255, 0, 153],  # HSV(k/10, 1, 1), k = 0 to 9
                        [153, 226, 249], [255, 255, 255]])  # rows 10 and 11: sky and white


def camera(orientation):
    """Camera at orientation 0..14 (-30 to 30 degrees): centre (3, 1), forward (3, 1), rays (3, 192*192).

    Every ray has length 1 along forward, so the factor that stretches it to a point is that point's depth.
    """
    t = (orientation - 7) / 7 * math.radians(30)
    centre = vector(2.5 * math.sin(t), -2.5 * math.cos(t), 0.75)
    forward, right = vector(-math.sin(t), math.cos(t), 0), vector(math.cos(t), math.sin(t), 0)
    n = SIZE * OVER
    offset = (torch.arange(n) + 0.5 - n / 2) / OVER / FOCAL  # (n,) sample centres, from left to right or top to bottom
    v, u = torch.meshgrid(offset, offset, indexing="ij")
    return centre, forward, forward + u.reshape(1, -1) * right - v.reshape(1, -1) * UP  # rays: (3, n*n)


def shade(kind, points, normals, forward):
    """Brightness (n,) of points (3, n) with outward unit normals (3, n): ambient + headlight + spot light."""
    headlight = -(normals * forward).sum(0)  # from the camera's direction, whatever the distance
    to_light = torch.nn.functional.normalize(LIGHT - points, dim=0)  # (3, n)
    spot = (normals * to_light).sum(0).clamp(min=0) * to_light[2] ** 10  # cosine law, times the cone's fall-off
    return AMBIENT[kind] + HEADLIGHT * headlight.clamp(min=0) + SPOT * spot


def draw_room(centre, forward, rays):
    """The empty room: shade of floor and of walls, and 1 for sky, each 0 elsewhere (3, n); the points seen (3, n)."""
    x, y, z = rays
    to_floor = torch.where(z < 0, -centre[2] / z, torch.inf)
    to_side = (x.sign() * WALL_AT - centre[0]) / x  # left or right wall, whichever lies ahead
    to_back = (WALL_AT - centre[1]) / y  # y > 0 always: the camera never turns that far
    to_wall = torch.minimum(to_side, to_back)
    points = centre + torch.minimum(to_floor, to_wall) * rays
    floor = to_floor < to_wall
    wall = ~floor & (points[2] < WALL_HEIGHT)
    side = (to_side < to_back).float()
    inwards = torch.stack([-x.sign() * side, side - 1, 0 * z])  # (3, n) normals of the walls
    return torch.stack([floor * shade("floor", points, UP, forward), wall * shade("wall", points, inwards, forward),
                        ~(floor | wall)]), points


def slab(o, d, half):
    """Depths (near, far), each (n,), between which the coordinate o + depth d lies within +-half."""
    a, b = (-half - o) / d, (half - o) / d
    return torch.minimum(a, b), torch.maximum(a, b)


def ball(o, d, radius):
    """Depths (near, far) between which |o + depth d| < radius: a ball in 3 axes, an endless upright bar in 2."""
    a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - radius ** 2
    root = (b * b - a * c).sqrt()  # solves a depth^2 + 2 b depth + c = 0; nan for a miss
    return (-b - root) / a, (-b + root) / a


def first_hit(shape, radius, half, o, d):
    """Depth (n,) at which rays o + depth d, each (3, n), enter an object centred at 0; inf where they miss it.

    A ray is inside a convex solid for one interval of depths, and to cut two solids is to cut their intervals: a cube
    is where three slabs meet, a cylinder where a bar meets a slab, a capsule a cylinder joined with two balls.
    """
    solids = []  # each a list of intervals that must overlap
    if shape == "cube":
        solids += [[slab(o[axis], d[axis], radius) for axis in range(3)]]
    if shape in ("cylinder", "capsule"):
        solids += [[ball(o[:2], d[:2], radius), slab(o[2], d[2], half)]]
    if shape in ("sphere", "capsule"):
        solids += [[ball(o - end * UP, d, radius)] for end in {half, -half}]  # half = 0 for a sphere: one ball
    depths = []
    for solid in solids:
        near, far = torch.stack([near for near, _ in solid]).amax(0), torch.stack([far for _, far in solid]).amin(0)
        depths.append(torch.where(near < far, near, torch.inf))  # nan < nan is false: a miss
    return torch.stack(depths).amin(0)


def outward(shape, radius, half, points):
    """Unit normals (3, n) at surface points (3, n) of an object centred at 0."""
    if shape == "cube":  # the face is the axis along which the point is furthest out
        return torch.where(points.abs() == points.abs().amax(0), points.sign(), 0.0)
    lid = points[2].abs() > 0.9999 * half  # on a cylinder's flat ends; 0.9999 forgives rounding
    if shape == "cylinder":
        return torch.where(lid, points[2].sign() * UP, points * vector(1, 1, 0) / radius)
    return (points - points[2].clamp(-half, half) * UP) / radius  # away from the nearest point of the capsule's axis


@functools.lru_cache(maxsize=1)
def weight_maps():
    """All 480 geometries in index order: float16 (480, 5, 4096); the 5 are floor, wall, object, sky, white."""
    # On the CPU, so that a sample on an edge falls on the same side for every device; and on one thread (3 s), because
    # two gain nothing on arrays this small, and wait for each other for minutes when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The Lanczos filter shrinks one side of a picture: weights sinc(d) sinc(d/3), with d in output pixels, |d| < 3.
    d = (torch.arange(SIZE * OVER)[None, :] - (OVER * torch.arange(SIZE)[:, None] + 1)) / OVER  # (64, 192)
    shrink = torch.where(d.abs() < 3, torch.sinc(d) * torch.sinc(d / 3), 0.0)
    shrink = shrink / shrink.sum(1, keepdim=True)
    maps = torch.zeros(8, len(SHAPES), 15, 5, *SQUARE)
    for orientation in range(15):
        centre, forward, rays = camera(orientation)
        room, points = draw_room(centre, forward, rays)  # shared by the 32 objects that may stand in it
        floor = room[0] > 0
        ground = points[:, floor]
        for scale, k in np.ndindex(8, len(SHAPES)):
            shape, (radius, half) = list(SHAPES.items())[k]
            s = 0.75 + 0.5 * scale / 7  # the values linspace(0.75, 1.25, 8)
            size = shape, s * radius, s * half
            middle = s * (half if shape in ("cube", "cylinder") else half + radius) * UP  # it stands on the floor
            picture = torch.zeros(5, rays.shape[1])
            picture[[0, 1, 3]] = room
            # A floor point lies in shadow if the way from it to the light meets the object.
            blocked = first_hit(*size, ground - middle, LIGHT - ground).isfinite()
            picture[0, floor] = torch.where(blocked, SHADOW, room[0, floor])
            # Nothing in the room can stand in front of the object: where it is hit, it is what we see.
            depth = first_hit(*size, (centre - middle).expand_as(rays), rays)
            seen = depth.isfinite()
            surface = centre + depth[seen] * rays[:, seen]
            normals = outward(*size, surface - middle)
            picture[:, seen] = 0
            picture[2, seen] = shade("object", surface, normals, forward)
            picture[4, seen] = HIGHLIGHT * ((normals * HIGHLIGHT_FROM).sum(0) > 0)  # a step, as in the original
            maps[scale, k, orientation] = shrink @ picture.view(5, SIZE * OVER, -1) @ shrink.T  # (5, 64, 64)
    torch.set_num_threads(threads)
    return maps.view(480, 5, SIZE * SIZE).half()


def rendered(device):
    """The function idx int64 (B,) -> uint8 (B, 3, 64, 64) of the rendered twin."""
    # float32 is what CPUs multiply fastest. Having been float16, the values also survive a GPU's TF32 products
    # unrounded, so that every device draws the same picture.
    maps, palette = weight_maps().to(device, torch.float32), PALETTE.to(device, torch.float32)

    def draw(idx):
        rows = [idx // 48000, idx // 4800 % 10, idx // 480 % 10, 0 * idx + 10, 0 * idx + 11]  # of PALETTE
        colours = palette[torch.stack(rows, 1)].mT  # (B, 3, 5)
        pixels = colours @ maps.index_select(0, idx % 480)  # (B, 3, 5) @ (B, 5, 4096) = (B, 3, 4096)
        # Clipped only now, after shrinking, like the original: that keeps the ringing beside sharp edges.
        return pixels.round_().clamp_(0, 255).to(torch.uint8).view(-1, 3, *SQUARE)  # (B, 3, 64, 64)

    # 64 images at a time (5 MB of maps) stay in a CPU's cache: 3 times faster than 512. A GPU wants all at once.
    piece = 64 if device.type == "cpu" else 480_000
    return lambda idx: torch.cat([draw(part) for part in idx.to(device).split(piece)])  # (B, 3, 64, 64)


# ---- The official files ---------------------------------------------------------------------------------------------
# Each reader checks a file and yields its images in index order, in uint8 pieces (n, 64, 64, 3). convert() writes them
# ONCE to a plain .npy file, which is then memory-mapped: a batch reads only its own images from disk.
PIECE = 1024  # images read at a time, 12.6 MB: to unpack them needs several times that


@contextlib.contextmanager
def readable(path, advice):
    """Turn trouble while reading `path` into one clear line: each file library has errors of its own for damage."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, UserError) else " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {reason}; if it is damaged or not the official file, {advice}") from error


def expect(what, found, expected):
    """UserError unless found equals expected."""
    if found != expected:
        raise UserError(f"{what}: found {found}, expected {expected}")


def read_shapes3d(path, facts):
    """3dshapes.h5: images uint8 (480000, 64, 64, 3) and labels float (480000, 6), the factor values of each."""
    import h5py  # here and not above: nothing else needs it
    with readable(path, facts["advice"]), h5py.File(path) as file:
        images, labels = file["images"], file["labels"][:]
        expect("images", (images.dtype.name, *images.shape), ("uint8", facts["images"], *SQUARE, 3))
        # Published libraries have had the factor order wrong. So turn each column of values (0.75 ... 1.25) into value
        # indices (0 ... 7), and compare all of them with the row-major order that Dataset.factors() computes.
        found = [np.unique(column, return_inverse=True)[1].reshape(-1) for column in labels.T]
        grid = np.indices(tuple(facts["factors"].values())).reshape(len(facts["factors"]), -1)  # (F, images)
        expect("labels in row-major order of the factors", np.array_equal(found, grid), True)
        for start in range(0, len(images), PIECE):
            yield images[start:start + PIECE]


def read_cars3d(path, facts):
    """One .mat file per car, in a folder or the archive: key im, uint8 (128, 128, 3, 24 azimuths, 4 elevations)."""
    import scipy.io  # slow to import, like h5py, so only here
    (elevations, azimuths, types), folder, cars = facts["factors"].values(), path.is_dir(), {}
    with (readable(path, facts["advice"]),
          contextlib.nullcontext(path.glob("car_*.mat")) if folder else tarfile.open(path) as entries):
        for entry in entries:  # the archive also holds that paper's other datasets
            if folder or Path(entry.name).match("cars/car_*.mat"):
                im = scipy.io.loadmat(entry if folder else entries.extractfile(entry))["im"]
                expect(entry.name, (im.dtype.name, *im.shape), ("uint8", 128, 128, 3, azimuths, elevations))
                views = im.transpose(4, 3, 0, 1, 2).reshape(-1, *im.shape[:3])  # (elevations * azimuths, 128, 128, 3)
                views = [Image.fromarray(view).resize(SQUARE, Image.LANCZOS) for view in views]
                cars[Path(entry.name).name] = np.stack(views)  # (elevations * azimuths, 64, 64, 3)
        expect("cars", len(cars), types)
        while not folder and entries.fileobj.read(1 << 20):
            pass  # to the very end: there gzip compares its checksum
    # Row-major in (elevation, azimuth, object type): the car changes fastest. Which car is number 0 is only a name:
    # disentanglement_lib takes the order of the folder on disk, we sort.
    for view in range(elevations * azimuths):
        yield np.stack([cars[name][view] for name in sorted(cars)])  # (cars, 64, 64, 3)


def read_mpi3d_toy(path, facts):
    """mpi3d_toy.npz: a zip archive with images.npy, uint8 (1036800, 64, 64, 3). 12 GB, so read piece by piece."""
    with readable(path, facts["advice"]), zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        np.lib.format.read_magic(file)  # the first 8 bytes; then shape, column-major or not, dtype
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        expect("images", (dtype.name, fortran_order, *shape), ("uint8", False, facts["images"], *SQUARE, 3))
        for start in range(0, shape[0], PIECE):
            n = min(PIECE, shape[0] - start)
            yield np.frombuffer(file.read(n * SIZE * SIZE * 3), np.uint8).reshape(n, *SQUARE, 3)
        expect("bytes after the last image", len(file.read(1)), 0)  # zip compares its checksum only at the end


def shrink_face(name, packed):
    """The bytes of one .jpg file, 178 x 218 -> its central square, uint8 (64, 64, 3). UserError names the file."""
    # Paper: "resized", with no word on a crop. Some cut to the middle 148; the full width keeps hair and hats.
    try:
        with Image.open(io.BytesIO(packed), formats=["JPEG"]) as photo:
            expect("size", photo.size, (178, 218))
            return np.asarray(ImageOps.fit(photo.convert("RGB"), SQUARE, Image.LANCZOS))
    except Exception as error:
        raise UserError(f"{name}: {error}") from error


def read_celeba(path, facts):
    """A folder or .zip of .jpg files, yielded in the order of the attribute list."""
    # Threads, not processes: Pillow unpacks and resizes without holding Python's lock.
    with readable(path, facts["advice"]), ThreadPoolExecutor() as pool:
        folder = path if path.is_dir() else zipfile.Path(path, "img_align_celeba/")
        for start in range(0, facts["images"], PIECE):
            names = facts["files"][start:start + PIECE]
            packed = [(folder / name).read_bytes() for name in names]  # here: the threads would share one file
            yield np.stack(list(pool.map(shrink_face, names, packed)))  # (PIECE, 64, 64, 3)


def read_celeba_attributes(data_dir, facts):
    """list_attr_celeba.txt or .csv -> facts with files (names), factors (attribute -> 2), labels bool (images, F)."""
    path = data_dir / "list_attr_celeba.csv"
    path = path if path.exists() else path.with_suffix(".txt")
    if not path.exists():
        raise UserError(f"celeba: no {path.name} (or .csv) in {data_dir}; {facts['advice']} and put it there")
    with readable(path, facts["advice"]):
        # More than one word: the .txt begins with a count, which is not needed.
        head, *rows = [row for row in path.read_text().replace(",", " ").splitlines() if len(row.split()) > 1]
        names = [word for word in head.split() if word != "image_id"]  # the .csv names its first column too
        expect("images", len(rows), facts["images"])
        expect("words in a row", {len(row.split()) for row in rows}, {1 + len(names)})
        labels = np.loadtxt(rows, dtype=np.int8, usecols=range(1, len(names) + 1), ndmin=2)  # (images, F)
        expect("attribute values", sorted(np.unique(labels).tolist()), [-1, 1])
    return facts | dict(files=[row.split()[0] for row in rows], factors=dict.fromkeys(names, 2), labels=labels > 0)


def convert(path, npy, facts):
    """Write the official images at `path` to the file `npy`, or nothing at all. UserError: no room, no permission."""
    # A killed run could not delete its temporary file, which is large. One that nobody wrote to for an hour is such.
    for left in npy.parent.glob(f".*-{npy.name}"):
        if time.time() - left.stat().st_mtime > 3600:
            left.unlink()
    header = dict(descr="|u1", fortran_order=False, shape=(facts["images"], *SQUARE, 3))
    try:
        with replacing(npy) as temporary, open(temporary, "wb") as file, \
                tqdm(total=facts["images"], unit=" images", desc=f"converting {path.name}, once") as bar:
            np.lib.format.write_array_header_1_0(file, header)
            for piece in facts["read"](path, facts):
                file.write(np.ascontiguousarray(piece))
                bar.update(len(piece))
    except OSError as error:  # of writing: readable() has turned those of reading
        size = facts["images"] * SIZE * SIZE * 3 / 1e9
        raise UserError(f"cannot write {npy} ({error.strerror}); make room there for {size:.1f} GB") from error


# Factors in the files' own order. The official file is looked for under --data_dir at each of `paths`, and the last
# one found counts (unpacked is faster than packed, and Kaggle's copy of CelebA is nested twice).
DATASETS = {
    "shapes3d": dict(
        read=read_shapes3d, paths=["3dshapes.h5"], images=480_000,
        advice="get it from https://github.com/google-deepmind/3d-shapes",
        factors={"floor hue": 10, "wall hue": 10, "object hue": 10, "scale": 8, "shape": 4, "orientation": 15}),
    "cars3d": dict(
        read=read_cars3d, paths=["nips2015-analogy-data.tar.gz", "data/cars", "cars"],
        advice="get it from http://www.scottreed.info/files/nips2015-analogy-data.tar.gz", images=17_568,
        factors={"elevation": 4, "azimuth": 24, "object type": 183}),
    "mpi3d_toy": dict(
        read=read_mpi3d_toy, paths=["mpi3d_toy.npz"], images=1_036_800,
        advice="get it from https://github.com/rr-learning/disentanglement_dataset",
        factors={"object colour": 6, "object shape": 6, "object size": 2, "camera height": 3, "background colour": 3,
                 "first DOF": 40, "second DOF": 40}),
    "celeba": dict(  # its 40 factors are named in list_attr_celeba
        read=read_celeba, images=202_599,
        paths=["img_align_celeba.zip", "img_align_celeba", "img_align_celeba/img_align_celeba"],
        advice="get it from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", factors={}),
}


def stored(npy, facts, device):
    """The function idx int64 (B,) -> uint8 (B, 3, 64, 64) of a converted file, held on the GPU if it is small."""
    with readable(npy, "delete it, and the next run makes it again"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the file cannot be written to: fine
        pixels = torch.from_numpy(np.load(npy, mmap_mode="r"))  # (images, 64, 64, 3), still on disk
        expect("images", (pixels.dtype, *pixels.shape), (torch.uint8, facts["images"], *SQUARE, 3))
    # At most half of the free memory: the networks need the rest.
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        pixels = pixels.to(device)
    return lambda idx: pixels[idx.to(pixels.device)].to(device).permute(0, 3, 1, 2).contiguous()


# ---- load() ---------------------------------------------------------------------------------------------------------
class Dataset:
    """Images by index, and the factors that an index stands for; every answer is a tensor on `device`.

    source is "rendered" or "official", source_note says where the images come from, len() counts them;
    factor_names are F texts, factor_sizes F whole numbers.
    """

    def __init__(self, name, source, source_note, images, facts, device):
        self.name, self.source, self.source_note, self.device = name, source, source_note, device
        self.factor_names, self.factor_sizes = list(facts["factors"]), list(facts["factors"].values())
        self._images, self._count = images, facts["images"]
        # Row-major: the factors are the digits of the index, and the last one changes fastest.
        self._sizes = torch.tensor(self.factor_sizes, device=device)
        self._steps = self._sizes.flip(0).cumprod(0).flip(0) // self._sizes  # (F,) product of the sizes after f
        # CelebA is no grid (nobody has photographed all 2^40 combinations): its factors are looked up instead.
        self._labels = torch.from_numpy(facts["labels"]).to(device) if "labels" in facts else None

    def __len__(self):
        return self._count

    def _check(self, idx):
        # CPU indices only: to look at values on a GPU, the CPU would have to wait for it at every batch.
        if idx.device.type == "cpu" and len(idx) and (idx.min() < 0 or idx.max() >= len(self)):
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}, asked for {idx.min()} to {idx.max()}")

    def images(self, idx):
        """idx int64 (B,), on any device -> uint8 (B, 3, 64, 64). IndexError if a CPU index is out of range."""
        self._check(idx)
        return self._images(idx)

    def factors(self, idx):
        """idx int64 (B,) -> int64 (B, F), the value index of every factor. IndexError as for images()."""
        self._check(idx)
        idx = idx.to(self.device)
        return idx[:, None] // self._steps % self._sizes if self._labels is None else self._labels[idx].long()

    def index(self, factors):
        """factors int64 (B, F) -> idx int64 (B,), the inverse of factors(). UserError where images are no grid."""
        if self._labels is not None:
            raise UserError(f"{self.name} is not a grid of factors: no image can be looked up by its attributes")
        return (factors.to(self.device) * self._steps).sum(1)  # (B,)


def load(dataset, data_dir="data", source="auto", device="cpu"):
    """Open a Dataset; "auto" is official, or rendered for shapes3d without its file. UserError: unknown, missing,
    damaged."""
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if source not in ("auto", "official", "rendered") or (source == "rendered" and dataset != "shapes3d"):
        raise UserError(f"{dataset} has no source {source!r}: choose auto or official (or rendered, for shapes3d only)")
    facts, device, data_dir = DATASETS[dataset], torch.device(device), Path(data_dir)
    npy = data_dir / f"{dataset}-64x64.npy"  # once this is made, the official file may go
    found = [data_dir / path for path in facts["paths"] if (data_dir / path).exists()]
    lack = "" if found or npy.exists() else f"no {facts['paths'][0]} in {data_dir}"
    if dataset == "shapes3d" and (source == "rendered" or source == "auto" and lack):
        note = f"{lack or 'as asked'}: the rendered twin of Shapes3D, drawn here; its scores are not Shapes3D's"
        return Dataset(dataset, "rendered", note, rendered(device), facts, device)
    if lack:
        raise UserError(f"{dataset}: {lack}; {facts['advice']} and put it there, or name its folder with --data_dir")
    if dataset == "celeba":
        facts = read_celeba_attributes(data_dir, facts)
    if not npy.exists():
        convert(found[-1], npy, facts)
    return Dataset(dataset, "official", f"official images, from {npy}", stored(npy, facts, device), facts, device)


def sample_grid(data, generator, columns=15):
    """A PIL.Image with one row per factor: it takes its values from left to right, the others stay as in one image."""
    start = data.factors(torch.randint(len(data), (1,), generator=generator))  # (1, F)
    held = data.factors(torch.arange(len(data))) if data.name == "celeba" else None  # (images, F)
    rows, labels, what = [], [], "in each row only one factor changes; the column is its value"
    for f, (name, size) in enumerate(zip(data.factor_names, data.factor_sizes)):
        step = math.ceil(size / columns)  # a factor of many values skips some
        values = torch.arange(0, size, step)
        if held is not None:  # CelebA is no grid: show images that have the attribute
            idx, what = held[:, f].nonzero()[:columns, 0], "each row shows faces that have the attribute"
        else:
            factors = start.repeat(len(values), 1)  # (values, F)
            factors[:, f] = values
            idx = data.index(factors)
        blank = torch.full((columns - len(idx), 3, *SQUARE), 255, dtype=torch.uint8)
        rows.append(torch.cat([data.images(idx), blank]))  # (columns, 3, 64, 64)
        labels.append(name if step == 1 else f"{name} (times {step})")
    return image_grid(torch.stack(rows), labels, range(columns), f"{data.name}, {data.source}: {what}")


def main():
    """Print what a dataset holds, and draw its sample grid."""
    parser = Parser(description="Say what a dataset holds, and draw a sample grid with one row per factor.")
    parser.add_argument("--dataset", default="shapes3d", choices=DATASETS, help="which images")
    parser.add_argument("--data_dir", default="data", help="folder with the official files")
    parser.add_argument("--source", default="auto", choices=["auto", "official", "rendered"], help="official if there")
    parser.add_argument("--out", help="picture to write; None means out/data-DATASET.png")
    parser.add_argument("--seed", type=int, default=0, help="picks the image that all rows start from")
    args = parser.parse_args()
    data = load(args.dataset, args.data_dir, args.source)
    print(f"{data.name}: {len(data):,} images, {data.source} ({data.source_note})")
    print("factors:", ", ".join(f"{name} {size}" for name, size in zip(data.factor_names, data.factor_sizes)))
    out = Path(args.out or f"out/data-{data.name}.png")
    with replacing(out) as temporary:
        sample_grid(data, torch.Generator().manual_seed(args.seed)).save(temporary, format="PNG")
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
