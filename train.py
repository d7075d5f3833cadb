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
from unet import UNet, add_noise, alpha_bar_schedule, ddim, ema_update
from vqgan import VQGAN, Stage1

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
        ("stage1_images", 2_000_000, "images that stage 1 sees (not in the paper)"),
        ("restart_images", 50_000, "images between two rescues of unused codes"),
        ("stage1_share", 0.15, "with --minutes: share of the time that stage 1 gets")],
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
        ("cache_latents", True, "encode all training images once and keep the latents"),
        ("bf16", True, "bfloat16 autocast on CUDA (a CPU always computes in float32)"),
        ("compile", False, "torch.compile the U-Net and the extractor"),
        ("log_every", 51_200, "images between two rows of log.jsonl"),
        ("save_minutes", 3.0, "minutes between two checkpoints and pictures"),
        ("minutes_expected", 0.0, "what the first line says this course takes; 0 says nothing")],
}
DEFAULTS = {name: default for group in SETTINGS.values() for name, default, _ in group}
CHOICES = {"skip_dropout_where": ["released", "text"], "anchors": ["dyga", "none"], "accept": ["always", "bic"],
           "loss": ["l1", "mse"], "t_sampling": ["uniform", "logit_normal"]}

PRESETS = {
    "paper": {},
    # For 2 CPU cores and about half an hour. The method is the paper's; the sizes are not.
    "laptop": dict(
        minutes_expected=30,
        # Stage 1: 8x8 latents (f = 8). A 16x16 U-Net costs four times as much per image.
        vq_patch=4, vq_channels=32, vq_multipliers=[1, 2], vq_res_blocks=1,
        disc_weight=0.0, vq_lr=3e-3, vq_batch=16, stage1_images=50_000, restart_images=4_000,
        # Extractor: see the image at 32x32; private MLPs a quarter as wide.
        n_units=10, ext_shrink=2, ext_channels=[16, 32, 64, 64], ext_hidden=[256, 128], unit_hidden=[64, 128],
        unit_relu=False,
        # U-Net: 0.9M parameters. Widths 8 and 4 are both outside [1, 2], so every skip is dropped out.
        base=32, multipliers=[1, 2], res_blocks=1, attention_at=[1, 2], heads=4, self_attention=False, dropout=0.0,
        loss="mse", lr=2e-3, batch=64, warmup=6_400, decay=0.3, clip=1.0, images=500_000, ema_half_life=20_000,
        epoch_images=40_000, fit_images=5_000, cache_latents=False, log_every=3_200),
    # For the tests: every part runs, nothing is learnt.
    "tiny": dict(
        minutes_expected=0.3,
        vq_patch=4, vq_channels=16, vq_multipliers=[1, 2], vq_res_blocks=1, codebook_size=64, vq_batch=16,
        disc_width=8, vq_lr=2e-3, stage1_images=640, restart_images=160,
        n_units=6, ext_shrink=4, ext_channels=[8, 16, 16], ext_hidden=[32, 32], unit_hidden=[16, 16],
        base=16, multipliers=[1, 2], res_blocks=1, attention_at=[1, 2], heads=2,
        lr=1e-3, batch=32, warmup=320, images=2_560, ema_half_life=1_000, epoch_images=640, fit_images=320,
        cache_latents=False, log_every=320, ddim_steps=10),
}

# Section C.1: anchors are fitted every 5 epochs on the small Cars3D, every epoch elsewhere; CelebA's batch is smaller.
PER_DATASET = {"cars3d": dict(fit_every=5), "celeba": dict(batch=64)}


def yes_no(text):
    """The type of a flag such as --unit_relu no. ValueError for anything but yes and no."""
    return {"yes": True, "no": False}[text]


def whole_numbers(text):
    """The type of a flag such as --multipliers 1,2,4,4. ValueError if a part is not a whole number."""
    return [int(part) for part in text.split(",")]


def build_parser():
    """Every flag with its help. A setting is None until given, so that `settings` can tell flags from presets."""
    p = data.Parser(prog="train.py", description="Train disentangled latent units with a diffusion model.",
                    epilog="Numbers in brackets are the paper's. A preset changes some of them; a flag beats the preset.")
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
            kind, shown = type(default), default
            if kind is bool:
                kind, shown = yes_no, "yes" if default else "no"
            elif kind is list:
                kind, shown = whole_numbers, ",".join(map(str, default))
            g.add_argument(f"--{name}", type=kind, choices=CHOICES.get(name), help=f"{text} [{shown}]")
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

    @staticmethod
    def to_float(images):
        """Images uint8 (B, 3, H, W) -> float in [-1, 1]."""
        return images.float() / 127.5 - 1

    @staticmethod
    def to_uint8(x):
        """Images float in [-1, 1], values beyond cut off -> uint8 (B, 3, H, W)."""
        return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def encode(self, images):
        """Images uint8 (B, 3, H, W) -> scaled latents z0 float (B, z, h, w), before quantisation."""
        return self.vqgan.encode(self.to_float(images)).float() / self.latent_std

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (B, z, h, w) -> images uint8 (B, 3, H, W); stage 1 quantises on the way."""
        return self.to_uint8(self.vqgan.decode(z * self.latent_std))

    def reconstruct(self, images):
        """Stage 1 there and back: uint8 (B, 3, H, W) -> uint8 (B, 3, H, W). The best a sample can look."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def units(self, images):
        """Images uint8 (B, 3, H, W) -> latent units c (B, N, D), before alignment."""
        return self.extractor(self.to_float(images)).float()

    @torch.no_grad()
    def align(self, c):
        """Latent units c (B, N, D) -> c~ (B, N, D), pulled towards their anchors."""
        return self.dyga.align(c)

    def noise(self, count, generator=None):
        """Starting noise (count, z, h, w) for `sample`, from a CPU generator, so that every device starts alike."""
        side = 64 // self.vqgan.factor
        noise = torch.randn(count, self.vqgan.z_channels, side, side, generator=generator)
        return noise.to(self.latent_std.device)

    @torch.no_grad()
    def sample(self, c, generator=None, noise=None, steps=None, return_attention=False):
        """DDIM images under aligned units c (B, N, D) -> uint8 (B, 3, 64, 64). The same noise gives the same image.

        With return_attention: (images, maps (B, N, 64, 64)), see `unet.ddim`.
        """
        noise = self.noise(len(c), generator) if noise is None else noise
        found = ddim(self.unet, noise, c, self.alpha_bar, steps or self.cfg["ddim_steps"], return_attention)
        if not return_attention:
            return self.decode(found)
        z, maps = found
        images = self.decode(z)
        return images, F.interpolate(maps, size=images.shape[-2:], mode="bilinear")  # (B, N, 64, 64)

    def loss(self, images, z0):
        """Equation 2 for images uint8 (B, 3, H, W) and their latents z0 (B, z, h, w): a scalar, and mean delta."""
        c = self.extractor(self.to_float(images))  # (B, N, D)
        c, delta = self.dyga.align(c, return_delta=True)  # (B, N, D), (B, N)
        # Several noises per image: the extractor's work is shared, its gradient less noisy.
        c = c.repeat_interleave(self.cfg["noises"], 0)  # (B*M, N, D)
        z0 = z0.repeat_interleave(self.cfg["noises"], 0)  # (B*M, z, h, w)
        if self.cfg["t_sampling"] == "uniform":
            t = torch.randint(self.cfg["timesteps"], (len(z0),), device=z0.device)
        else:
            t = (torch.randn(len(z0), device=z0.device).sigmoid() * self.cfg["timesteps"]).long()
        eps = torch.randn_like(z0)
        eps_hat = self.unet(add_noise(z0, eps, t, self.alpha_bar), t, c)
        # Paper: the norm of equation 2 is not named; the released configuration says l1.
        loss = F.l1_loss(eps_hat, eps) if self.cfg["loss"] == "l1" else F.mse_loss(eps_hat, eps)
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
    """Write a line plot as PNG. series: name -> (xs, ys), lists of numbers; xs and ys on linear axes."""
    W, H = size
    left, right, top, bottom = 64, 16, 34, 46
    font = ImageFont.load_default(size=13)
    colours = ["#1f5fa8", "#c8501e", "#2d8a4b", "#7a3fa0", "#6b6b6b"]
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    xs = [x for s in series.values() for x in s[0]] or [0]
    ys = [y for s in series.values() for y in s[1]] or [0]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + 1

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (W - left - right), H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom)

    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        draw.line([at(x0, y), at(x1, y)], fill="#dddddd")
        draw.text((left - 6, at(x0, y)[1]), f"{y:.3g}", fill="black", font=font, anchor="rm")
        draw.text((at(x, y0)[0], H - bottom + 6), f"{x:,.0f}", fill="black", font=font, anchor="mt" if i < 4 else "rt")
    for i, (name, (sx, sy)) in enumerate(series.items()):
        colour = colours[i % len(colours)]
        draw.line([at(x, y) for x, y in zip(sx, sy)], fill=colour, width=2)
        draw.text((W - right - 4, top + 16 * i), name, fill=colour, font=font, anchor="rt")
    draw.text((W / 2, 8), title, fill="black", font=ImageFont.load_default(size=15), anchor="mt")
    draw.text((W / 2, H - 8), xlabel, fill="black", font=font, anchor="mb")
    draw.text((4, top - 4), ylabel, fill="black", font=font, anchor="lb")
    with data.replacing(path) as temporary:
        image.save(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """One training run: the images, the model, and where in the course it is. Its methods are the two stages."""

    def __init__(self, args, cfg, ckpt=None):
        self.cfg, self.out, self.device = cfg, Path(args.out), args.device
        self.data = data.load(args.dataset, args.data_dir, args.source, self.device)
        torch.manual_seed(cfg["seed"])
        self.model = Model(cfg).to(self.device)
        self.stage1 = Stage1(self.model.vqgan, cfg["vq_lr"], cfg["disc_weight"], cfg["disc_width"],
                             restart_images=cfg["restart_images"])
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        trained = [*self.model.extractor.parameters(), *self.model.unet.parameters()]
        # fused: the whole update in one kernel (measured on this model's many small tensors: see tests/bench.py).
        self.opt = torch.optim.AdamW(trained, lr=cfg["lr"], weight_decay=cfg["weight_decay"], fused=True)
        self.stage, self.seen, self.minutes = 1, {1: 0, 2: 0}, {1: 0.0, 2: 0.0}
        self.position = {"log_bytes": 0}
        self.stopped_by = None
        self.log_path, self.ckpt_path = self.out / "log.jsonl", self.out / "ckpt.pt"
        if ckpt:
            self._take_over(ckpt)
        elif args.stage1_from:
            self._take_stage1(args.stage1_from)
        # A fixed random subset of the images, or all; and another that the anchors are fitted to.
        draw = torch.Generator().manual_seed(cfg["seed"])
        order = torch.randperm(len(self.data), generator=draw)
        self.train_idx = order[:cfg["train_images"] or None]
        self.fit_idx = self.train_idx[torch.randperm(len(self.train_idx), generator=draw)[:cfg["fit_images"]]]

    # -- checkpoint and log --

    def save(self):
        """Write everything that the rest of the run depends on, as one file that is always whole."""
        state = {
            "format": FORMAT, "config": self.cfg, "stage": self.stage, "log_bytes": self.log_path.stat().st_size,
            "dataset": {"name": self.data.name, "source": self.data.source},
            "images_seen": self.seen[2], "stage1_images_seen": self.seen[1],
            "minutes": self.minutes[1] + self.minutes[2], "stage1_minutes": self.minutes[1],
            "model": self.model.state_dict(),
            # The average shares the frozen stage 1 and its scale with the model: no need to write them twice.
            "average": {k: v for k, v in self.average.state_dict().items() if not k.startswith(("vqgan.", "latent"))},
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "optimizer": self.opt.state_dict() if self.stage == 2 else None,
            "stage1": self.stage1.state_dict() if self.stage == 1 else None}
        with data.replacing(self.ckpt_path) as temporary:
            torch.save(state, temporary)

    def _take_over(self, ckpt):
        self.stage = ckpt["stage"]
        self.seen = {1: ckpt["stage1_images_seen"], 2: ckpt["images_seen"]}
        self.minutes = {1: ckpt["stage1_minutes"], 2: ckpt["minutes"] - ckpt["stage1_minutes"]}
        self.model.load_state_dict(ckpt["model"])
        self.average.load_state_dict(ckpt["model"] | ckpt["average"])
        if self.stage == 1:
            self.stage1.load_state_dict(ckpt["stage1"])
        else:
            self.opt.load_state_dict(ckpt["optimizer"])
        torch.set_rng_state(ckpt["rng"])
        if ckpt["rng_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(ckpt["rng_cuda"])
        # Rows logged after the checkpoint will be made again: cut them off, torn last row included.
        with open(self.log_path, "ab") as f:
            f.truncate(min(ckpt["log_bytes"], f.tell()))

    def _take_stage1(self, path):
        ckpt = read_checkpoint(path)
        mine = {k: v for k, v in ckpt["model"].items() if k.startswith("vqgan.")}
        try:
            self.model.vqgan.load_state_dict({k.removeprefix("vqgan."): v for k, v in mine.items()})
        except RuntimeError as error:
            raise UserError(f"{path}: its stage 1 has other sizes than this run's; give the same vq_ flags") from error
        self.seen[1] = self.cfg["stage1_images"]

    def log(self, **row):
        """Append one row to log.jsonl."""
        row["minutes"] = round(self.minutes[1] + self.minutes[2], 3)
        with open(self.log_path, "a") as f:
            f.write(json.dumps(row) + "\n")

    # -- what both stages share --

    def batches(self, n, batch, stage):
        """Endless batches of positions 0 ... n-1, each pass in a new order that (seed, pass) decides: resuming at
        any image gives the same batches as never having stopped."""
        batch = min(batch, n)
        per_pass, last = n // batch, None
        while True:
            turn, place = divmod(self.seen[stage] // batch, per_pass)
            if turn != last:
                draw = torch.Generator().manual_seed(self.cfg["seed"] * 1_000_003 + 10 * turn + stage)
                order, last = torch.randperm(n, generator=draw), turn
            yield order[place * batch:(place + 1) * batch]

    def course(self, stage, total):
        """Yield (batch of positions, progress in [0, 1)) until the stage is over, and do all that goes by the clock:
        bar, minutes, checkpoints, pictures, signals. Progress counts images, or minutes if --minutes is given."""
        cfg = self.cfg
        budget = cfg["minutes"]
        if budget:
            share = cfg["stage1_share"] if self.minutes[1] or stage == 1 else 0.0
            # A few per cent stay free for encoding, fits and the last pictures.
            budget *= share if stage == 1 else 0.96 - share
        n, batch = (len(self.data), cfg["vq_batch"]) if stage == 1 else (len(self.train_idx), cfg["batch"])
        bar = tqdm(total=total if not budget else None, initial=self.seen[stage], unit=" images", desc=f"stage {stage}",
                   smoothing=0.05, disable=None, dynamic_ncols=True)
        self.bar = bar
        saved = clock = time.perf_counter()
        for positions in self.batches(n, batch, stage):
            progress = self.minutes[stage] / budget if budget else self.seen[stage] / total
            if progress >= 1:
                break
            yield positions, progress
            self.seen[stage] += len(positions)
            now = time.perf_counter()
            self.minutes[stage] += (now - clock) / 60
            clock = now
            bar.update(len(positions))
            if self.stopped_by or now - saved > 60 * cfg["save_minutes"]:
                self.save()
                self.pictures()
                saved = clock = time.perf_counter()
            if self.stopped_by:
                bar.close()
                print(f"stopped by {self.stopped_by}; go on with the same command and --resume", file=sys.stderr)
                sys.exit(130)
        bar.close()

    def check(self, loss, stage):
        """UserError if a number that is about to be logged is not finite; the last checkpoint is untouched."""
        if not math.isfinite(loss):
            kept = f"the last good checkpoint is {self.ckpt_path}" if self.ckpt_path.exists() else "no checkpoint yet"
            raise UserError(f"loss is {loss} in stage {stage} at image {self.seen[stage]:,}; {kept}; try a lower "
                            f"--{'vq_lr' if stage == 1 else 'lr'}")

    # -- stage 1 --

    def train_stage1(self):
        """Train the VQ-GAN, then freeze it and measure the scale of its latents."""
        cfg, sums, count = self.cfg, {}, 0
        for positions, progress in self.course(1, cfg["stage1_images"]):
            # Constant at first, then linearly to 0 over the second half: most of the sharpness comes at the end.
            self.stage1.set_lr(min(1.0, 2 * (1 - progress)))
            x = Model.to_float(self.data.images(positions))
            found = self.stage1.step(x, self.seen[1])
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value
            count += 1
            if self.crosses(1, len(positions), cfg["log_every"] // 4):
                row = {name: float(value) / count for name, value in sums.items()}
                self.check(row["l1"], 1)
                self.log(stage=1, images=self.seen[1] + len(positions), **row)
                self.bar.set_postfix(psnr=f"{row['psnr']:.1f}", codes=f"{row['codes_used']:.0%}")
                sums, count = {}, 0

    def crosses(self, stage, batch, every):
        """Does this step take the count of images over a multiple of `every`?"""
        return (self.seen[stage] + batch) // every > self.seen[stage] // every

    def finish_stage1(self):
        """Freeze stage 1, measure the latents' standard deviation and say how well stage 1 reconstructs."""
        self.model.vqgan.eval().requires_grad_(False)
        images = self.data.images(self.fit_idx[:1024])
        z = torch.cat([self.model.encode(part) for part in images.split(128)])
        self.model.latent_std.copy_(z.std())
        error = torch.cat([(self.model.reconstruct(part).float() - part.float()).square().mean((1, 2, 3))
                           for part in images.split(128)])
        psnr = (10 * torch.log10(255 ** 2 / error)).mean()
        self.average.vqgan.load_state_dict(self.model.vqgan.state_dict())
        self.average.latent_std.copy_(self.model.latent_std)
        self.stage = 2
        self.log(stage=1, images=self.seen[1], reconstruction_psnr=float(psnr), latent_std=float(self.model.latent_std))
        print(f"stage 1 done: reconstructions at {psnr:.1f} dB, latent std {self.model.latent_std:.3f}")

    # -- stage 2 --

    def train_stage2(self):
        """Algorithm 1: extractor and U-Net together, anchors fitted anew after every r epochs."""
        cfg, model = self.cfg, self.model
        model.vqgan.eval().requires_grad_(False)
        latents = self._all_latents() if cfg["cache_latents"] else None
        autocast = torch.autocast(self.device.type, torch.bfloat16, cfg["bf16"] and self.device.type == "cuda")
        if cfg["compile"]:
            model.unet.compile()
            model.extractor.compile()
        epoch_images = cfg["epoch_images"] or len(self.train_idx)
        model.extractor.train()
        model.unet.train()
        total_loss = total_delta = count = 0
        started = time.perf_counter()
        for positions, progress in self.course(2, cfg["images"]):
            warm = min(1.0, (self.seen[2] + len(positions)) / max(cfg["warmup"], 1))
            fall = min(1.0, (1 - progress) / cfg["decay"]) if cfg["decay"] else 1.0
            for group in self.opt.param_groups:
                group["lr"] = cfg["lr"] * warm * fall
            images = self.data.images(self.train_idx[positions])
            z0 = model.encode(images) if latents is None else latents[positions.to(latents.device)].float()
            with autocast:
                loss, delta = model.loss(images, z0)
            self.opt.zero_grad(set_to_none=True)
            loss.backward()
            if cfg["clip"]:
                nn.utils.clip_grad_norm_(self.opt.param_groups[0]["params"], cfg["clip"])
            self.opt.step()
            seen = self.seen[2] + len(positions)
            for part in ("extractor", "unet"):
                ema_update(getattr(self.average, part), getattr(model, part), cfg["ema_half_life"], len(positions), seen)
            total_loss, total_delta, count = total_loss + loss.detach(), total_delta + delta, count + 1
            if self.crosses(2, len(positions), cfg["log_every"]):
                row = dict(loss=float(total_loss) / count, mean_delta=float(total_delta) / count)
                self.check(row["loss"], 2)
                speed = count * len(positions) / (time.perf_counter() - started)
                self.log(stage=2, images=seen, **row, lr=self.opt.param_groups[0]["lr"], images_per_s=round(speed, 1))
                self.bar.set_postfix(loss=f"{row['loss']:.4f}", delta=f"{row['mean_delta']:.3f}")
                total_loss = total_delta = count = 0
                started = time.perf_counter()
            if cfg["anchors"] == "dyga" and self.crosses(2, len(positions), epoch_images * cfg["fit_every"]):
                self.fit_anchors(seen // epoch_images, seen)
                started = time.perf_counter()
        if cfg["anchors"] == "dyga":
            self.fit_anchors("last", self.seen[2])

    def fit_anchors(self, epoch, seen):
        """Anchor selection (Algorithm 2) on the units of a fixed subset, for the training weights and the average.

        The two have different units, so each needs anchors of its own: the first for the epochs to come, the second
        for whoever evaluates the checkpoint.
        """
        started = time.perf_counter()
        for model, name in ((self.model, "training"), (self.average, "average")):
            model.extractor.eval()  # BatchNorm's running statistics: the units must not depend on their batch
            units = torch.cat([model.units(self.data.images(idx)) for idx in self.fit_idx.split(500)])  # (n, N, D)
            draw = torch.Generator().manual_seed(self.cfg["seed"] * 1_000_003 + seen)
            model.dyga.fit(units, generator=draw)
            self.log(stage=2, images=seen, epoch=epoch, weights=name, anchors=model.dyga.mask.sum(1).tolist(),
                     mean_delta=float(model.dyga.delta(units).mean()), seconds=round(time.perf_counter() - started, 1))
        self.model.extractor.train()

    def _all_latents(self):
        """Latents of all training images, float16 (n, z, h, w), on the device; with a bar."""
        side = 64 // self.model.vqgan.factor
        latents = torch.empty(len(self.train_idx), self.cfg["z_channels"], side, side, dtype=torch.half,
                              device=self.device)
        for start in tqdm(range(0, len(self.train_idx), 500), desc="encoding all images", disable=None):
            images = self.data.images(self.train_idx[start:start + 500])
            latents[start:start + len(images)] = self.model.encode(images).half()
        return latents

    # -- pictures --

    def pictures(self):
        """samples.png and loss.png."""
        images = self.data.images(self.fit_idx[:10])
        rows, labels = [images], ["input"]
        self.model.vqgan.eval()
        rows.append(self.model.reconstruct(images))
        labels.append("stage 1")
        if self.stage == 2:
            noise = self.average.noise(len(images), torch.Generator().manual_seed(0))
            c = self.average.align(self.average.units(images))
            rows.append(self.average.sample(c, noise=noise, steps=min(50, self.cfg["ddim_steps"])))
            labels.append("sample")
        title = f"{self.data.name} ({self.data.source}), {self.seen[2]:,} images seen in stage 2"
        with data.replacing(self.out / "samples.png") as temporary:
            data.image_grid(torch.stack(rows), labels, title=title, scale=2).save(temporary)
        rows = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        curve = [(row["images"], row["loss"]) for row in rows if "loss" in row]
        if curve:
            xs, ys = zip(*curve)
            plot_curve(self.out / "loss.png", {f"{self.cfg['loss']} loss": (xs, ys)}, "Training loss (Figure 7)",
                       "images seen in stage 2", "loss")


# ----------------------------------------------------------------------------------------------------------------------


def pick_device(text):
    """--device -> torch.device. UserError if there is no such device here."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {text}: cannot be used here ({reason}); try --device cpu") from error
    return device


def first_line(args, cfg, run):
    """What was chosen, and why."""
    why = "as asked"
    if args.preset == "auto":
        why = "a CUDA device was found" if cfg["preset"] == "paper" else "no CUDA device in use"
    kind = "bfloat16 autocast" if cfg["bf16"] and args.device.type == "cuda" else "float32"
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    line = f"preset {cfg['preset']} ({why}); device {args.device}{threads}, {kind}; images: {run.data.source_note}"
    if cfg["minutes"]:
        return line + f"; {cfg['minutes']:g} minutes as asked (such a run is not reproducible to the bit)"
    if cfg["minutes_expected"]:
        return line + f"; about {cfg['minutes_expected']:g} minutes on 2 CPU cores"
    return line + "; duration: see the bar"


def main():
    """Parse, say what was chosen, run both stages, write everything."""
    args = build_parser().parse_args()
    args.device = pick_device(args.device)
    cfg = settings(args)
    args.out = args.out or f"out/{args.dataset}-{cfg['preset']}"
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is there; expected a folder, or nothing yet")
    ckpt = None
    if args.resume:
        ckpt = read_checkpoint(out / "ckpt.pt")
        cfg = ckpt["config"]
    elif (out / "ckpt.pt").exists():
        raise UserError(f"{out} holds a run already; add --resume to go on with it, or choose another --out")
    run = Run(args, cfg, ckpt)
    out.mkdir(parents=True, exist_ok=True)
    run.log_path.touch()
    print(first_line(args, cfg, run), flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Finish the step, save, leave: a second signal then ends the process at once.
        def stop(signum, frame):
            run.stopped_by = signal.Signals(signum).name
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(number, stop)
    if run.stage == 1:
        run.train_stage1()
        run.finish_stage1()
        run.save()
        run.pictures()
    if not args.stage1_only:
        run.train_stage2()
        run.save()
        run.pictures()
    print(f"done in {run.minutes[1] + run.minutes[2]:.1f} minutes; wrote {run.ckpt_path}, samples.png, loss.png and "
          f"log.jsonl\nnext: python evaluate.py {run.ckpt_path}")


if __name__ == "__main__":
    data.run(main)
