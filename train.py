"""Train the whole method (Algorithm 1): wires data, stage 1, extractor, U-Net and anchors into one run, one checkpoint.

    python train.py --dataset shapes3d                  # the laptop preset on a CPU, the paper's on a GPU
    python train.py --dataset shapes3d --preset tiny    # seconds: does everything, learns nothing
    python train.py --dataset shapes3d --resume         # go on where the last checkpoint in --out stopped

Everything is written to --out (default out/DATASET-PRESET): ckpt.pt (all that evaluate.py needs), log.jsonl, loss.png
and samples.png (rows: input, stage-1 reconstruction, DDIM sample from the image's own units).

One step of stage 2, as data sees it:

    idx -> x0 (B,3,64,64) -> extractor -> c (B,N,D) -> dyga.align -> c~ (B,N,D) -------.
       `-> frozen stage-1 encoder -> z0 -> add noise eps at time t -> z_t -> unet(z_t, t, c~) = eps^ -> |eps^ - eps|
"""

import argparse
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from data import UserError
from dyga import DyGA
from extractor import Extractor
from unet import UNet, alpha_bar_schedule, ddim, diffusion_loss, ema_update
from vqgan import VQGAN, Stage1, to_float, to_uint8

FORMAT = 1  # version of the checkpoint's layout

# ----------------------------------------------------------------------------------------------------------------------
# Settings: default < preset < dataset < flag. The defaults are the paper's (Tables 7 to 9 and C.1).

SETTINGS = {
    "stage 1 (vqgan.py, Table 7)": [
        ("vq_channels", 32, "width of the first convolution"),
        ("vq_multipliers", [1, 2, 4], "width of each level; every level but the last halves the size"),
        ("vq_res_blocks", 2, "residual blocks per level"),
        ("vq_patch", 1, "fold patches of this side into channels first"),
        ("z_channels", 3, "numbers per latent position"),
        ("codebook_size", 2048, "codes"),
        ("disc_weight", 0.75, "weight of the adversarial loss; 0 leaves the discriminator out"),
        ("disc_width", 64, "width of the discriminator's first layer"),
        ("vq_lr", 2e-4, "learning rate of stage 1 (not in the paper)"),
        ("vq_batch", 64, "batch of stage 1 (not in the paper)"),
        ("stage1_images", 2_000_000, "images that stage 1 sees (not in the paper)")],
    "extractor (extractor.py, Table 9)": [
        ("n_units", 20, "N latent units (not in the paper; its released configuration)"),
        ("unit_dim", 32, "D numbers per unit"),
        ("ext_channels", [64, 128, 256, 256, 256], "channels of the convolutions; all but the first halve the size"),
        ("ext_hidden", [4096, 256], "widths between the CNN and the N scalars"),
        ("unit_hidden", [256, 512], "widths inside each unit's private MLP"),
        ("ext_shrink", 1, "average the image over squares of this side first"),
        ("unit_relu", True, "end each unit in a ReLU")],
    "U-Net and diffusion (unet.py, Table 8)": [
        ("base", 64, "channels of the first level"),
        ("multipliers", [1, 2, 4, 4], "width of each level"),
        ("res_blocks", 2, "residual blocks per level"),
        ("attention_at", [1, 2, 4], "downsampling factors with cross-attention to the units"),
        ("heads", 8, "attention heads"),
        ("self_attention", True, "self-attention beside the cross-attention"),
        ("dropout", 0.1, "dropout inside residual blocks"),
        ("skip_dropout", 0.2, "chance of a skip channel to be dropped (section 3.3); 0 switches it off"),
        ("skip_dropout_where", "released", "which skips: the released code's rule, or the paper's text"),
        ("backbone_dropout", 0.0, "drop backbone channels there too (Table 12's control)"),
        ("timesteps", 1000, "T, length of the noise schedule"),
        ("ddim_steps", 100, "steps of a DDIM sample")],
    "anchors (dyga.py, section 3.2)": [
        ("anchors", "dyga", "dyga, or none (with --skip_dropout 0: the EncDiff baseline)"),
        ("lam", 0.1, "lambda of equation 6: how far units are pulled towards their anchors"),
        ("k_init", 8, "anchors per unit at first"),
        ("k_max", 32, "anchors per unit at most"),
        ("accept", "always", "keep every split, or only those that raise the BIC"),
        ("epoch_images", 0, "length of an epoch in images; 0 is the whole dataset"),
        ("fit_every", 1, "r: epochs between two fits"),
        ("fit_images", 20_000, "images whose units the anchors are fitted to")],
    "training (section C.1)": [
        ("images", 10_000_000, "images that stage 2 sees (not in the paper)"),
        ("batch", 512, "images per step"),
        ("noises", 1, "times and noises drawn for each image of a step"),
        ("t_sampling", "uniform", "how t is drawn; logit_normal prefers the middle of the schedule"),
        ("lr", 1e-4, "learning rate of stage 2"),
        ("weight_decay", 0.01, "AdamW's weight decay"),
        ("warmup", 0, "images over which the learning rate rises from 0"),
        ("decay", 0.0, "last share of the course over which the learning rate falls to 0"),
        ("clip", 0.0, "largest gradient norm; 0 does not clip"),
        ("loss", "l1", "|eps^ - eps| (equation 2 has no square), or its square"),
        ("ema_half_life", 3_550_000, "images after which a weight's part in the average has halved (0.9999 a step)"),
        ("train_images", 0, "train on a fixed random subset of this many images; 0 is the whole dataset"),
        ("compile", False, "torch.compile the U-Net and the extractor")],
}
DEFAULTS = {name: default for group in SETTINGS.values() for name, default, _ in group}
CHOICES = {"skip_dropout_where": ["released", "text"], "anchors": ["dyga", "none"], "accept": ["always", "bic"],
           "loss": ["l1", "mse"], "t_sampling": ["uniform", "logit_normal"]}

PRESETS = {
    "paper": {},
    # For 2 CPU cores and about half an hour. The method is the paper's; the sizes are not.
    "laptop": dict(
        # Stage 1 with 8x8 latents (f = 8), because a 16x16 U-Net costs four times as much per image; no discriminator,
        # which would double the time of a step.
        vq_patch=4, vq_channels=32, vq_multipliers=[1, 2], vq_res_blocks=1, disc_weight=0.0,
        vq_lr=3e-3, vq_batch=16, stage1_images=50_000,
        # The extractor sees the image at 32x32; its private MLPs are a quarter as wide.
        n_units=10, ext_shrink=2, ext_channels=[16, 32, 64, 64], ext_hidden=[256, 128], unit_hidden=[64, 128],
        unit_relu=False,
        # Widths 8 and 4 are both outside [1, 2], so every skip is dropped out.
        base=32, multipliers=[1, 2], res_blocks=1, attention_at=[1, 2], heads=4, self_attention=False, dropout=0.0,
        loss="mse", lr=2e-3, batch=64, warmup=6_400, decay=0.3, clip=1.0, images=420_000, ema_half_life=20_000,
        epoch_images=40_000, fit_images=5_000),
    # For the tests: every part runs, nothing is learnt.
    "tiny": dict(
        vq_patch=4, vq_channels=16, vq_multipliers=[1, 2], vq_res_blocks=1, codebook_size=64, vq_batch=16,
        disc_width=8, vq_lr=2e-3, stage1_images=640,
        n_units=6, ext_shrink=4, ext_channels=[8, 16, 16], ext_hidden=[32, 32], unit_hidden=[16, 16],
        base=16, multipliers=[1, 2], res_blocks=1, attention_at=[1, 2], heads=2,
        lr=1e-3, batch=32, warmup=320, images=1_280, ema_half_life=1_000, epoch_images=640, fit_images=320,
        ddim_steps=10),
}
EXPECTED_MINUTES = {"laptop": 30, "tiny": 0.3}  # on 2 CPU cores
SAVE_MINUTES = 3  # between two checkpoints and their pictures
STAGE1_SHARE = 0.15  # of the time that --minutes gives

# Section C.1: anchors are fitted every 5 epochs on the small Cars3D, every epoch elsewhere; CelebA's batch is smaller.
PER_DATASET = {"cars3d": dict(fit_every=5), "celeba": dict(batch=64)}


def build_parser():
    """Every flag with its help. A setting is None until given, so that `settings` can tell flags from presets."""
    p = data.Parser(description="Train disentangled latent units with a diffusion model. Values in brackets are the "
                    "paper's; a preset changes some of them (see PRESETS), and a flag beats the preset.",
                    formatter_class=argparse.HelpFormatter)
    g = p.add_argument_group("what to run")
    g.add_argument("--dataset", required=True, choices=list(data.DATASETS))
    g.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help="auto: paper on CUDA, laptop on a CPU")
    g.add_argument("--out", help="folder for everything written (default out/DATASET-PRESET)")
    g.add_argument("--data_dir", default="data", help="folder of the datasets' files")
    g.add_argument("--source", default="auto", choices=["auto", "official", "rendered"],
                   help="shapes3d: the official file, or the twin rendered here; auto takes the file if it is there")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--seed", type=int, default=0, help="same seed, same CPU, same numbers")
    g.add_argument("--resume", action="store_true", help="go on from ckpt.pt in --out, with the settings it holds")
    g.add_argument("--minutes", type=float,
                   help="fit the whole course into this many minutes; such a run is not reproducible to the bit")
    g.add_argument("--stage1_only", action="store_true", help="stop after stage 1")
    g.add_argument("--stage1_from", metavar="CKPT", help="take stage 1 from this checkpoint of the same data")
    for title, group in SETTINGS.items():
        g = p.add_argument_group(title)
        for name, default, text in group:
            kind = dict(type=type(default), choices=CHOICES.get(name))
            if isinstance(default, bool):  # --compile and --no-compile
                kind = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(default, list):  # --multipliers 1 2 4 4
                kind = dict(type=int, nargs="+")
            g.add_argument(f"--{name}", **kind, help=f"{text} [{default}]")
    return p


def settings(args):
    """Flags over dataset over preset over defaults: the run's whole configuration as one plain dict."""
    flags = {name: value for name, value in vars(args).items() if name in DEFAULTS and value is not None}
    preset = args.preset
    if preset == "auto":
        preset = "paper" if args.device.type == "cuda" else "laptop"
    cfg = DEFAULTS | PRESETS[preset]
    if preset == "paper":
        cfg |= PER_DATASET.get(args.dataset, {})
    return cfg | flags | {"preset": preset, "seed": args.seed, "minutes": args.minutes}


# ----------------------------------------------------------------------------------------------------------------------
# The model: all four networks, and every way in which they call each other


class Model(nn.Module):
    """Stage 1, extractor, anchors and U-Net together. `cfg` is a dict of settings; see SETTINGS."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vqgan = VQGAN(cfg["vq_channels"], cfg["vq_multipliers"], cfg["vq_res_blocks"], cfg["z_channels"],
                           cfg["codebook_size"], cfg["vq_patch"])
        self.extractor = Extractor(cfg["n_units"], cfg["unit_dim"], cfg["ext_channels"], cfg["ext_hidden"],
                                   cfg["unit_hidden"], shrink=cfg["ext_shrink"], unit_relu=cfg["unit_relu"])
        self.dyga = DyGA(cfg["n_units"], cfg["unit_dim"], cfg["k_init"], cfg["k_max"],
                         lam=cfg["lam"] if cfg["anchors"] == "dyga" else 0.0, accept=cfg["accept"])
        self.unet = UNet(cfg["z_channels"], cfg["base"], cfg["multipliers"], cfg["res_blocks"], cfg["attention_at"],
                         cfg["heads"], cfg["unit_dim"], cfg["dropout"], cfg["skip_dropout"],
                         cfg["skip_dropout_where"], cfg["backbone_dropout"], cfg["self_attention"])
        self.register_buffer("alpha_bar", alpha_bar_schedule(cfg["timesteps"]), persistent=False)
        # Diffusion assumes data of about unit variance. Stage 1's latents are divided by this one number, their
        # standard deviation over all positions and channels (LDM's scale_by_std), before any noise is added.
        self.register_buffer("latent_std", torch.ones(()))

    @torch.no_grad()
    def encode(self, images):
        """Images uint8 (B, 3, H, W) -> scaled latents z0 float (B, z, h, w), before quantisation."""
        return self.vqgan.encode(to_float(images)).float() / self.latent_std

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (B, z, h, w) -> images uint8 (B, 3, H, W); stage 1 quantises on the way."""
        return to_uint8(self.vqgan.decode(z * self.latent_std))

    def reconstruct(self, images):
        """Stage 1 there and back: uint8 (B, 3, H, W) -> uint8 (B, 3, H, W). The best a sample can look."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def units(self, images):
        """Images uint8 (B, 3, H, W) -> latent units c (B, N, D), before alignment."""
        return self.extractor(to_float(images)).float()

    @torch.no_grad()
    def align(self, c):
        """Latent units c (B, N, D) -> c~ (B, N, D), pulled towards their anchors."""
        return self.dyga.align(c)

    def noise(self, count, generator):
        """Starting noise (count, z, h, w) for `sample`, from a CPU generator, so that every device starts alike."""
        side = 64 // self.vqgan.factor
        return torch.randn(count, self.vqgan.z_channels, side, side, generator=generator).to(self.latent_std.device)

    @torch.no_grad()
    def sample(self, c, noise, steps=None, return_attention=False):
        """DDIM images under aligned units c (B, N, D) from `noise` -> uint8 (B, 3, 64, 64).

        With return_attention: (images, maps (B, N, 64, 64)), see `unet.ddim`.
        """
        found = ddim(self.unet, noise, c, self.alpha_bar, steps or self.cfg["ddim_steps"], return_attention)
        if not return_attention:
            return self.decode(found)
        z, maps = found
        images = self.decode(z)
        return images, F.interpolate(maps, size=images.shape[-2:], mode="bilinear")  # (B, N, 64, 64)

    def loss(self, images, z0):
        """Equation 2 for images uint8 (B, 3, H, W) and their latents z0 (B, z, h, w): a scalar, and mean delta."""
        c = self.extractor(to_float(images))  # (B, N, D)
        c, delta = self.dyga.align(c, return_delta=True)  # (B, N, D), (B, N)
        # Several noises per image share the extractor's work and make its gradient less noisy.
        M = self.cfg["noises"]
        loss = diffusion_loss(self.unet, z0.repeat_interleave(M, 0), c.repeat_interleave(M, 0), self.alpha_bar,
                              self.cfg["loss"], self.cfg["t_sampling"])
        return loss, delta.detach().mean()


def read_checkpoint(path):
    """Read a checkpoint of this code safely (plain tensors and values only) -> dict. UserError if it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint written by train.py, such as "
                        "out/shapes3d-laptop/ckpt.pt")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes of any origin can fail in any way; nothing of ours runs inside this try
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: it is damaged, cut short or of "
                        "another program); expected a ckpt.pt written by train.py") from error
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        found = ckpt.get("format", "none") if isinstance(ckpt, dict) else type(ckpt).__name__
        raise UserError(f"{path}: checkpoint format {found}, expected {FORMAT}; train it again with this train.py")
    return ckpt


def load_checkpoint(path, device="cpu"):
    """Checkpoint file -> (model in eval mode with averaged weights and their anchors, the checkpoint's dict)."""
    ckpt = read_checkpoint(path)
    if ckpt["stage"] != 2:
        raise UserError(f"{path}: holds stage 1 only; finish the run with train.py --resume first")
    model = Model(ckpt["config"])
    try:
        model.load_state_dict(ckpt["model"] | ckpt["average"])
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its own configuration; train it again") from error
    return model.to(device).eval(), ckpt


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def plot_curve(path, series, title, xlabel, ylabel, size=(720, 420)):
    """Write a line plot as PNG. series: name -> (xs, ys), two lists of numbers; both axes linear, from least to most."""
    (W, H), left, right, top, bottom = size, 64, 16, 34, 46
    font, image = ImageFont.load_default(size=13), Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    x0, y0 = (min(v for s in series.values() for v in s[axis]) for axis in (0, 1))
    x1, y1 = (max(v for s in series.values() for v in s[axis]) for axis in (0, 1))

    def at(x, y):
        return (left + (x - x0) / (x1 - x0 or 1) * (W - left - right),
                H - bottom - (y - y0) / (y1 - y0 or 1) * (H - top - bottom))

    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        draw.line([at(x0, y), at(x1, y)], fill="#dddddd")
        draw.text((left - 6, at(x0, y)[1]), f"{y:.3g}", fill="black", font=font, anchor="rm")
        draw.text((at(x, y0)[0], H - bottom + 6), f"{x:,.0f}", fill="black", font=font, anchor="mt" if i < 4 else "rt")
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour = ["#1f5fa8", "#c8501e", "#2d8a4b", "#7a3fa0"][i % 4]
        draw.line([at(x, y) for x, y in zip(xs, ys)], fill=colour, width=2)
        draw.text((W - right - 4, top + 16 * i), name, fill=colour, font=font, anchor="rt")
    for place, text, anchor in (((W / 2, 8), title, "mt"), ((W / 2, H - 8), xlabel, "mb"), ((4, top - 4), ylabel, "lb")):
        draw.text(place, text, fill="black", font=font, anchor=anchor)
    with data.replacing(path) as temporary:
        image.save(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# The run


class Averages:
    """Means of whatever is added between two rows of the log. Sums stay on the device: reading a number makes a GPU
    wait, so that happens once a row."""

    def __init__(self):
        self.sums, self.count, self.started = {}, 0, time.perf_counter()

    def add(self, **values):
        self.sums = {name: self.sums.get(name, 0) + value for name, value in values.items()}
        self.count += 1

    def take(self, batch):
        """-> dict of floats, with images per second; starts anew."""
        row = {name: float(value) / self.count for name, value in self.sums.items()}
        row["images_per_s"] = round(self.count * batch / (time.perf_counter() - self.started), 1)
        self.__init__()
        return row


class Run:
    """One training run: the images, the model, and where in the course it is. Its methods are the two stages."""

    def __init__(self, args, cfg, ckpt=None):
        self.cfg, self.out, self.device = cfg, Path(args.out), args.device
        self.log_path, self.ckpt_path = self.out / "log.jsonl", self.out / "ckpt.pt"
        self.data = data.load(args.dataset, args.data_dir, args.source, self.device)
        torch.manual_seed(cfg["seed"])
        self.model = Model(cfg).to(self.device)
        self.stage1 = Stage1(self.model.vqgan, cfg["vq_lr"], cfg["disc_weight"], cfg["disc_width"],
                             restart_images=max(cfg["stage1_images"] // 20, 1))
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        trained = [*self.model.extractor.parameters(), *self.model.unet.parameters()]
        # fused: the whole update in one kernel, where a loop over tensors would start hundreds.
        self.opt = torch.optim.AdamW(trained, lr=cfg["lr"], weight_decay=cfg["weight_decay"], fused=True)
        # Images seen and minutes spent, per stage.
        self.stage, self.seen, self.minutes, self.stopped_by = 1, {1: 0, 2: 0}, {1: 0.0, 2: 0.0}, None
        if ckpt:
            self.take_over(ckpt)
        elif args.stage1_from:
            self.take_stage1(args.stage1_from)
        # The images to train on, a fixed random subset or all; and some of these that the anchors are fitted to.
        draw = torch.Generator().manual_seed(cfg["seed"])
        self.train_idx = torch.randperm(len(self.data), generator=draw)[:cfg["train_images"] or None]
        self.fit_idx = self.train_idx[torch.randperm(len(self.train_idx), generator=draw)[:cfg["fit_images"]]]

    # -- checkpoint and log --

    def save(self):
        """Write everything that the rest of the run depends on, as one file that is always whole."""
        # The average shares the frozen stage 1 and its scale with the model: no need to write them twice.
        average = {k: v for k, v in self.average.state_dict().items() if not k.startswith(("vqgan.", "latent_std"))}
        state = {
            "format": FORMAT, "config": self.cfg, "stage": self.stage, "log_bytes": self.log_path.stat().st_size,
            "dataset": {"name": self.data.name, "source": self.data.source},
            "images_seen": self.seen[2], "stage1_images_seen": self.seen[1],
            "minutes": self.minutes[1] + self.minutes[2], "stage1_minutes": self.minutes[1],
            "model": self.model.state_dict(), "average": average,
            "training": self.stage1.state_dict() if self.stage == 1 else self.opt.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []}
        with data.replacing(self.ckpt_path) as temporary:
            torch.save(state, temporary)

    def take_over(self, ckpt):
        """Stand where the run that wrote `ckpt` stood."""
        self.stage = ckpt["stage"]
        self.seen = {1: ckpt["stage1_images_seen"], 2: ckpt["images_seen"]}
        self.minutes = {1: ckpt["stage1_minutes"], 2: ckpt["minutes"] - ckpt["stage1_minutes"]}
        self.model.load_state_dict(ckpt["model"])
        self.average.load_state_dict(ckpt["model"] | ckpt["average"])
        (self.stage1 if self.stage == 1 else self.opt).load_state_dict(ckpt["training"])
        torch.set_rng_state(ckpt["rng"])
        if ckpt["rng_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(ckpt["rng_cuda"])
        # Rows logged after the checkpoint will be made again: cut them off, a torn last row included.
        with open(self.log_path, "ab") as f:
            f.truncate(min(ckpt["log_bytes"], f.tell()))

    def take_stage1(self, path):
        """Use the stage 1 of another run. UserError if its sizes are not this run's."""
        weights = read_checkpoint(path)["model"]
        weights = {k.removeprefix("vqgan."): v for k, v in weights.items() if k.startswith("vqgan.")}
        try:
            self.model.vqgan.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{path}: its stage 1 has other sizes than this run's; give the same vq_ flags") from error
        self.seen[1] = self.cfg["stage1_images"]

    def log(self, stage, images, **row):
        """Append a row to log.jsonl. UserError if its loss is not finite; the last checkpoint is then untouched."""
        if not all(math.isfinite(row.get(name, 0)) for name in ("loss", "l1")):
            kept = f"the last good checkpoint is {self.ckpt_path}" if self.ckpt_path.exists() else "no checkpoint yet"
            raise UserError(f"the loss of stage {stage} is not finite near image {images:,}; {kept}; "
                            f"try a lower --{'vq_lr' if stage == 1 else 'lr'}")
        row = {"stage": stage, "images": images, "minutes": round(sum(self.minutes.values()), 3)} | row
        with open(self.log_path, "a") as f:
            f.write(json.dumps(row) + "\n")

    # -- what both stages share --

    def batches(self, n, batch, stage):
        """Endless batches of positions in 0 ... n-1. Each pass has an order of its own that (seed, stage, pass) alone
        decides, so a resumed run meets the same batches as one that never stopped."""
        per_pass, last = max(n // batch, 1), None
        while True:
            turn, place = divmod(self.seen[stage] // batch, per_pass)
            if turn != last:
                draw = torch.Generator().manual_seed(self.cfg["seed"] * 1_000_003 + 10 * turn + stage)
                order, last = torch.randperm(n, generator=draw), turn
            yield order[place * batch:(place + 1) * batch]

    def course(self, stage, n, batch, total):
        """Yield (positions, progress in [0, 1)) until the stage is over, and do all that goes by the clock: bar,
        minutes, checkpoints, pictures, signals. Progress counts images, or with --minutes the time."""
        budget = self.cfg["minutes"]
        if budget:
            share = STAGE1_SHARE if stage == 1 or self.minutes[1] else 0.0
            budget *= share if stage == 1 else 0.96 - share  # the rest is for start, fits and the last pictures
        self.bar = tqdm(total=None if budget else total, initial=self.seen[stage], unit=" images", smoothing=0.05,
                        desc=f"stage {stage}", dynamic_ncols=True)
        saved = clock = time.perf_counter()
        for positions in self.batches(n, batch, stage):
            progress = self.minutes[stage] / budget if budget else self.seen[stage] / total
            if progress >= 1:
                break
            yield positions, progress
            self.seen[stage] += batch
            now = time.perf_counter()
            self.minutes[stage] += (now - clock) / 60
            clock = now
            self.bar.update(batch)
            if self.stopped_by or now - saved > 60 * SAVE_MINUTES:
                self.save()
                self.pictures()
                saved = time.perf_counter()
            if self.stopped_by:
                self.bar.close()
                print(f"stopped by {self.stopped_by}; go on with the same command and --resume", file=sys.stderr)
                sys.exit(130)
        self.bar.close()

    def crosses(self, stage, every):
        """Does this step take the count of images over a multiple of `every`?"""
        batch = self.cfg["vq_batch" if stage == 1 else "batch"]
        return (self.seen[stage] + batch) // every > self.seen[stage] // every

    # -- stage 1 --

    def train_stage1(self):
        """Train the VQ-GAN, freeze it, measure the scale of its latents and say how well it reconstructs."""
        batch, total, averages = self.cfg["vq_batch"], self.cfg["stage1_images"], Averages()
        for positions, progress in self.course(1, len(self.data), batch, total):
            # Constant at first, then linearly to 0 over the second half: most of the sharpness comes at the end.
            self.stage1.set_lr(min(1.0, 2 * (1 - progress)))
            averages.add(**self.stage1.step(to_float(self.data.images(positions)), self.seen[1]))
            if self.crosses(1, max(total // 100, batch)):
                row = averages.take(batch)
                self.log(1, self.seen[1] + batch, **row)
                self.bar.set_postfix(psnr=f"{row['psnr']:.1f}", codes=f"{row['codes_used']:.0%}")
        self.model.vqgan.eval()
        images = self.data.images(self.fit_idx[:1024])
        self.model.latent_std.copy_(torch.cat([self.model.encode(part) for part in images.split(128)]).std())
        drawn = torch.cat([self.model.reconstruct(part) for part in images.split(128)])
        psnr = (10 * torch.log10(255 ** 2 / (drawn.float() - images).square().mean((1, 2, 3)))).mean()
        self.average.load_state_dict(self.model.state_dict())
        self.stage = 2
        self.log(1, self.seen[1], reconstruction_psnr=float(psnr), latent_std=float(self.model.latent_std))
        print(f"stage 1 done: reconstructions at {psnr:.1f} dB, latents divided by {self.model.latent_std:.3f}")

    # -- stage 2 --

    def train_stage2(self):
        """Algorithm 1: extractor and U-Net together, anchors fitted anew after every r epochs."""
        cfg, model, on_gpu = self.cfg, self.model, self.device.type == "cuda"
        n, batch, params = len(self.train_idx), cfg["batch"], self.opt.param_groups[0]["params"]
        model.vqgan.eval().requires_grad_(False)
        # On a GPU all latents are computed once and stay there. A CPU run sees most images once or twice: no gain.
        latents = self.all_latents() if on_gpu else None
        if cfg["compile"]:
            model.unet.compile()
            model.extractor.compile()
        epoch_images, averages = cfg["epoch_images"] or n, Averages()
        model.extractor.train()
        model.unet.train()
        for positions, progress in self.course(2, n, batch, cfg["images"]):
            seen = self.seen[2] + batch
            warm = min(1.0, seen / cfg["warmup"]) if cfg["warmup"] else 1.0
            fall = min(1.0, (1 - progress) / cfg["decay"]) if cfg["decay"] else 1.0
            self.opt.param_groups[0]["lr"] = cfg["lr"] * warm * fall
            images = self.data.images(self.train_idx[positions])
            z0 = model.encode(images) if latents is None else latents[positions.to(self.device)].float()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
                loss, delta = model.loss(images, z0)
            self.opt.zero_grad(set_to_none=True)
            loss.backward()
            if cfg["clip"]:
                nn.utils.clip_grad_norm_(params, cfg["clip"])
            self.opt.step()
            for part in ("extractor", "unet"):
                ema_update(getattr(self.average, part), getattr(model, part), cfg["ema_half_life"], batch, seen)
            averages.add(loss=loss.detach(), mean_delta=delta)
            if self.crosses(2, max(cfg["images"] // 150, batch)):
                row = averages.take(batch)
                self.log(2, seen, **row, lr=self.opt.param_groups[0]["lr"])
                self.bar.set_postfix(loss=f"{row['loss']:.4f}", delta=f"{row['mean_delta']:.3f}")
            if cfg["anchors"] == "dyga" and self.crosses(2, epoch_images * cfg["fit_every"]):
                self.fit_anchors(model, seen)
        if cfg["anchors"] == "dyga":
            # The averaged weights have units of their own, which the training weights' anchors do not fit.
            self.fit_anchors(self.average, self.seen[2])

    def fit_anchors(self, model, seen):
        """Anchor selection (Algorithm 2) on the model's units of a fixed subset of images."""
        started, training = time.perf_counter(), model.extractor.training
        model.extractor.eval()  # BatchNorm's running statistics: a unit must not depend on the rest of its batch
        units = torch.cat([model.units(self.data.images(idx)) for idx in self.fit_idx.split(500)])  # (n, N, D)
        model.extractor.train(training)
        draw = torch.Generator().manual_seed(self.cfg["seed"] * 1_000_003 + seen)
        model.dyga.fit(units, generator=draw)
        self.log(2, seen, anchors=model.dyga.mask.sum(1).tolist(), weights="average" if model is self.average else "raw",
                 fit_mean_delta=float(model.dyga.delta(units).mean()), fit_s=round(time.perf_counter() - started, 1))

    def all_latents(self):
        """Latents of all training images, float16 (n, z, h, w), on the device."""
        parts = tqdm(self.train_idx.split(500), desc="encoding all images")
        return torch.cat([self.model.encode(self.data.images(idx)).half() for idx in parts])

    def pictures(self):
        """Write samples.png and loss.png."""
        images, model = self.data.images(self.fit_idx[:10]), self.average
        rows, labels = [images, self.model.eval().reconstruct(images)], ["input", "stage 1"]
        if self.stage == 2:
            noise = model.noise(len(images), torch.Generator().manual_seed(0))
            rows.append(model.sample(model.align(model.units(images)), noise, min(50, self.cfg["ddim_steps"])))
            labels.append("sample")
            self.model.extractor.train()
            self.model.unet.train()
        title = f"{self.data.name} ({self.data.source}), {self.seen[2]:,} images seen in stage 2"
        with data.replacing(self.out / "samples.png") as temporary:
            data.image_grid(torch.stack(rows), labels, title=title, scale=2).save(temporary)
        rows = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        curve = [(row["images"], row["loss"]) for row in rows if "loss" in row]
        if curve:
            plot_curve(self.out / "loss.png", {f"{self.cfg['loss']} loss": tuple(zip(*curve))},
                       "Training loss (Figure 7)", "images seen in stage 2", "loss")


# ----------------------------------------------------------------------------------------------------------------------
# Main


def pick_device(text):
    """--device -> torch.device. UserError if there is no such device here."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {text}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from error


def first_line(args, cfg, source_note):
    """What was chosen, and why."""
    why, number = "as asked", "float32"
    if args.preset == "auto":
        why = "a CUDA device was found" if cfg["preset"] == "paper" else "no CUDA device in use"
    if args.device.type == "cuda":
        number = "bfloat16 autocast"
    time_needed = "the bar says how long"
    if cfg["minutes"]:
        time_needed = f"{cfg['minutes']:g} minutes as asked (such a run is not reproducible to the bit)"
    elif cfg["preset"] in EXPECTED_MINUTES:
        time_needed = f"about {EXPECTED_MINUTES[cfg['preset']]:g} minutes on 2 CPU cores"
    return (f"preset {cfg['preset']} ({why}); device {args.device}, {torch.get_num_threads()} threads, {number}; "
            f"images: {source_note}; {time_needed}")


def main():
    """Parse, say what was chosen, run both stages, write everything."""
    args = build_parser().parse_args()
    args.device = pick_device(args.device)
    cfg, ckpt = settings(args), None
    args.out = args.out or f"out/{args.dataset}-{cfg['preset']}"
    kept = Path(args.out) / "ckpt.pt"
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: a file is there; expected a folder, or nothing yet")
    if args.resume:
        ckpt = read_checkpoint(kept)
        cfg = ckpt["config"]
    elif kept.exists():
        raise UserError(f"{args.out} holds a run already; add --resume to go on with it, or choose another --out")
    run = Run(args, cfg, ckpt)
    run.out.mkdir(parents=True, exist_ok=True)
    run.log_path.touch()
    print(first_line(args, cfg, run.data.source_note), flush=True)

    def stop(signum, frame):  # finish the step, save, leave; a second signal ends the process at once
        run.stopped_by = signal.Signals(signum).name
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if run.stage == 1:
        run.train_stage1()
    if not args.stage1_only:
        run.train_stage2()
    run.save()
    run.pictures()
    print(f"done in {sum(run.minutes.values()):.1f} minutes; wrote {run.ckpt_path}, samples.png, loss.png, log.jsonl")


if __name__ == "__main__":
    data.run(main)
