"""Train the whole method (Algorithm 1): data, stage 1, extractor, U-Net, anchors; one checkpoint.

    python train.py --dataset shapes3d                 # laptop preset on a CPU, paper's on a GPU
    python train.py --dataset shapes3d --preset tiny   # seconds: does everything, learns nothing
    python train.py --dataset shapes3d --resume        # go on where the checkpoint in --out stopped
    torchrun --nproc_per_node=2 train.py --dataset shapes3d    # two GPUs, or two CPU processes

Everything is written to --out (default out/DATASET-PRESET): ckpt.pt (all that evaluate.py and
--resume need), log.jsonl and samples.png. One step of stage 2, as data sees it:

    image x0 -> extractor -> c (B, N, D) -> dyga.align -> c~ (B, N, D) ------.
      |                                                                       v
      '-> stage 1 (frozen, once) -> z0 -> noise eps, time t -> z_t -> unet(z_t, t, c~) = eps^

and the loss is the distance of eps^ from eps.

Reading order: presets, Model, the two loops (train_stage1, train_stage2); then what they call.

Randomness: each step seeds itself from --seed and its place in the course (Run.seed_of). So a
resumed run ends like one that never stopped, to the last bit, on the same CPU with the same number
of threads. With other threads, devices or processes, which nothing forbids, it is the same course
with other roundings or other noise.
"""

import argparse
import ast
import copy
import inspect
import json
import math
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from data import UserError
from dyga import DyGA
from extractor import Extractor
from unet import Muon, UNet, alpha_bar_schedule, ddim, diffusion_loss, ema_update
from vqgan import VQGAN, PatchDiscriminator, psnr, stage1_losses, to_float

FORMAT = 4  # version of the checkpoint's layout
SAVE_MINUTES = 3  # between two checkpoints and their pictures
LOG_STEPS = 25  # between two rows of the log; a signal waits for the next one

# --------------------------------------------------------------------------------------------------
# Presets: differences from the defaults, which are the paper's (Tables 7 to 9, section C.1)

PRESETS = {
    "paper": {},
    # For two CPU cores and less than half an hour. The method is the paper's, the sizes are not.
    "laptop": {
        # Stage 1 makes 8x8 latents (f = 8): a U-Net on 16x16 would cost four times as much per
        # image. It works on patches of 8x8 pixels, at one level, and spends the time that this
        # saves on width. Four channels and a squared error gave sharper pictures than three and
        # L1. No discriminator, which would double the time of a step.
        "vqgan.patch": 8, "vqgan.multipliers": [1], "vqgan.res_blocks": 0, "vqgan.channels": 96,
        "vqgan.z_channels": 4, "stage1.disc_weight": 0.0, "stage1.loss": "mse", "stage1.lr": 6e-3,
        "stage1.batch": 16, "stage1.images": 28_800, "stage1.restart_images": 2_400,
        # The extractor sees the image at 32x32, and all of it is a quarter as wide, for time. No
        # ReLU at the end of a unit (see Extractor).
        "extractor.shrink": 2, "extractor.channels": [16, 32, 64, 64],
        "extractor.hidden": [256, 128], "extractor.unit_hidden": [64, 128],
        "extractor.unit_relu": False,
        # Half as wide, two levels in place of four, for time. Transformers at 4x4 only: at 8x8
        # attention stays uniform, so nothing is looked up there. The latent's sides 8 and 4 are
        # both not in [2]: by the released rule, skip dropout acts on every skip.
        "unet.base": 32, "unet.multipliers": [1, 2], "unet.res_blocks": 1,
        "unet.attention_at": [2], "unet.self_attention": False, "unet.dropout": 0.0,
        # One head: a pixel then looks up one unit at a time, where several heads look up a blend
        # of as many; with one, units came out less mixed.
        "unet.heads": 1,
        # Muon (in stage 1, too) learns shape and orientation, times from the middle of the
        # schedule learn hues, and a squared error small objects, earlier than AdamW, uniform
        # times and L1 do. The rate is Muon's usual one; it rises at first and falls at the end.
        "optimizer": "muon", "t_sampling": "logit_normal", "loss": "mse",
        "lr": 2e-3, "batch": 64, "warmup": 6_400, "decay": 0.3, "clip": 1.0,
        # Beyond the paper: telling costs, so that a factor is told by one unit (Extractor.price).
        "price": 1e-3,
        # Five times as many as there are different ones (a tenth of Shapes3D): the encoder then
        # costs a fifth, and the anchors, fitted after each such epoch, have time to act. The
        # average is as short as the course.
        "images": 240_000, "pool_images": 48_000, "fit_images": 5_000, "ema_half_life": 20_000,
    },
    # For the tests: both stages and anchors in seconds, the discriminator too; nothing is learnt.
    "tiny": {
        "vqgan.patch": 4, "vqgan.channels": 16, "vqgan.multipliers": [1, 2],
        "vqgan.res_blocks": 1, "vqgan.codebook_size": 64, "stage1.lr": 2e-3,
        "stage1.disc_width": 8, "stage1.restart_images": 160, "stage1.batch": 16,
        "stage1.images": 640, "extractor.n_units": 6, "extractor.shrink": 4,
        "extractor.channels": [8, 16, 16], "extractor.hidden": [32, 32],
        "extractor.unit_hidden": [16, 16], "unet.base": 16, "unet.multipliers": [1, 2],
        "unet.res_blocks": 1, "unet.attention_at": [1, 2], "unet.heads": 2, "unet.groups": 4,
        "lr": 1e-3, "batch": 32, "images": 1_280, "pool_images": 640, "ema_half_life": 1_000,
        "fit_images": 320, "ddim_steps": 10,
    },
}
# Section C.1, paper preset: Cars3D is small; CelebA's batch is smaller, at the same EMA a step.
PER_DATASET = {"cars3d": {"fit_every": 5}, "celeba": {"batch": 64, "ema_half_life": 444_000}}


# --------------------------------------------------------------------------------------------------
# The model: all four networks, and how they call each other


class Model(torch.nn.Module):
    """The VQ-GAN, extractor, anchors and U-Net together. cfg: a dict of all settings."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        n_units, unit_dim = cfg["extractor.n_units"], cfg["extractor.unit_dim"]
        self.vqgan = VQGAN(**part(cfg, "vqgan"))  # x0 <-> z0
        self.extractor = Extractor(**part(cfg, "extractor"), noisy=cfg["price"] > 0)  # x0 -> c
        self.dyga = DyGA(n_units, unit_dim, **part(cfg, "dyga"))  # c -> c~
        self.unet = UNet(self.vqgan.z_channels, context_dim=unit_dim, **part(cfg, "unet"))
        self.register_buffer("alpha_bar", alpha_bar_schedule(), persistent=False)  # (T,)

    def forward(self, images, z0, priced=False):
        """Images uint8 (B, 3, H, W), latents z0 (B, Z, h, w) -> what to minimise, a row to log.

        priced: beyond the paper, the scalars get noise, and the price is part of what is minimised
        (Extractor.price). The row has 0-dim tensors: the loss of equation 2, the mean delta, and
        the price before its weight, which is logged from the start.
        """
        s = self.extractor.scalars(to_float(images))  # (B, N)
        price = torch.zeros((), device=s.device)
        if self.cfg["price"]:
            noisy, price = self.extractor.price(s)
            s = noisy if priced else s
        c = self.extractor.expand(s)  # (B, N, D)
        # A loss on c would be added here, for instance its distance from self.dyga.nearest(c)[0]:
        # alignment moves what the U-Net sees, and c only by way of its gradient.
        c_tilde, delta = self.dyga.align(c, return_delta=True)  # (B, N, D), (B, N)
        loss = diffusion_loss(self.unet, z0, c_tilde, self.alpha_bar, self.cfg["loss"],
                              self.cfg["t_sampling"])
        weight = self.cfg["price"] if priced else 0.0
        return loss + weight * price, {"loss": loss, "mean_delta": delta.mean(), "price": price}

    @torch.no_grad()
    def units(self, images):
        """Images uint8 (B, 3, H, W) -> latent units c (B, N, D), before alignment."""
        return self.extractor(to_float(images)).float()

    def noise(self, count, generator):
        """Starting noise (count, Z, h, w) from a CPU generator: the same on every device."""
        side = 64 // self.vqgan.factor
        noise = torch.randn(count, self.vqgan.z_channels, side, side, generator=generator)
        return noise.to(self.alpha_bar.device)

    @torch.no_grad()
    def sample(self, c_tilde, noise, steps=None):
        """DDIM: aligned units c_tilde (B, N, D) and noise -> images uint8 (B, 3, 64, 64)."""
        z0 = ddim(self.unet, noise, c_tilde, self.alpha_bar, steps or self.cfg["ddim_steps"])
        return self.vqgan.decode(z0)


def part(values, name):
    """The entries of one part: {"unet.base": 32, "lr": ...} and "unet" give {"base": 32}."""
    prefix = name + "."
    return {key[len(prefix):]: values[key] for key in values if key.startswith(prefix)}


# --------------------------------------------------------------------------------------------------
# The two loops


def train_stage1(run):
    """Train the VQ-GAN (Table 7), freeze it, and say how well it reconstructs.

    It is short beside stage 2, so every process of a torchrun does all of it.
    """
    cfg, vqgan, disc = run.cfg, run.model.vqgan, run.disc
    vqgan.train()
    bar = run.bar(cfg["stage1.images"])
    budget = cfg["minutes"] and 0.1 * cfg["minutes"]
    while (progress := run.progress(cfg["stage1.images"], budget)) < 1:
        torch.manual_seed(run.seed_of(1, run.seen[1]))
        idx = torch.randint(len(run.ds), (cfg["stage1.batch"],), device=run.device)  # (B,)
        x = to_float(run.ds.images(idx))  # (B, 3, 64, 64)
        # Paper: names no schedule. Constant, then linearly to 0 over the second half.
        lr = cfg["stage1.lr"] * min(1.0, 2 * (1 - progress))
        # The first step restarts too: it puts the codes where the encoder's outputs are.
        if run.seen[1] % cfg["stage1.restart_images"] < len(idx):
            vqgan.codebook.restart(vqgan.encoder(x))

        loss, row = stage1_losses(vqgan, disc, x, cfg["stage1.loss"], cfg["stage1.disc_weight"],
                                  cfg["stage1.commitment"])
        vqgan.zero_grad()
        loss.backward()
        if disc:  # its own loss; the VQ-GAN's loss has left gradients in it, too
            disc.zero_grad()
            row["disc_loss"].backward()
        step(run.optimizers, lr)
        run.after_step(bar, len(idx), row)

    run.write_row(bar)
    vqgan.eval()
    images = run.ds.images(run.fit_idx[:1024])
    z = torch.cat([vqgan.encode(x) for x in images.split(128)])  # (n, Z, h, w)
    vqgan.latent_std.copy_(z.std())
    drawn = torch.cat([vqgan.reconstruct(x) for x in images.split(128)])  # (n, 3, 64, 64)
    decibels = psnr(images, drawn)
    run.log(reconstruction_psnr=decibels)
    print(f"stage 1 done: reconstructions at {decibels:.1f} dB")
    run.start_stage2()
    run.save()  # whatever comes, stage 1 is not lost


def train_stage2(run):
    """Algorithm 1: extractor and U-Net together, anchors fitted anew after every r epochs."""
    cfg, model, average = run.cfg, run.model, run.average
    fit_every = cfg["fit_every"] * (cfg["epoch_images"] or len(run.pool))
    budget = cfg["minutes"] and max(0.96 * cfg["minutes"] - run.minutes[1], 1e-9)
    net = model
    if run.world > 1:  # averages the gradients, and hands process 0's buffers (anchors) to all
        net = torch.nn.parallel.DistributedDataParallel(model)
    # The encoder is frozen and each image comes several times: keep the latents of all.
    z0_pool = encode_pool(run)  # (n, Z, h, w)
    model.extractor.train()
    model.unet.train()
    trained = [*model.extractor.parameters(), *model.unet.parameters()]
    bar = run.bar(cfg["images"])
    while (progress := run.progress(cfg["images"], budget)) < 1:
        # The batch. Every process draws its own share of it.
        torch.manual_seed(run.seed_of(2, run.seen[2], run.rank))
        share = cfg["batch"] // run.world
        idx = torch.randint(len(run.pool), (share,), device=run.device)  # (B/world,)
        x0 = run.ds.images(run.pool[idx])  # (B/world, 3, 64, 64)
        z0 = z0_pool[idx].float()  # (B/world, Z, h, w)

        # The learning rate rises over the warm-up, and falls to 0 over the last share `decay`.
        seen = run.seen[2] + cfg["batch"]
        lr = cfg["lr"] * min(1.0, seen / max(cfg["warmup"], 1))
        lr *= min(1.0, (1 - progress) / max(cfg["decay"], 1e-9))

        # Forward (where times, noise and dropout are drawn), loss, backward, step.
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
            # Noise and price silence what is not yet learnt, so they begin late.
            total, row = net(x0, z0, priced=cfg["price"] > 0 and progress > 0.4)
        net.zero_grad()
        total.backward()
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, cfg["clip"] or math.inf)
        step(run.optimizers, lr)

        # Paper: LDM averages the U-Net alone. The extractor is what gets evaluated, so it too.
        ema_update(average.extractor, model.extractor, cfg["ema_half_life"], cfg["batch"], seen)
        ema_update(average.unet, model.unet, cfg["ema_half_life"], cfg["batch"], seen)

        if seen // fit_every > run.seen[2] // fit_every:
            fit_anchors(run, model, seen)
        run.after_step(bar, cfg["batch"], row)

    # The averaged weights have units of their own, which the training weights' anchors do not
    # fit. So the average is unaligned (samples.png too) until it gets its anchors, here.
    run.write_row(bar)
    fit_anchors(run, average, run.seen[2])
    run.finished = True


def encode_pool(run):
    """Latents of all images that stage 2 trains on, float16 (n, Z, h, w)."""
    latents = []
    for idx in tqdm(run.pool.split(500), "encoding, 500 images each", disable=run.rank > 0):
        latents.append(run.model.vqgan.encode(run.ds.images(idx)).half())
        run.leave_if_told()
    return torch.cat(latents)


@torch.no_grad()
def fit_anchors(run, model, seen):
    """Anchor selection (Algorithm 2) on the model's units of a fixed sample of images."""
    if run.rank or not run.cfg["dyga.lam"]:
        return  # process 0 fits for all; without anchors, or with lambda 0, c~ is c
    model.extractor.eval()  # a unit must not depend on the rest of its batch
    # (n, N, D), without noise, as everywhere but in training with a price
    units = torch.cat([model.units(run.ds.images(idx)) for idx in run.fit_idx.split(500)])
    model.extractor.train(model is run.model)
    if not units.isfinite().all():
        raise UserError(f"units are not finite at image {seen:,}; start again with a lower --lr")
    generator = torch.Generator().manual_seed(run.seed_of(3, seen))
    model.dyga.fit(units, generator)
    run.log(of="training" if model is run.model else "average",
            anchors=model.dyga.mask.sum(1).tolist(),
            converged=sum(model.dyga.report["converged"]))


def make_optimizers(cfg, layers, others, betas, weight_decay):
    """A list of one optimiser or two. Muon has the weights in `layers`, AdamW all the rest.

    `others` are never Muon's: a codebook is a table of points, not a map between spaces.
    """
    adamw, muon = list(others), []
    for p in layers:
        chosen = muon if cfg["optimizer"] == "muon" and p.ndim > 1 else adamw
        chosen.append(p)
    # The learning rates are set at every step, see below. fused: the whole update in one kernel.
    optimizers = [torch.optim.AdamW(adamw, 0.0, betas, weight_decay=weight_decay, fused=True)]
    return optimizers + [Muon(muon, 0.0)] if muon else optimizers


def step(optimizers, lr):
    """One step of every optimiser at this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


# --------------------------------------------------------------------------------------------------
# The run: where it is in its course, and what it writes


class Run:
    """One training run: images, model, optimisers, and where in the course it is."""

    def __init__(self, args, out, cfg, world):
        self.cfg, self.out, self.device = cfg, out, args.device
        self.ckpt_path, self.log_path = self.out / "ckpt.pt", self.out / "log.jsonl"
        self.world, self.rank = world, dist.get_rank() if world > 1 else 0
        self.bfloat16 = in_bfloat16(cfg["precision"], self.device)

        torch.manual_seed(self.seed_of(0))  # the initial weights
        self.model = Model(cfg).to(self.device).eval()
        self.disc = None
        if cfg["stage1.disc_weight"]:
            self.disc = PatchDiscriminator(cfg["stage1.disc_width"]).to(self.device)
        reserve = check_memory(self) if self.device.type == "cuda" else 0
        self.ds = data.load(args.dataset, args.data_dir, args.source, self.device, reserve)
        if world > 1 and self.device.type == "cuda":  # BatchNorm over the whole batch
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)  # EMA, own anchors

        # Fixed random samples: images that anchors are fitted to, images of stage 2.
        generator = torch.Generator().manual_seed(self.seed_of(4))
        order = torch.randperm(len(self.ds), generator=generator).to(self.device)
        self.fit_idx = order[:cfg["fit_images"]]
        self.pool = order[:cfg["pool_images"] or len(order)]
        if not cfg["minutes"]:
            self.pool = self.pool[:cfg["images"]]  # encode no more than will be seen

        # For each stage: images seen, minutes spent.
        self.seen, self.minutes = {1: 0, 2: 0}, {1: 0.0, 2: 0.0}
        self.stage, self.finished, self.stopped_by = 1, False, None
        self.rows, self.log_bytes = [], 0
        self.clock = self.saved = time.perf_counter()
        # AdamW's averages: LDM's short ones where the loss moves with the discriminator.
        betas = (0.5, 0.9) if self.disc else (0.9, 0.99)
        encoder, codebook, decoder = self.model.vqgan.children()
        layers = [*encoder.parameters(), *decoder.parameters()]
        self.optimizers = make_optimizers(cfg, layers, codebook.parameters(), betas, 0.0)
        if self.disc:
            disc_optimizer = torch.optim.AdamW(self.disc.parameters(), 0.0, betas, weight_decay=0.0)
            self.optimizers.append(disc_optimizer)

    def start_stage2(self):
        """From the VQ-GAN's optimisers to those of the extractor and the U-Net."""
        self.stage = 2
        self.model.vqgan.eval().requires_grad_(False)
        self.average.vqgan.load_state_dict(self.model.vqgan.state_dict())
        layers = [*self.model.extractor.parameters(), *self.model.unet.parameters()]
        # Weight decay 0.01: torch's and LDM's default; the paper names none.
        self.optimizers = make_optimizers(self.cfg, layers, [], (0.9, 0.999), 0.01)

    def seed_of(self, *place):
        """A seed for this place in the course: what is random there depends on nothing else."""
        sequence = np.random.SeedSequence([self.cfg["seed"], *place])
        return int(sequence.generate_state(1)[0])

    def progress(self, total, budget):
        """Share of the stage that is done: of its images, or of its minutes if it has a budget."""
        if budget:
            return self.agree(self.minutes[self.stage] / budget)
        return self.seen[self.stage] / total

    def agree(self, number):
        """The largest over all processes. If they did not stop together, some would hang."""
        if self.world == 1:
            return number
        number = torch.tensor(float(number))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def bar(self, total):
        """A progress bar in a terminal; elsewhere a plain line a minute."""
        style = {"dynamic_ncols": True}
        if not sys.stderr.isatty():
            style = {"mininterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
        return tqdm(desc=f"stage {self.stage}", total=None if self.cfg["minutes"] else total,
                    initial=self.seen[self.stage], unit=" images", disable=self.rank > 0, **style)

    def after_step(self, bar, batch, row):
        """Count images and minutes; every LOG_STEPS write a row, save if due, heed signals."""
        now = time.perf_counter()
        self.minutes[self.stage] += (now - self.clock) / 60
        self.clock = now
        self.seen[self.stage] += batch
        bar.update(batch)
        # Numbers stay on the device until the row is written: the CPU would wait for the GPU.
        self.rows.append(torch.stack([value.detach() for value in row.values()]))
        self.names = list(row)
        if len(self.rows) == LOG_STEPS:
            self.write_row(bar)
            if now - self.saved > 60 * SAVE_MINUTES:
                self.save()
            self.leave_if_told()

    def write_row(self, bar):
        """Write and show the means of the steps since the last row. UserError if not finite."""
        if not self.rows:
            return
        means = dict(zip(self.names, torch.stack(self.rows).mean(0).tolist()))
        self.rows = []
        bad = [name for name in means if not math.isfinite(means[name])]
        if bad:
            kept = self.ckpt_path if self.ckpt_path.exists() else "none yet"
            raise UserError(f"{', '.join(bad)} of stage {self.stage} not finite at image "
                            f"{self.seen[self.stage]:,} or shortly before; last good checkpoint: "
                            f"{kept}; start again with a lower --lr (stage 1: --stage1.lr)")
        self.log(**means, images_per_s=bar.format_dict["rate"])
        bar.set_postfix_str(", ".join(f"{name} {means[name]:.3f}" for name in self.names[:2]),
                            refresh=False)

    def log(self, **row):
        """Append a row to log.jsonl."""
        if self.rank:
            return
        place = {"stage": self.stage, "images": self.seen[self.stage],
                 "minutes": round(sum(self.minutes.values()), 3)}
        with open(self.log_path, "a") as file:
            file.write(json.dumps(place | row) + "\n")

    def leave_if_told(self):
        """After a signal: save, say how to go on, end the process."""
        if self.agree(bool(self.stopped_by)):
            self.save()
            print(f"\nstopped by {self.stopped_by or 'another process'}; go on with the same "
                  "command and --resume", file=sys.stderr)
            sys.exit(130)  # as a shell counts a program that was interrupted

    def save(self):
        """Write all that the rest of the run depends on, as one file; then the pictures."""
        self.saved = time.perf_counter()
        if self.rank:
            return  # one process writes
        state = {
            "format": FORMAT, "config": self.cfg, "stage": self.stage, "finished": self.finished,
            "dataset": {"name": self.ds.name, "source": self.ds.source},
            "stage1_images_seen": self.seen[1], "images_seen": self.seen[2],
            "stage1_minutes": self.minutes[1], "minutes": sum(self.minutes.values()),
            "log_bytes": self.log_path.stat().st_size,
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "disc": self.disc.state_dict() if self.disc and self.stage == 1 else {},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        try:
            with data.replacing(self.ckpt_path) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)  # plain tensors and values: weights_only=True reads it
                file.flush()
                os.fsync(file.fileno())  # on the disk before it gets its name
        except (OSError, RuntimeError) as error:  # torch's own error hides the system's
            reason = error.__context__ or error
            raise UserError(f"{self.ckpt_path}: cannot be written ({reason}); the one before it "
                            "stays, if any; make room and go on with --resume") from error
        self.picture()

    def restore(self, ckpt):
        """Stand where the run that wrote ckpt stood. UserError if its parts do not fit."""
        found, expected = ckpt["dataset"], {"name": self.ds.name, "source": self.ds.source}
        if found != expected:
            raise UserError(f"{self.ckpt_path}: its images are {found}, expected {expected}; give "
                            "its --source")
        try:
            if ckpt["images_seen"]:
                self.model.load_state_dict(ckpt["model"])
                self.average.load_state_dict(ckpt["average"])
            else:  # the networks of stage 2 are as new, and may have other settings now
                self.model.vqgan.load_state_dict(part(ckpt["model"], "vqgan"))
            if ckpt["stage"] == 2:
                self.start_stage2()
            elif self.disc:
                self.disc.load_state_dict(ckpt["disc"])
            for optimizer, state in zip(self.optimizers, ckpt["optimizers"], strict=True):
                if state["state"]:
                    optimizer.load_state_dict(state)
            self.seen = {1: ckpt["stage1_images_seen"], 2: ckpt["images_seen"]}
            self.minutes = {1: ckpt["stage1_minutes"], 2: ckpt["minutes"] - ckpt["stage1_minutes"]}
            self.finished, self.log_bytes = ckpt["finished"], ckpt["log_bytes"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.ckpt_path}: not as this train.py wrote it "
                            f"({type(error).__name__}); train it again") from error

    def picture(self):
        """Write samples.png: input, through stage 1 and back, DDIM sample from its units alone."""
        images, model = self.ds.images(self.fit_idx[:10]), self.average
        if self.stage == 1:
            model.vqgan.load_state_dict(self.model.vqgan.state_dict())
        rows = [images, model.vqgan.reconstruct(images)]
        if self.stage == 2:
            noise = model.noise(len(images), torch.Generator().manual_seed(0))
            c_tilde = model.dyga.align(model.units(images))
            rows.append(model.sample(c_tilde, noise, min(50, self.cfg["ddim_steps"])))
        title = f"{self.ds.name} ({self.ds.source}), {self.seen[2]:,} images seen in stage 2"
        labels = ["input", "stage 1", "sample"][:len(rows)]
        picture = data.image_grid(torch.stack(rows), labels, title=title, scale=2)
        with data.replacing(self.out / "samples.png") as temporary:
            picture.save(temporary)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def read_checkpoint(path):
    """A checkpoint of this code, read safely -> dict. UserError for anything else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected a checkpoint of train.py, such as "
                        "out/shapes3d-laptop/ckpt.pt")
    try:
        # torch.load ignores the file's checksums: a flipped bit would become a wrong weight.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # the first damaged part
                raise zipfile.BadZipFile
        ckpt = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from a file
    except Exception as error:  # foreign bytes fail in any way; nothing of ours is inside this try
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: damaged, "
                        "cut short, or of another program); expected a ckpt.pt of train.py "
                        "(tests/released.py converts those of the paper's code)") from error
    known = isinstance(ckpt, dict) and ckpt.get("format") == FORMAT
    if not known or not default_settings().keys() <= ckpt["config"].keys():
        raise UserError(f"{path}: of another version of train.py, or of another program; expected "
                        f"format {FORMAT}; train it again (tests/released.py converts files of the "
                        "paper's code)")
    return ckpt


def load_checkpoint(path, device="cpu"):
    """Checkpoint file -> (averaged model in eval mode, the checkpoint)."""
    ckpt = read_checkpoint(path)
    if ckpt["stage"] == 1:
        raise UserError(f"{path}: holds stage 1 only, expected both; finish it with --resume")
    try:
        model = Model(ckpt["config"])
        model.load_state_dict(ckpt["average"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not as this train.py wrote it ({type(error).__name__}), expected "
                        "all parts; train it again") from error
    return model.to(device).eval(), ckpt


# --------------------------------------------------------------------------------------------------
# Settings: default < preset < dataset < flag
#
# One row a setting: name, default (*: see the signature of the class), least and most or choices,
# help. Defaults are the paper's where it states them.

TABLE = """
stage1.images          2_000_000  1..1e12    images that stage 1 sees (not in the paper)
stage1.batch           64         1..1e5     images per step of stage 1 (not in the paper)
stage1.lr              2e-4       0..1       learning rate of stage 1 (not in the paper)
stage1.loss            l1         l1|mse     of the reconstruction (mse: sharper edges)
stage1.disc_weight     0.75       0..100     of the discriminator; 0 leaves it out altogether
stage1.disc_width      64         1..1024    width of the discriminator's first layer
stage1.commitment      0.25       0..100     weight of the encoder's term of the codebook loss
stage1.restart_images  100_000    1..1e12    images between two rescues of unused codes
images                 10_000_000 1..1e12    images that stage 2 sees (not in the paper)
pool_images            0          0..1e12    different ones among these, at random; 0: all there are
batch                  512        1..1e5     images per step of stage 2
lr                     1e-4       0..1       learning rate of stage 2
optimizer              adamw      adamw|muon                of both stages (not in the paper)
warmup                 0          0..1e12    images over which the learning rate rises from 0
decay                  0.0        0..1       last share of the course in which it falls to 0
clip                   0.0        0..1e6     largest gradient norm; 0 does not clip
loss                   l1         l1|mse     of eps^ - eps (equation 2 names none; released: l1)
t_sampling             uniform    uniform|logit_normal      how t is drawn in training
price                  0.0        0..1       weight of what the units tell (beyond the paper)
ema_half_life          3_550_000  1..1e12    images; of the averaged weights (0.9999 a step)
precision              auto       auto|float32|bfloat16     of stage 2; auto: bfloat16 on a GPU
epoch_images           0          0..1e12    length of an epoch; 0: one pass over the pool
fit_every              1          1..1e6     r: epochs between two fits of the anchors
fit_images             20_000     1..1e6     images that anchors are fitted to (not in the paper)
ddim_steps             100        1..1000    steps of a DDIM sample
vqgan.channels         *          1..1024    width of the first level
vqgan.multipliers      *          1..64      width of each level, in channels
vqgan.res_blocks       *          0..16      residual blocks a level; the decoder has one more
vqgan.z_channels       *          1..256     numbers per latent position
vqgan.codebook_size    *          1..1e6     codes
vqgan.patch            *          1..64      side of the patches folded into channels (paper: 1)
vqgan.group_channels   *          1..1024    least channels in a group of GroupNorm (LDM: 1)
extractor.n_units      *          1..4096    N (released configuration: 20)
extractor.unit_dim     *          2..4096    D, numbers of a unit
extractor.channels     *          1..4096    of the convolutions
extractor.hidden       *          1..1e5     widths of the dense layers
extractor.unit_hidden  *          1..1e5     widths of a unit's private MLP
extractor.shrink       *          1..64      average this many pixels squared first (paper: 1)
extractor.unit_relu    *          0..1       end every unit in a ReLU
extractor.fsq_levels   *          2..1000    Table 11's rival of DyGA: 8 5 5, with --dyga.lam 0
dyga.k_init            *          1..1024    anchors a unit to start with
dyga.k_max             *          1..1024    anchors a unit at most
dyga.max_iter          *          1..1e4     EM iterations at most
dyga.lam               *          0..1       lambda of equation 6; 0 switches alignment off
dyga.accept            *          always|bic which splits are kept; bic: those that improve the BIC
dyga.d_max             *          1..4096    main directions of a component at most
dyga.spread            *          0..1e6     a wider cluster is split, in scales of its unit
dyga.split_odds        *          0..1       chance of other clusters to be split (accept always)
dyga.min_samples       *          1..1e6     smaller clusters are dropped
dyga.min_fraction      *          0..1       clusters of a smaller share are dropped
dyga.tol               *          0..1e6     EM ends when its mean log-likelihood rises by less
unet.base              *          2..4096    width of the first level
unet.multipliers       *          1..64      width of each level, in base
unet.res_blocks        *          1..16      residual blocks a level on the way down
unet.attention_at      *          1..64      downsampling factors that have Transformers
unet.heads             *          1..256     attention heads
unet.groups            *          1..4096    of every GroupNorm
unet.dropout           *          0..0.99    inside the residual blocks
unet.skip_dropout      *          0..0.99    1 - p of equation 7
unet.skip_dropout_where * released|text      which skips (see unet.py)
unet.backbone_dropout  *          0..0.99    Table 12's control
unet.self_attention    *          0..1       self-attention in the Transformers
"""
SETTINGS = {row.split()[0]: row.split(maxsplit=3)[1:] for row in TABLE.strip().splitlines()}
PARTS = {"vqgan": VQGAN, "extractor": Extractor, "dyga": DyGA, "unet": UNet}


def default_settings():
    """Every setting's default, the paper's value: {name: value}."""
    defaults = {}
    for name, (text, _, _) in SETTINGS.items():
        if text == "*":
            network, argument = name.split(".")
            value = inspect.signature(PARTS[network]).parameters[argument].default
            defaults[name] = list(value) if isinstance(value, tuple) else value
        else:
            defaults[name] = text if text[0].isalpha() else ast.literal_eval(text)
    return defaults


def build_parser():
    """Every flag with its help; the settings' defaults are the paper's."""
    p = data.Parser(
        formatter_class=argparse.HelpFormatter,
        description="Train disentangled latent units with a diffusion model. In brackets: the "
        "paper's value (or ours where it has none), and the range. A preset changes some.")
    p.add_argument("--dataset", required=True, choices=list(data.DATASETS))
    p.add_argument("--preset", default="auto", choices=["auto", *PRESETS],
                   help="auto: paper on CUDA, laptop on a CPU")
    p.add_argument("--out", help="folder for everything written (default out/DATASET-PRESET)")
    p.add_argument("--data_dir", default="data", help="folder of the datasets' files")
    p.add_argument("--source", default="auto", choices=["auto", "official", "rendered"])
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--resume", action="store_true", help="go on from ckpt.pt in --out")
    p.add_argument("--stage1_only", action="store_true", help="stop after stage 1")
    p.add_argument("--seed", type=int, default=0, help="same seed, CPU, threads: same numbers [0]")
    p.add_argument("--minutes", type=float, help="fit the course into them (not reproducible)")
    for name, default in default_settings().items():
        _, limits, text = SETTINGS[name]
        kind = {"type": type(default)}
        if isinstance(default, bool):  # --unet.self_attention and --no-unet.self_attention
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, str):
            kind = {"choices": limits.split("|")}
        elif isinstance(default, list):  # --unet.multipliers 1 2 4 4
            kind = {"type": int, "nargs": "+"}
        p.add_argument(f"--{name}", default=default, **kind, help=f"{text} [{default}; {limits}]")
    return p


def parse():
    """The command line -> args, settings (a plain dict), checkpoint to resume or None."""
    parser = build_parser()
    args = parser.parse_args()
    args.device = pick_device(args.device)
    preset = args.preset
    if preset == "auto":
        preset = "paper" if args.device.type == "cuda" else "laptop"
    out = Path(args.out or f"out/{args.dataset}-{preset}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file is there; expected a folder, or nothing yet")
    if (out / "ckpt.pt").exists() and not args.resume:
        raise UserError(f"{out} holds a run already; add --resume to go on with it, or choose "
                        "another --out")

    ckpt = None
    begun = PRESETS[preset] | {"preset": preset}
    if preset == "paper":
        begun |= PER_DATASET.get(args.dataset, {})
    if args.resume:  # a run goes on with the settings that it began with
        ckpt = read_checkpoint(out / "ckpt.pt")
        begun = ckpt["config"]
    parser.set_defaults(**begun)
    found = vars(parser.parse_args())
    cfg = {name: found[name] for name in [*SETTINGS, "preset", "seed", "minutes"]}
    if cfg["preset"] == "auto":
        cfg["preset"] = preset
    if ckpt:
        refuse_contradictions(cfg, ckpt)
    return args, out, cfg, ckpt


def refuse_contradictions(cfg, ckpt):
    """UserError if a flag beside --resume differs from the checkpoint's settings.

    The learning rate follows the course planned at the start, so a longer course is another run
    from its first step. But between the stages, the flags of stage 2 may still be changed: to try
    several, copy the folder of a finished stage 1, and resume each copy.
    """
    for name, held in ckpt["config"].items():
        stage1 = name.startswith(("vqgan.", "stage1.")) or name in ("preset", "minutes")
        if cfg[name] != held and (stage1 or ckpt["stage"] == 1 or ckpt["images_seen"]):
            raise UserError(f"--{name} {cfg[name]}: the run to resume began with {held}; leave it "
                            "out, or choose another --out")


def check_settings(cfg, world):
    """UserError for a number out of its range, and for numbers that do not fit each other."""
    ranges = {name: limits for name, (_, limits, _) in SETTINGS.items() if ".." in limits}
    ranges |= {"seed": "0..4294967295", "minutes": "0.01..1e6"}
    for name, limits in ranges.items():
        least, most = map(float, limits.split(".."))
        values = cfg[name] if isinstance(cfg[name], list) else [cfg[name]]
        for value in values:
            if value is not None and not least <= value <= most:  # nan is in no range
                raise UserError(f"--{name} {value}: expected {limits}")

    side = 64 / cfg["vqgan.patch"] / 2 ** (len(cfg["vqgan.multipliers"]) - 1)  # of a latent
    halved = side / 2 ** (len(cfg["unet.multipliers"]) - 1)
    kept = 64 / cfg["extractor.shrink"] / 2 ** (len(cfg["extractor.channels"]) - 1)
    unit = math.lcm(2, cfg["unet.groups"], cfg["unet.heads"])
    for name, fits, expected in [
        ("vqgan.patch", side % 1 == 0, "64 pixels to be divisible by it and by all halvings"),
        ("unet.multipliers", halved % 1 == 0, f"fewer, as a latent has {side:g} pixels a side"),
        ("extractor.channels", kept >= 1, "fewer: all but one halve the image"),
        ("vqgan.channels", cfg["vqgan.channels"] % cfg["vqgan.group_channels"] == 0,
         "a multiple of --vqgan.group_channels"),
        ("unet.base", cfg["unet.base"] % unit == 0, "a multiple of 2, --unet.groups and .heads"),
        ("dyga.k_init", cfg["dyga.k_init"] <= cfg["dyga.k_max"], "at most --dyga.k_max"),
        ("batch", cfg["batch"] % world == 0, f"a multiple of {world} processes"),
    ]:
        if not fits:
            raise UserError(f"--{name} {cfg[name]}: expected {expected}")


# --------------------------------------------------------------------------------------------------
# The machine


def pick_device(text):
    """--device -> torch.device. UserError if there is no such device here."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and dist.is_torchelastic_launched():
        text = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process of torchrun
    try:
        # DyGA.fit needs float64, which Apple's MPS does not have: Macs train on the CPU.
        return torch.zeros(1, dtype=torch.float64, device=text).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {text}: cannot be used here ({reason}); try cpu") from error


def in_bfloat16(precision, device):
    """Does stage 2 compute in bfloat16?"""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it slowly
    return precision == "bfloat16"  # not by itself on a CPU: scores seemed to suffer


def check_memory(run):
    """Does a step of stage 2 fit into the GPU? -> bytes it takes. UserError naming a batch."""
    wanted = run.cfg["batch"] // run.world
    share = wanted  # of this process
    while share:
        try:
            trial_step(run, share)
            break
        except torch.OutOfMemoryError:
            share //= 2
    if share < wanted:
        raise UserError(f"--batch {run.cfg['batch']}: a step of stage 2 does not fit into the "
                        f"memory of {run.device}; expected at most --batch {share * run.world} "
                        "(0: smaller networks, or --device cpu)")
    return torch.cuda.max_memory_allocated(run.device)


def trial_step(run, batch):
    """Forward, backward and optimiser of stage 2 at full size, on a copy of the model."""
    model = copy.deepcopy(run.model).train()
    images = torch.zeros(batch, 3, 64, 64, dtype=torch.uint8, device=run.device)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
        total, _ = model(images, model.vqgan.encode(images))
    total.backward()
    layers = [*model.extractor.parameters(), *model.unet.parameters()]
    step(make_optimizers(run.cfg, layers, [], (0.9, 0.999), 0.0), lr=0.0)


def lock(path):
    """Hold the log open and locked: a second run in its folder is refused. UserError."""
    file = open(path, "a")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that dies lets go of it
    except ImportError:
        pass  # Windows has no fcntl: no lock there
    except OSError as error:
        raise UserError(f"{path.parent}: another run writes there; wait for it, or choose another "
                        "--out") from error
    return file


def main():
    """Parse, say what was chosen, run both stages, write everything."""
    # Numbers below 1e-38 count as 0. Momentum of a weight whose gradient has died out decays to
    # such numbers, and many CPUs compute with them a hundred times slower.
    torch.set_flush_denormal(True)
    args, out, cfg, ckpt = parse()
    world = 1
    if dist.is_torchelastic_launched():
        # A process that dies ends the run: torchrun stops the others, or they give up waiting.
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        world = dist.get_world_size()
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    check_settings(cfg, world)
    run = Run(args, out, cfg, world)
    if ckpt:
        run.restore(ckpt)

    if run.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = lock(run.log_path)
        for half in out.glob(".[0-9]*-*"):  # what a killed run was writing
            half.unlink()
        # Rows logged after the checkpoint will be made again: cut them off, half a row too.
        log.truncate(min(run.log_bytes, run.log_path.stat().st_size))
    print(f"images: {run.ds.source_note}")
    print(f"preset {cfg['preset']} (--preset {args.preset}); device {run.device}, stage 2 in "
          f"{'bfloat16' if run.bfloat16 else 'float32'}, {torch.get_num_threads()} threads; "
          f"writes to {out}")

    def stop(signum, frame):  # finish a few steps, save, leave; a second signal ends at once
        run.stopped_by = signal.Signals(signum).name
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if run.stage == 1:
        train_stage1(run)
    if not args.stage1_only and not run.finished:
        train_stage2(run)
    run.save()
    if world > 1:
        dist.destroy_process_group()
    print(f"done in {sum(run.minutes.values()):.1f} minutes; wrote {run.ckpt_path}, "
          "samples.png, log.jsonl")


if __name__ == "__main__":
    data.run(main)
