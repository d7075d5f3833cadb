"""Train the whole method (Algorithm 1): wires data, stage 1, extractor, U-Net and anchors into one run, one checkpoint.

    python train.py --dataset shapes3d                  # the laptop preset on a CPU, the paper's on a GPU
    python train.py --dataset shapes3d --preset tiny    # seconds: does everything, learns nothing
    python train.py --dataset shapes3d --resume         # go on where the last checkpoint in --out stopped
    torchrun --nproc_per_node=2 train.py --dataset shapes3d  # stage 2 on two GPUs, or in two processes on a CPU

Everything is written to --out (default out/DATASET-PRESET): ckpt.pt (all that evaluate.py and --resume need),
log.jsonl, loss.png and samples.png (rows: input, stage-1 reconstruction, DDIM sample from the image's own units).
One step of stage 2, as data sees it:
    idx -> x0 (B,3,64,64) -> extractor -> c (B,N,D) -> dyga.align -> c~ (B,N,D) -------.
       `-> frozen stage-1 encoder -> z0 -> add noise eps at time t -> z_t -> unet(z_t, t, c~) = eps^ -> |eps^ - eps|
"""

import argparse
import contextlib
import copy
import datetime
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import data
from data import UserError
from dyga import DyGA
from extractor import Extractor
from unet import Muon, UNet, alpha_bar_schedule, ddim, diffusion_loss, ema_update
from vqgan import VQGAN, Stage1, to_float

FORMAT = 3  # version of the checkpoint's layout
SAVE_MINUTES = 3  # between two checkpoints and their pictures
STAGE1_SHARE = 0.1  # of the time that --minutes gives

# ---- Settings: default < preset < dataset < flag ---------------------------------------------------------------------
# The defaults are the paper's. Those of the networks stand beside their code, as arguments of these classes, and become
# flags such as --unet.base; their help is the class's docstring.

PARTS = {"vqgan": VQGAN, "stage1": Stage1, "extractor": Extractor, "dyga": DyGA, "unet": UNet}
# No flags: these follow from other settings, or are fixed (images are 64 pixels wide).
WIRED = {"unet.channels", "unet.context_dim", "dyga.dim", "extractor.image_size", "extractor.fsq_levels",
         "stage1.optimizer"}

TRAINING = {  # section C.1, or our choice where the help says that the paper is silent
    "stage1_images": (2_000_000, "images that stage 1 sees (not in the paper)"),
    "stage1_batch": (64, "images per step of stage 1 (not in the paper)"),
    "images": (10_000_000, "images that stage 2 sees (not in the paper)"),
    "pool_images": (0, "different images among these, a random sample of the dataset; 0 is as many as it has. Their "
                    "latents are computed once and kept"),
    "batch": (512, "images per step of stage 2"),
    "lr": (1e-4, "learning rate of stage 2"),
    "optimizer": ("adamw", "of both stages: adamw, as in the code that the paper builds on; or muon"),
    "warmup": (0, "images over which the learning rate rises from 0"),
    "decay": (0.0, "last share of the course over which the learning rate falls to 0"),
    "clip": (0.0, "largest gradient norm; 0 does not clip"),
    "loss": ("l1", "l1: |eps^ - eps|, as released (equation 2 names no norm); or mse"),
    "t_sampling": ("uniform", "how t is drawn; logit_normal prefers the middle of the schedule"),
    "ema_half_life": (3_550_000, "images after which a weight's part in the average has halved (0.9999 a step)"),
    "precision": ("auto", "of stage 2: float32; bfloat16 (autocast: activations in it, weights not); or auto, which is "
                  "bfloat16 on a GPU, float32 on a CPU"),
    "anchors": ("dyga", "dyga; fsq, Table 11's rival; or none. The paper's baseline EncDiff is none and "
                "--unet.skip_dropout 0 together, but with this extractor, not EncDiff's own"),
    "epoch_images": (0, "length of an epoch in images; 0 is one pass over the pool"),
    "fit_every": (1, "r: epochs between two fits of the anchors"),
    "fit_images": (20_000, "images whose units the anchors are fitted to (not in the paper)"),
    "ddim_steps": (100, "steps of a DDIM sample"),
}
CHOICES = {"loss": ["l1", "mse"], "optimizer": ["adamw", "muon"], "t_sampling": ["uniform", "logit_normal"],
           "precision": ["auto", "float32", "bfloat16"], "anchors": ["dyga", "fsq", "none"]}
PRESETS = {
    "paper": {},
    # For one or two CPU cores and less than an hour. The method is the paper's; the sizes are not.
    "laptop": {
        # Stage 1 with 8x8 latents (f = 8), because a 16x16 U-Net costs four times as much per image; no discriminator,
        # which would double the time of a step.
        "vqgan.patch": 4, "vqgan.multipliers": [1, 2], "vqgan.res_blocks": 1, "stage1.disc_weight": 0.0,
        "stage1.lr": 3e-3, "stage1_batch": 16, "stage1_images": 32_000, "stage1.restart_images": 2_500,
        # The extractor sees the image at 32x32; its private MLPs are a quarter as wide. The paper's 20 units, not the
        # 10 of our first tries: a hue takes two or more, so the last factors found none free (README, Numbers).
        "extractor.n_units": 20, "extractor.shrink": 2, "extractor.channels": [16, 32, 64, 64],
        "extractor.hidden": [256, 128], "extractor.unit_hidden": [64, 128], "extractor.unit_relu": False,
        # Widths 8 and 4 are both outside [1, 2]: by the released rule, skip dropout acts on every skip.
        "unet.base": 32, "unet.multipliers": [1, 2], "unet.res_blocks": 1, "unet.attention_at": [1, 2],
        # One head of attention: a pixel then looks up one unit at a time, where four heads look up a blend of four, and
        # factors part (README, Numbers).
        "unet.heads": 1, "unet.self_attention": False, "unet.dropout": 0.0,
        # In a prototype a squared error learnt an object's shape and size earlier than L1. In README, Numbers: times
        # from the middle of the schedule teach hues earlier than uniform ones, and Muon teaches shape and orientation,
        # and stage 1, earlier than AdamW.
        "loss": "mse", "t_sampling": "logit_normal", "lr": 2e-3, "batch": 64, "warmup": 6_400, "decay": 0.3,
        "optimizer": "muon",
        # Five passes over a tenth of Shapes3D: the encoder then costs a fifth of what it would with new images all the
        # time, and the anchors, fitted after each pass, get to act. More images, 320,000 from 64,000, scored no higher.
        "clip": 1.0, "images": 240_000, "pool_images": 48_000, "fit_images": 5_000, "ema_half_life": 20_000,
    },
    # For the tests: every part runs, nothing is learnt.
    "tiny": {
        "vqgan.patch": 4, "vqgan.channels": 16, "vqgan.multipliers": [1, 2], "vqgan.res_blocks": 1, "stage1.lr": 2e-3,
        "vqgan.codebook_size": 64, "stage1.disc_width": 8, "stage1.restart_images": 160, "stage1_batch": 16,
        "stage1_images": 640, "extractor.n_units": 6, "extractor.shrink": 4, "extractor.channels": [8, 16, 16],
        "extractor.hidden": [32, 32], "extractor.unit_hidden": [16, 16], "unet.base": 16, "unet.multipliers": [1, 2],
        "unet.res_blocks": 1, "unet.attention_at": [1, 2], "unet.heads": 2, "unet.groups": 4, "lr": 1e-3, "batch": 32,
        "images": 1_280, "pool_images": 640, "ema_half_life": 1_000, "fit_images": 320, "ddim_steps": 10,
    },
}
# Section C.1, for the paper preset: r is 5 on the small Cars3D; CelebA's batch is smaller, at the same EMA rate a step.
PER_DATASET = {"cars3d": dict(fit_every=5), "celeba": dict(batch=64, ema_half_life=444_000)}


def all_settings():
    """Every setting: name -> (default, help). The networks' come from the signatures and docstrings of PARTS."""
    found = dict(TRAINING)
    for prefix, cls in PARTS.items():  # such as unet, UNet
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.default is not parameter.empty and f"{prefix}.{name}" not in WIRED:
                text = re.search(rf"^ +{name}: (.+?)(?=\n +\w+: |\n\n|\Z)", cls.__doc__, re.M | re.S)[1]
                found[f"{prefix}.{name}"] = parameter.default, " ".join(text.split()).replace("%", "%%")
    return found


def build_parser():
    """Every flag with its help. A setting is None until given, so that `settings` can tell flags from presets."""
    p = data.Parser(formatter_class=argparse.HelpFormatter, description="Train disentangled latent units with a "
                    "diffusion model. Values in brackets are the paper's; a preset changes some, a flag beats both.")
    p.add_argument("--dataset", required=True, choices=list(data.DATASETS))
    p.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help="auto: paper on CUDA, laptop on a CPU")
    p.add_argument("--out", help="folder for everything written (default out/DATASET-PRESET)")
    p.add_argument("--data_dir", default="data", help="folder of the datasets' files")
    p.add_argument("--source", default="auto", choices=["auto", "official", "rendered"], help="auto: official if there")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--seed", type=int, help="same seed, CPU and threads: same numbers [0]")
    p.add_argument("--resume", action="store_true", help="go on from ckpt.pt in --out, with its settings")
    p.add_argument("--minutes", type=float, help="fit the course into this time; not reproducible to the bit then")
    p.add_argument("--stage1_only", action="store_true", help="stop after stage 1")
    p.add_argument("--stage1_from", metavar="CKPT", help="take stage 1 from this checkpoint of the same data")
    for name, (default, text) in all_settings().items():
        if isinstance(default, bool):  # --unet.self_attention and --no-unet.self_attention
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):  # --unet.multipliers 1 2 4 4
            kind = dict(type=int, nargs="+")
        else:
            kind = dict(type=type(default), choices=CHOICES.get(name))
        p.add_argument(f"--{name}", **kind, help=f"{text} [{default}]")
    return p


def settings(args):
    """Flags over dataset over preset over defaults: the run's whole configuration as one plain dict."""
    preset = {"auto": "paper" if args.device.type == "cuda" else "laptop"}.get(args.preset, args.preset)
    cfg = {name: default for name, (default, _) in all_settings().items()} | PRESETS[preset]  # the right one wins
    if preset == "paper":
        cfg |= PER_DATASET.get(args.dataset, {})
    cfg |= {name: value for name, value in vars(args).items() if name in cfg and value is not None}  # flags
    cfg |= {"preset": preset, "seed": args.seed or 0, "minutes": args.minutes, "stage1_from": args.stage1_from}
    for name in ("stage1_images", "stage1_batch", "stage1.restart_images", "images", "batch", "ema_half_life",
                 "fit_images", "fit_every", "ddim_steps", "minutes"):
        if cfg[name] is not None and cfg[name] <= 0:
            raise UserError(f"--{name} is {cfg[name]}; expected more than 0")
    if cfg["pool_images"] < 0:
        raise UserError(f"--pool_images is {cfg['pool_images']}; expected 0 (the whole dataset) or more")
    if cfg["clip"] < 0 or not 0 <= cfg["seed"] < 2**32:
        raise UserError(f"--clip {cfg['clip']}, --seed {cfg['seed']}: expected 0 or more, and a seed below 2^32")
    return cfg


def refuse_contradictions(args, cfg):
    """UserError if a flag beside --resume differs from the checkpoint's settings cfg, or if a setting is missing."""
    # No exception for --images or --minutes: the learning rate follows the course planned at the start, so a longer
    # course is another run from its first step. Repeating a flag is fine: "the same command and --resume".
    for name in all_settings().keys() | {"preset", "seed", "minutes"}:
        if name not in cfg:
            raise UserError(f"the checkpoint has no setting {name}: it is of another version of train.py; train again")
    for name, given in vars(args).items():
        held = list(cfg[name]) if isinstance(cfg.get(name), tuple) else cfg.get(name)
        if (name in cfg or name == "stage1_from") and given not in (None, "auto", held):
            began = "without it" if held is None else f"with {held}"
            raise UserError(f"--{name} {given}: the run to resume began {began}; leave it out, or choose another --out")


def part(values, name):
    """The entries of one part: {"unet.base": 32, "lr": ...} and "unet" give {"base": 32}."""
    return {key.removeprefix(name + "."): value for key, value in values.items() if key.startswith(name + ".")}


# ---- The model: all four networks, and how they call each other -----------------------------------------------------


class Model(torch.nn.Module):
    """Stage 1, extractor, anchors and U-Net together. cfg: a dict of settings. ValueError if they do not fit."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vqgan = VQGAN(**part(cfg, "vqgan"))  # x0 <-> z0; frozen in stage 2
        levels = (8, 5, 5) if cfg["anchors"] == "fsq" else ()  # Table 11's
        self.extractor = Extractor(**part(cfg, "extractor"), fsq_levels=levels)  # x0 -> c
        self.dyga = DyGA(cfg["extractor.n_units"], cfg["extractor.unit_dim"], **part(cfg, "dyga"))  # c -> c~
        self.unet = UNet(channels=cfg["vqgan.z_channels"], context_dim=cfg["extractor.unit_dim"], **part(cfg, "unet"))
        self.register_buffer("alpha_bar", alpha_bar_schedule(), persistent=False)  # (T,)

    def forward(self, images, z0):
        """Images uint8 (B, 3, H, W), their latents z0 (B, Z, h, w) -> loss of equation 2, mean delta of equation 6."""
        c = self.extractor(to_float(images))  # (B, N, D)
        # c~ (B, N, D) and delta (B, N). Before the first fit c~ is c.
        aligned, delta = self.dyga.align(c, return_delta=True)
        loss = diffusion_loss(self.unet, z0, aligned, self.alpha_bar, self.cfg["loss"], self.cfg["t_sampling"])
        return loss, delta.detach().mean()

    @torch.no_grad()
    def units(self, images):
        """Images uint8 (B, 3, H, W) -> latent units c (B, N, D), before alignment."""
        return self.extractor(to_float(images)).float()

    def noise(self, count, generator):
        """Starting noise (count, Z, h, w) for `sample`, from a CPU generator, so that every device starts alike."""
        shape = count, self.vqgan.z_channels, 64 // self.vqgan.factor, 64 // self.vqgan.factor
        return torch.randn(shape, generator=generator).to(self.alpha_bar.device)

    @torch.no_grad()
    def sample(self, aligned, noise, steps=None):
        """DDIM images under aligned units c~ (B, N, D) from `noise` -> uint8 (B, 3, 64, 64)."""
        return self.vqgan.decode(ddim(self.unet, noise, aligned, self.alpha_bar, steps or self.cfg["ddim_steps"]))


def check_archive(path):
    """zipfile.BadZipFile if a part of a file of torch.save is damaged. torch.load does not look at the checksums in the
    file: a flipped bit would become a wrong weight."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # the first damaged part
            raise zipfile.BadZipFile


def read_checkpoint(path):
    """Read a checkpoint of this code safely (tensors and plain values only) -> dict. UserError for anything else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint of train.py, such as out/shapes3d-laptop/ckpt.pt")
    try:
        check_archive(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that a file may carry
    except Exception as error:  # foreign bytes can fail in any way, and nothing of ours runs inside this try
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: damaged, cut short, or of "
                        "another program); expected a ckpt.pt of train.py (evaluate.py --released reads those of the "
                        "paper's own code)") from error
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT or not isinstance(ckpt.get("config"), dict):
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}, as expected; train it again with this train.py, "
                        "or give evaluate.py --released if it is a file of the paper's own code")
    return ckpt


def load_checkpoint(path, device="cpu"):
    """Checkpoint file -> (averaged model in eval mode, the checkpoint). Before a course has ended, the average
    has no anchors."""
    ckpt = read_checkpoint(path)
    try:
        if not ckpt["images_seen"]:
            raise UserError(f"{path}: holds stage 1 only, expected both; finish the run with train.py --resume first")
        model = Model(ckpt["config"])
        model.load_state_dict(ckpt["model"] | ckpt["average"])  # averaged weights over training ones
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not as this train.py expected it ({type(error).__name__}); train it again") from error
    return model.to(device).eval(), ckpt


def loss_picture(log_path, path):
    """Figure 7: draw stage 2's loss from log.jsonl over images seen, as PNG; one point at 0 if there is none yet."""
    rows = [json.loads(line) for line in log_path.read_text().splitlines() if line[-1:] == "}"]  # the last may be torn
    curve = [(row["images"], row["loss"]) for row in rows if "loss" in row] or [(0, 0.0)]
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*curve))
    image, font = Image.new("RGB", (720, 420), "white"), ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(image)
    for i in range(5):  # grid lines, and the numbers beside them
        x, y = 64 + 160 * i, 374 - 85 * i
        draw.line([(64, y), (704, y)], fill="#dddddd")
        draw.text((58, y), f"{y0 + (y1 - y0) * i / 4:.3g}", "black", font, anchor="rm")  # right, middle
        draw.text((x, 380), f"{x0 + (x1 - x0) * i / 4:,.0f}", "black", font, anchor="mt" if i < 4 else "rt")
    draw.line([(64 + 640 * (x - x0) / (x1 - x0 or 1), 374 - 340 * (y - y0) / (y1 - y0 or 1)) for x, y in curve], "blue")
    draw.text((360, 8), "Training loss (Figure 7) over images seen in stage 2", "black", font, anchor="mt")
    with data.replacing(path) as temporary:
        image.save(temporary)


# ---- Many processes (torchrun) ---------------------------------------------------------------------------------------
# First reading: skip to "The run"; with one process nothing here does anything. Several split the batches of stage 2,
# and compute what one would. Stage 1 is short: every process does all of it. Process 0 alone fits anchors (the others
# receive them), draws pictures and writes.


class Average(torch.autograd.Function):
    """The mean of a tensor over all processes, by `Average.apply`; so its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return Average.forward(ctx, gradient)


class WholeBatch(TorchFunctionMode):
    """Within it, a network that sees one process's rows of a batch computes as if it saw all rows.

    Random numbers are drawn for the whole batch, of which each process keeps its own rows: noise, times and dropout are
    those of one process (tested on CPUs), and the generators of all processes stay equal, so that the one in the
    checkpoint is everybody's.
    BatchNorm (the extractor's) takes its statistics over all processes, or their number would change what is learnt;
    torch's own SyncBatchNorm does so too, but on GPUs only. The mode catches the calls, so the networks need not know.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs["training"]:
            return self.batch_norm(*args, **kwargs)
        if func is F.dropout and kwargs["training"] and kwargs["p"] > 0:
            x, kept = args[0], 1 - kwargs["p"]
            return x * self.rows(lambda shape: x.new_empty(shape).bernoulli_(kept), x.shape).div_(kept)
        if func is torch.randn_like:
            return self.rows(lambda shape: torch.randn(shape, device=args[0].device), args[0].shape)
        if func in (torch.rand, torch.randn, torch.randint):  # the shape, or one number, is their last argument
            shape = (args[-1],) if isinstance(args[-1], int) else args[-1]
            return self.rows(lambda shape: func(*args[:-1], shape, **kwargs), shape)
        return func(*args, **kwargs)

    def rows(self, draw, shape):
        """Draw for the whole batch, keep the rows of this process: shape (B/world, ...)."""
        world = dist.get_world_size()
        return draw((world * shape[0], *shape[1:])).chunk(world)[dist.get_rank()]

    def batch_norm(self, x, running_mean, running_var, weight, bias, training, momentum, eps):
        """F.batch_norm of x (B/world, C, H, W) with the mean and variance of all B images, which gradients pass
        through."""
        h = x.float()
        mean = Average.apply(h.mean((0, 2, 3)))  # (C,)
        h = h - mean[:, None, None]
        var = Average.apply(h.square().mean((0, 2, 3)))  # (C,)
        n = dist.get_world_size() * h[:, 0].numel()
        running_mean.lerp_(mean.detach(), momentum)
        running_var.lerp_(var.detach() * n / (n - 1), momentum)
        return (h * ((var + eps).rsqrt() * weight)[:, None, None] + bias[:, None, None]).to(x.dtype)


def join_processes(device):
    """Under torchrun: meet the other processes. Else nothing."""
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A process that dies ends the run: torchrun stops the others; failing that, they wait no longer than this.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(minutes=10))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all


# ---- The run --------------------------------------------------------------------------------------------------------


class Run:
    """One training run: the images, the model, and where in the course it is. Its methods are the two stages."""

    def __init__(self, args, cfg, ckpt=None):
        self.cfg, self.out, self.device = cfg, Path(args.out), args.device
        self.log_path, self.ckpt_path = self.out / "log.jsonl", self.out / "ckpt.pt"
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if cfg["batch"] % self.world:
            raise UserError(f"--batch {cfg['batch']} cannot be split over {self.world} processes; choose a multiple")
        self.data = data.load(args.dataset, args.data_dir, args.source, self.device)  # may raise UserError
        self.clock = time.perf_counter()  # after an official file's conversion, which may take long, but only once
        torch.manual_seed(cfg["seed"])  # initial weights, noise, times and dropout all come from here
        identity = {"name": self.data.name, "source": self.data.source}
        other = read_checkpoint(args.stage1_from) if args.stage1_from and not ckpt else ckpt
        if other and other.get("dataset") != identity:
            raise UserError(f"the checkpoint's images are {other.get('dataset')}, found {identity}; give its --source")
        if other is not ckpt and other.get("stage") != 2:
            raise UserError(f"{args.stage1_from}: its stage 1 has not ended; finish that run first, with --resume")
        try:
            self.model = Model(cfg).to(self.device).eval()
            if args.stage1_from and not ckpt:
                self.model.vqgan.load_state_dict(part(other["model"], "vqgan"))
            optimizer = {"adamw": torch.optim.AdamW, "muon": Muon}[cfg["optimizer"]]
            # Losses and optimisers of the VQ-GAN.
            self.stage1 = Stage1(self.model.vqgan, **part(cfg, "stage1"), optimizer=optimizer)
            # fused: the whole update in one kernel, where a loop over tensors would start hundreds.
            # Weight decay 0.01: torch's and LDM's default; the paper names none.
            self.opt = optimizer([*self.model.extractor.parameters(), *self.model.unet.parameters()], cfg["lr"],
                                 weight_decay=0.01, fused=True)
            # One black image through everything: what does not fit together must fail now, not after stage 1.
            black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self.device)
            self.model.sample(self.model.units(black), self.model.vqgan.encode(black), steps=1)
        except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"these settings do not fit together: {error}") from error
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)  # the EMA, with anchors of its own
        # Per stage: images in a step, in all, seen so far, and minutes spent.
        self.batch, self.total = {1: cfg["stage1_batch"], 2: cfg["batch"]}, {1: cfg["stage1_images"], 2: cfg["images"]}
        self.seen, self.minutes, self.stage, self.stopped_by = {1: 0, 2: 0}, {1: 0.0, 2: 0.0}, 1, None
        self.sums = {}  # of what the next row of the log averages
        self.log_bytes, self.failed_fits, self.finished = 0, 0, False
        if ckpt:
            try:
                self.take_over(ckpt)
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.ckpt_path}: not as this train.py wrote it ({type(error).__name__})") from error
        elif args.stage1_from:
            self.seen[1] = self.total[1]  # nothing left to train in stage 1
        # Fixed random samples: images that the anchors are fitted to, and images that stage 2 trains on. All of these
        # are encoded first, so there should not be more than it has the time to see.
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(cfg["seed"]))
        pool_images = cfg["pool_images"] or len(order)
        self.fit_idx = order[:cfg["fit_images"]]
        self.pool = order[:pool_images if cfg["minutes"] else min(pool_images, cfg["images"])]

    def save(self):
        """Write all that the rest of the run depends on, as one file that is always whole; then the pictures."""
        self.check_finite(self.seen[self.stage])
        if self.rank:
            return  # one process writes
        # The average shares the frozen stage 1 with the model: no need to write it twice.
        average = {k: v for k, v in self.average.state_dict().items() if not k.startswith("vqgan.")}
        state = {
            "format": FORMAT, "config": self.cfg, "stage": self.stage, "log_bytes": self.log_path.stat().st_size,
            "dataset": {"name": self.data.name, "source": self.data.source}, "images_seen": self.seen[2],
            "stage1_images_seen": self.seen[1], "minutes": sum(self.minutes.values()), "sums": self.sums,
            "failed_fits": self.failed_fits, "finished": self.finished,
            "stage1_minutes": self.minutes[1], "model": self.model.state_dict(), "average": average,
            "training": (self.stage1 if self.stage == 1 else self.opt).state_dict(), "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None}
        try:
            with data.replacing(self.ckpt_path) as temporary, open(temporary, "wb") as f:
                torch.save(state, f)  # plain tensors and values only: weights_only=True must be able to read it
                f.flush()
                os.fsync(f.fileno())  # on the disk before it gets its name: no power cut leaves half of it
        except (OSError, RuntimeError) as error:  # torch's own error hides the system's, such as "no space left"
            raise UserError(f"{self.ckpt_path}: cannot be written ({error.__context__ or error}); the one before it "
                            "stays, if there is one; make room and go on with --resume") from error
        self.pictures()

    def take_over(self, ckpt):
        """Stand where the run that wrote `ckpt` stood."""
        self.stage, self.sums = ckpt["stage"], ckpt["sums"]
        self.log_bytes, self.failed_fits = ckpt["log_bytes"], ckpt.get("failed_fits", 0)
        self.finished = ckpt.get("finished", False)
        self.seen = {1: ckpt["stage1_images_seen"], 2: ckpt["images_seen"]}
        self.minutes = {1: ckpt["stage1_minutes"], 2: ckpt["minutes"] - ckpt["stage1_minutes"]}
        if self.stage not in self.seen:
            raise ValueError(f"stage {self.stage}")
        self.model.load_state_dict(ckpt["model"])
        self.average.load_state_dict(ckpt["model"] | ckpt["average"])  # stage 1 from the one, the rest from the other
        (self.stage1 if self.stage == 1 else self.opt).load_state_dict(ckpt["training"])
        torch.set_rng_state(ckpt["rng"])  # the next noise is the one that would have come
        if ckpt["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(ckpt["rng_cuda"], self.device)

    def check_finite(self, seen):
        """UserError if a number of the steps since the last row is not finite; the last checkpoint stays as it is."""
        bad = [name for name, value in self.sums.items() if not math.isfinite(float(value))]
        if bad:
            kept = f"last good checkpoint: {self.ckpt_path if self.ckpt_path.exists() else 'none yet'}"
            flag, step = "stage1.lr" if self.stage == 1 else "lr", seen // self.batch[self.stage]
            raise UserError(f"{', '.join(bad)} of stage {self.stage} is not finite at step {step:,} (image {seen:,}) "
                            f"or shortly before; {kept}; start again with a lower --{flag}")

    def log(self, stage, images, **row):
        """Append a row to log.jsonl."""
        if self.rank:
            return
        row = {"stage": stage, "images": images, "minutes": round(sum(self.minutes.values()), 3)} | row
        with open(self.log_path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def tally(self, stage, **values):
        """Add up one step's numbers, 0-dim tensors; 150 times in a stage, log their means and show them in the bar."""
        # The sums stay on the device: to read a number at every step, the CPU would have to wait for the GPU.
        self.sums = {name: self.sums.get(name, 0) + value for name, value in (values | {"steps": 1}).items()}
        if self.crosses(stage, max(self.total[stage] // 150, self.batch[stage])):
            self.check_finite(self.seen[stage] + self.batch[stage])
            steps = self.sums.pop("steps")  # how many steps were added up
            row = {name: float(value) / steps for name, value in self.sums.items()}  # here the CPU waits
            self.log(stage, self.seen[stage] + self.batch[stage], **row, images_per_s=self.bar.format_dict["rate"])
            shown = ("psnr", "codes_used") if stage == 1 else ("loss", "mean_delta")  # the numbers to watch
            self.bar.set_postfix({name: f"{row[name]:.3f}" for name in shown}, refresh=False)
            self.sums = {}

    def tick(self, stage):
        """Book all time since the last tick, be it data, steps, fits or pictures, under this stage."""
        now = time.perf_counter()
        self.minutes[stage] += (now - self.clock) / 60
        self.clock = now

    def agree(self, *numbers):
        """The largest of each number over all processes: one clock, one signal, or some would wait for ever."""
        numbers = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so that no GPU has to be waited for
        if self.world > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def crosses(self, stage, every):
        """Does this step take the count of images over a multiple of `every`?"""
        return (self.seen[stage] + self.batch[stage]) // every > self.seen[stage] // every

    def batches(self, stage):
        """Endless batches of indices: into the data in stage 1, into the pool in stage 2. Each pass over them has an
        order of its own, which (seed, stage, pass) alone decides: a resumed run meets the same batches as one that
        never stopped."""
        batch, size = self.batch[stage], len(self.data if stage == 1 else self.pool)
        per_pass, last = max(size // batch, 1), None  # a pass drops what does not fill a batch
        while True:
            turn, place = divmod(self.seen[stage] // batch, per_pass)  # which pass, which batch of it
            if turn != last:
                draw = torch.Generator().manual_seed(self.cfg["seed"] * 1_000_003 + 10 * turn + stage)
                # On the images' device, once: a GPU would have to be waited for if each batch were sent on its own.
                order, last = torch.randperm(size, generator=draw).to(self.device), turn
            yield order[place * batch:(place + 1) * batch]  # (B,)

    def course(self, stage):
        """Yield (indices, progress in [0, 1)) until the stage is over, and do all that goes by the clock: bar,
        minutes, checkpoints, pictures, signals. Progress counts images, or with --minutes the time."""
        total = self.total[stage]
        # A borrowed stage 1 has nothing left to do.
        budget = None if stage == 1 and self.cfg["stage1_from"] else self.cfg["minutes"]
        if budget:  # 4% stay free for the last fit and pictures
            budget = STAGE1_SHARE * budget if stage == 1 else max(1e-9, 0.96 * budget - self.minutes[1])
        self.bar = tqdm(total=None if budget else total, initial=self.seen[stage], unit=" images", smoothing=0.05,
                        desc=f"stage {stage}", dynamic_ncols=True, disable=self.rank > 0)
        saved = time.perf_counter()
        for idx in self.batches(stage):
            progress = self.minutes[stage] / budget if budget else self.seen[stage] / total
            if progress >= 1:
                return self.bar.close()
            yield idx, progress  # the caller trains on this batch, then we go on
            self.seen[stage] += len(idx)
            self.bar.update(len(idx))
            self.tick(stage)
            due = self.clock - saved > 60 * SAVE_MINUTES
            self.minutes[stage], stop, due = self.agree(self.minutes[stage], bool(self.stopped_by), due)
            if stop:
                self.leave()
            if due:
                self.save()
                saved = time.perf_counter()

    def leave(self):
        """Save, say how to go on, end the process."""
        self.save()
        by = self.stopped_by or "another process"
        print(f"\nstopped by {by}; go on with the same command and --resume", file=sys.stderr)
        sys.exit(130)  # as a shell counts a program that was interrupted

    def train_stage1(self):
        """Train the VQ-GAN, freeze it, and say how well it reconstructs."""
        for idx, progress in self.course(1):
            self.tally(1, **self.stage1.step(self.data.images(idx), self.seen[1], progress))
        self.check_finite(self.seen[1])
        psnr = self.stage1.finish(self.data.images(self.fit_idx[:1024]))  # freezes it, sets latent_std from these
        self.average.load_state_dict(self.model.state_dict())  # the EMA starts from here, with the trained stage 1
        self.stage, self.sums = 2, {}
        self.log(1, self.seen[1], reconstruction_psnr=psnr, latent_std=self.model.vqgan.latent_std.item())
        print(f"stage 1 done: reconstructions at {psnr:.1f} dB")

    def train_stage2(self):
        """Algorithm 1: extractor and U-Net together, anchors fitted anew after every r epochs."""
        cfg, model, bfloat16 = self.cfg, self.model, in_bfloat16(self.cfg, self.device)
        model.vqgan.eval().requires_grad_(False)
        # Wrapped, all processes start from the weights of process 0, every forward pass takes over its buffers (new
        # anchors, for one), and every backward pass averages the gradients.
        many = self.world > 1
        net = torch.nn.parallel.DistributedDataParallel(model) if many else model
        # The encoder is frozen and each image comes several times: its latent is computed once and stays in memory.
        pool = self.pool.to(self.device)  # (n,) which images
        latents = []
        for idx in tqdm(pool.split(500), desc="encoding the pool, 500 images each", disable=self.rank > 0):
            latents.append(model.vqgan.encode(self.data.images(idx)).half())
            if any(self.agree(bool(self.stopped_by))):
                self.leave()
        latents = torch.cat(latents)  # (n, Z, h, w)
        model.extractor.train()
        model.unet.train()
        for idx, progress in self.course(2):
            seen = self.seen[2] + len(idx)
            warm = min(1.0, seen / max(cfg["warmup"], 1))  # rises to 1
            fall = min(1.0, (1 - progress) / cfg["decay"]) if cfg["decay"] else 1.0  # falls to 0 at the very end
            self.opt.param_groups[0]["lr"] = cfg["lr"] * warm * fall
            own = idx.chunk(self.world)[self.rank]  # (B/world,) the rows of this process
            images, z0 = self.data.images(pool[own]), latents[own].float()  # x0 uint8 (B/world, 3, 64, 64), latents
            with (torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16),
                  WholeBatch() if many else contextlib.nullcontext()):
                loss, delta = net(images, z0)
            self.opt.zero_grad(set_to_none=True)  # no zeros to write, none to add to
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.opt.param_groups[0]["params"], cfg["clip"] or math.inf)
            self.opt.step()
            # Paper: LDM averages the U-Net alone. The extractor is what gets evaluated, so it is averaged too.
            ema_update(self.average.extractor, model.extractor, cfg["ema_half_life"], len(idx), seen)
            ema_update(self.average.unet, model.unet, cfg["ema_half_life"], len(idx), seen)
            shown = torch.stack([loss.detach(), delta])
            shown = Average.apply(shown) if many else shown  # of the whole batch
            self.tally(2, loss=shown[0], mean_delta=shown[1], grad_norm=norm)
            if self.crosses(2, (cfg["epoch_images"] or len(pool)) * cfg["fit_every"]):
                self.fit_anchors(model, seen)
        # The averaged weights have units of their own, which the training weights' anchors do not fit.
        self.fit_anchors(self.average, self.seen[2])
        self.finished = True

    def fit_anchors(self, model, seen):
        """Anchor selection (Algorithm 2) on the model's units of a fixed sample of images."""
        if self.cfg["anchors"] != "dyga" or self.rank:
            return  # a DyGA that was never fitted hands units on unchanged; of many processes, the first fits for all
        self.check_finite(seen)
        started, training = time.perf_counter(), model.extractor.training
        model.extractor.eval()  # BatchNorm's running statistics: a unit must not depend on the rest of its batch
        units = torch.cat([model.units(self.data.images(idx)) for idx in self.fit_idx.split(500)])  # (n, N, D)
        model.extractor.train(training)
        draw = torch.Generator().manual_seed(self.cfg["seed"] * 1_000_003 + seen)
        trial = copy.deepcopy(model.dyga)  # a fit that fails may leave half of its work behind
        try:
            trial.fit(units, generator=draw)
            if not all(buffer.isfinite().all() for buffer in trial.buffers()):
                raise ValueError("the anchors are not finite")
        except (ValueError, torch.linalg.LinAlgError) as error:
            print(f"\nno anchors at image {seen:,} ({error}): unaligned until the next fit", file=sys.stderr)
            self.failed_fits += 1
            for buffer in (model.dyga.live, model.dyga.mask):
                buffer.zero_()  # as before the first fit: units come back unchanged
        else:
            model.dyga.load_state_dict(trial.state_dict())
        self.log(2, seen, of="average" if model is self.average else "training", fit_s=time.perf_counter() - started,
                 anchors=model.dyga.mask.sum(1).tolist(), failed_fits=self.failed_fits,
                 converged=sum(trial.report.get("converged", [])),  # units whose last EM run did, of N
                 fit_mean_delta=model.dyga.delta(units).mean().item() if model.dyga.live.any() else 0.0)

    def pictures(self):
        """Write samples.png and loss.png."""
        images, model, labels = self.data.images(self.fit_idx[:10]), self.average, ["input", "stage 1", "sample"]
        # The average's stage 1 is a copy from the start of stage 2; until then look at the one in training.
        rows = [images, (model if self.stage == 2 else self.model.eval()).vqgan.reconstruct(images)]
        if self.stage == 2:
            noise = model.noise(len(images), torch.Generator().manual_seed(0))  # the same in every picture of this run
            rows.append(model.sample(model.dyga.align(model.units(images)), noise, min(50, self.cfg["ddim_steps"])))
        title = f"{self.data.name} ({self.data.source}), {self.seen[2]:,} images seen in stage 2"
        with data.replacing(self.out / "samples.png") as temporary:
            data.image_grid(torch.stack(rows), labels[:len(rows)], title=title, scale=2).save(temporary)
        loss_picture(self.log_path, self.out / "loss.png")


def in_bfloat16(cfg, device):
    """Does stage 2 compute in bfloat16? Not by itself on a CPU: where that has instructions for it (AVX512-BF16), a
    laptop step takes two thirds of the time, but FactorVAE seems to suffer (README, Numbers); elsewhere it is slower.
    """
    return cfg["precision"] == "bfloat16" or cfg["precision"] == "auto" and device.type == "cuda"


def pick_device(text):
    """--device -> torch.device. UserError if there is no such device here."""
    text = ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text
    if text == "cuda" and dist.is_torchelastic_launched():
        text = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process of torchrun
    try:
        return torch.zeros(1, dtype=torch.float64, device=text).device  # DyGA.fit needs float64; Apple's MPS has none
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--device {text}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from error


def main():
    """Parse, say what was chosen, run both stages, write everything."""
    # Take numbers below 1e-38 as 0. Momentum of a weight whose gradient has died out decays to such numbers, and many
    # CPUs compute with them a hundred times slower: after 200,000 images an optimiser step took 1.3 s, not 0.05 s.
    torch.set_flush_denormal(True)  # for this thread and all that it will start, so before anything is computed
    args = build_parser().parse_args()
    args.device = pick_device(args.device)  # text -> torch.device
    join_processes(args.device)
    cfg = settings(args)
    args.out = args.out or f"out/{args.dataset}-{cfg['preset']}"
    kept = Path(args.out) / "ckpt.pt"  # of an earlier run, if there was one
    if Path(args.out).is_file():
        raise UserError(f"--out {args.out}: a file is there; expected a folder, or nothing yet")
    if kept.exists() and not args.resume:
        raise UserError(f"{args.out} holds a run already; add --resume to go on with it, or choose another --out")
    ckpt = read_checkpoint(kept) if args.resume else None
    if ckpt:  # a run goes on with the settings that it began with
        refuse_contradictions(args, ckpt["config"])
        cfg = ckpt["config"]
    run = Run(args, cfg, ckpt)
    run.out.mkdir(parents=True, exist_ok=True)
    if run.rank == 0:
        for half in run.out.glob(".[0-9]*-*"):  # what a killed run was writing
            half.unlink()
        # Rows logged after the checkpoint, if there is one, will be made again: cut them off, a torn last one included.
        with open(run.log_path, "ab") as f:
            f.truncate(min(run.log_bytes, f.tell()))
    if ckpt:
        why = "the checkpoint's"
    else:
        why = f"chosen because the device is {args.device.type}" if args.preset == "auto" else "as asked"
    kind = "bfloat16 in stage 2" if in_bfloat16(cfg, args.device) else "float32"
    kind += f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    duration = {"laptop": "14 to 18 minutes on 2 CPU cores", "tiny": "under a minute"}.get(cfg["preset"], "see the bar")
    duration = f"{cfg['minutes']:g} minutes as asked (not reproducible to the bit)" if cfg["minutes"] else duration
    print(f"preset {cfg['preset']} ({why}); device {args.device}, {kind}; images: {run.data.source_note}; {duration}")
    def stop(signum, frame):  # finish the step, save, leave; a second signal ends the process at once
        run.stopped_by = signal.Signals(signum).name
        signal.signal(signum, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if run.stage == 1:
        run.train_stage1()
    if not args.stage1_only and not run.finished:
        run.train_stage2()
    run.tick(run.stage)
    run.save()  # the finished run: ckpt.pt and the last pictures
    if run.world > 1:
        dist.destroy_process_group()
    print(f"done in {sum(run.minutes.values()):.1f} minutes; wrote {run.ckpt_path}, samples.png, loss.png, log.jsonl")


if __name__ == "__main__":
    data.run(main)
