"""Train the whole method (Algorithm 1): data, stage 1, extractor, U-Net, anchors; one checkpoint.

    python train.py --dataset shapes3d                   # laptop preset on a CPU, paper's on a GPU
    python train.py --dataset shapes3d --preset minute   # a first look: three hues, some minutes
    python train.py --dataset shapes3d --resume          # go on from the checkpoint in --out
    torchrun --nproc_per_node=2 train.py --dataset shapes3d    # two GPUs, or two CPU processes

It writes to --out (default out/DATASET-PRESET): ckpt.pt (all that evaluate.py and --resume need),
log.jsonl and samples.png. README.md draws one step of stage 2.

Each step seeds itself from --seed and its place in the run. So a resumed run ends like one that
never stopped, to the last bit, on the same CPU with as many threads. With other threads sums round
differently; on other devices, or in more processes, images and noise are others: so are the scores.
"""

import argparse
import ast
import contextlib
import copy
import inspect
import io
import json
import math
import os
import shlex
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
from dyga import DyGA, informative_units, unmixing
from extractor import Extractor
from unet import Muon, UNet, alpha_bar_schedule, ddim, diffusion_loss, ema_update
from vqgan import VQGAN, PatchDiscriminator, stage1_losses, to_float

FORMAT = 8  # version of the checkpoint's layout
SAVE_MINUTES = 3  # between two checkpoints and their pictures
LOG_STEPS = 25  # between two rows of the log; a signal waits for the next one
PLACE = ("stage", "seen", "minutes", "finished", "log_bytes")  # where a run is, in its checkpoint

# ---- Presets -------------------------------------------------------------------------------------
# Flags that are put in front of yours; what each means stands in the table of settings below.
PRESETS = {
    "paper": "",
    "laptop": """
    # For a laptop's CPU: the paper's method and four additions (unit_line, v_weight, select_at,
    # unmix_at). Most other differences save time. On latents of 16x16 a U-Net would cost four times
    # as much. One level of 8x8 patches, without residual blocks, leaves time for width. Four
    # channels and a squared error are sharper than three and L1. A discriminator doubles a step.
    --vqgan.patch 8 --vqgan.multipliers 1 --vqgan.res_blocks 0 --vqgan.channels 96
    --vqgan.z_channels 4 --stage1.disc_weight 0 --stage1.loss mse --stage1.lr 6e-3
    --stage1.batch 16 --stage1.images 28800 --stage1.restart_images 2400

    # Small, for time. No ReLU at the end of a unit, and a straight line in it (see Extractor).
    --extractor.shrink 2 --extractor.channels 16 32 64 64 --extractor.hidden 256 128
    --extractor.unit_hidden 64 128 --no-extractor.unit_relu --extractor.unit_line

    # Small, for time. Transformers at 4x4 only (2 is the downsampling factor): at 8x8 attention
    # stays uniform. By the released rule (see UNet), skip dropout then acts on every skip. One
    # head: a pixel looks up one unit at a time. Several look up one each and blend them.
    --unet.base 32 --unet.multipliers 1 2 --unet.res_blocks 1 --unet.attention_at 2 --unet.heads 1
    --no-unet.self_attention --unet.dropout 0

    # What is learnt earlier: shape and orientation by Muon (in stage 1, too) than by AdamW; hues
    # with times from the middle of the schedule than with uniform ones; small objects with a
    # squared error than with L1. What is known roughly then becomes precise: the loss moves from
    # the error of eps to that of v. (From the start on, small objects would be learnt too late.)
    --optimizer muon --t_sampling logit_normal --loss mse --v_weight 1
    # Batches of 32 learn more from an image, but take a third longer for it. Not searched for:
    # better rates, batch of stage 1, warm-up, decay, clipping, and the shares below.
    --lr 2e-3 --batch 64 --warmup 6400 --decay 0.3 --clip 1
    # Beyond the paper: redundant units are silenced (select_units), twice, as kept ones change
    # meanwhile. Kept ones are turned until independent (unmix_units): before the second selection,
    # which would otherwise drop one of a mixed pair, and again later, as they drift back.
    --select_at 0.5 0.7 --unmix_at 0.5 0.65 0.8 0.9

    # A tenth of Shapes3D, each image drawn 4.7 times on average and encoded only once. Anchors are
    # fitted every 48,000 images. The moving average is short, like the run.
    --images 224000 --pool_images 48000 --fit_images 5000 --ema_half_life 20000
    """,
}
PRESETS["minute"] = PRESETS["laptop"] + """
    # For a first look: Shapes3D's three hues alone, 1,000 images, so nearly everything may be
    # smaller. Latents of 4x4 (of more channels, therefore) leave the U-Net one level. Anchors are
    # fitted every 6,000 images. Batch, warm-up, groups and DDIM steps were not searched.
    --vary "floor hue,wall hue,object hue" --vqgan.multipliers 1 2 --vqgan.channels 32
    --vqgan.codebook_size 512 --vqgan.z_channels 8 --stage1.images 4800 --stage1.restart_images 800
    --extractor.shrink 4 --extractor.channels 16 32 32 --extractor.hidden 64
    --extractor.unit_hidden 64 64 --unet.groups 16 --unet.multipliers 1 --unet.attention_at 1
    --batch 32 --warmup 1600 --images 56000 --pool_images 1000 --fit_images 1000 --fit_every 6
    --ema_half_life 2000 --ddim_steps 20
"""
# Section C.1, paper preset: Cars3D is small; CelebA's batch is smaller, at the same EMA a step.
PER_DATASET = {"cars3d": "--fit_every 5", "celeba": "--batch 64 --ema_half_life 444000"}

# ---- The model: all four networks, and how they call each other ----------------------------------
class Model(torch.nn.Module):
    """The VQ-GAN, extractor, anchors and U-Net together. cfg: a dict of all settings."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg["extractor.unit_dim"]
        self.vqgan = VQGAN(**part(cfg, "vqgan"))  # x0 <-> z0
        self.extractor = Extractor(**part(cfg, "extractor"))  # x0 -> c
        self.dyga = DyGA(cfg["extractor.n_units"], D, **part(cfg, "dyga"))  # c -> c~
        self.unet = UNet(self.vqgan.z_channels, context_dim=D, **part(cfg, "unet"))
        self.register_buffer("alpha_bar", alpha_bar_schedule(), persistent=False)  # (T,)

    def forward(self, images, z0, v_weight=0.0):
        """Images uint8 (B, 3, H, W), latents z0 (B, Z, h, w) -> the loss of equation 2, and what
        to log: a dict of 0-dim tensors."""
        c = self.extractor(to_float(images))  # (B, N, D)
        # A loss on c would be added here (see dyga.nearest): alignment pulls no c to an anchor.
        c_tilde, delta = self.dyga.align(c, return_delta=True)  # (B, N, D), (B, N)
        loss = diffusion_loss(self.unet, z0, c_tilde, self.alpha_bar, self.cfg["loss"],
                              self.cfg["t_sampling"], v_weight)
        return loss, {"loss": loss, "mean_delta": delta.mean()}

    @torch.no_grad()
    def units(self, images):
        """Images uint8 (B, 3, H, W) -> latent units c (B, N, D), before alignment."""
        return self.extractor(to_float(images)).float()

    def noise(self, count, generator):
        """Starting noise (count, Z, h, w) from a CPU generator: the same on every device."""
        noise = torch.randn(count, *self.vqgan.latent_shape, generator=generator)
        return noise.to(self.alpha_bar.device)

    def sample(self, c_tilde, noise, steps):
        """DDIM: aligned units c_tilde (B, N, D) and noise -> images uint8 (B, 3, 64, 64)."""
        return self.vqgan.decode(ddim(self.unet, noise, c_tilde, self.alpha_bar, steps))

def part(values, name):
    """The entries of one part: {"unet.base": 32, "lr": ...} and "unet" give {"base": 32}."""
    name += "."
    return {key.removeprefix(name): values[key] for key in values if key.startswith(name)}

# ---- The two loops -------------------------------------------------------------------------------
def train_stage1(run):
    """Train the VQ-GAN (Table 7). It is short: every process of a torchrun does all of it."""
    cfg, vqgan, disc = run.cfg, run.model.vqgan, run.disc
    total = cfg["stage1.images"]
    run.start_bar(total)
    while run.seen[1] < total:
        torch.manual_seed(run.seed_of(1, run.seen[1]))
        idx = torch.randint(len(run.ds), (cfg["stage1.batch"],), device=run.device)  # (B,)
        x = to_float(run.ds.images(idx))  # (B, 3, 64, 64)
        # Paper: names no schedule. Constant, then linearly to 0 over the second half.
        lr = cfg["stage1.lr"] * min(1.0, 2 - 2 * run.seen[1] / total)
        if run.seen[1] % cfg["stage1.restart_images"] < len(idx):
            vqgan.codebook.restart(vqgan.encoder(x))  # at step 1 too: all codes move onto latents
        loss, row = stage1_losses(vqgan, disc, x, cfg["stage1.loss"], cfg["stage1.disc_weight"])
        vqgan.zero_grad()
        loss.backward()
        if disc:  # its own loss; the VQ-GAN's loss has left gradients in it, too
            disc.zero_grad()
            row["disc_loss"].backward()
        step(run.optimizers[1], lr)
        run.seen[1] += len(idx)
        run.after_step(len(idx), row)

    run.write_row()
    decibels = vqgan.finish(run.ds.images(run.fit_idx[:1024]))
    run.log(reconstruction_psnr=decibels)
    print(f"stage 1 done: reconstructions at {decibels:.1f} dB")
    run.stage = 2
    run.save()  # whatever comes, stage 1 is not lost

def train_stage2(run):
    """Algorithm 1: extractor and U-Net together, anchors fitted anew after every r epochs."""
    cfg, model, average = run.cfg, run.model, run.average
    batch, total = cfg["batch"], cfg["images"]
    fit_every = cfg["fit_every"] * len(run.pool)  # in images
    # The encoder is frozen, and each image comes several times: keep the latents of all.
    model.vqgan.requires_grad_(False)
    latents = []
    for idx in tqdm(run.pool.split(500), "encoding, 500 images each", disable=None):
        latents.append(model.vqgan.encode(run.ds.images(idx)).half())
        run.stop_if_signalled()
    z0_pool = torch.cat(latents)  # float16 (n, Z, h, w)
    model.extractor.train()
    model.unet.train()
    net = model
    if run.world > 1:  # averages the gradients, and hands process 0's buffers (anchors) to all
        net = torch.nn.parallel.DistributedDataParallel(model)
    run.start_bar(total)
    while (now := run.seen[2]) < total:
        # The batch. Every process draws its own share of it.
        torch.manual_seed(run.seed_of(2, now, run.rank))
        idx = torch.randint(len(run.pool), (batch // run.world,), device=run.device)  # (B/world,)
        x0 = run.ds.images(run.pool[idx])  # (B/world, 3, 64, 64)
        z0 = z0_pool[idx].float()  # (B/world, Z, h, w)

        # The learning rate rises over the warm-up, and falls to 0 over the last share `decay`.
        seen, progress = now + batch, now / total
        rise, fall = seen / max(cfg["warmup"], 1), (1 - progress) / max(cfg["decay"], 1e-9)
        lr = cfg["lr"] * min(1.0, rise, fall)

        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
            loss, row = net(x0, z0, cfg["v_weight"] * progress)
        net.zero_grad()
        loss.backward()
        row["grad_norm"] = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg["clip"] or math.inf)
        step(run.optimizers[2], lr)
        run.seen[2] = seen

        # Paper: no word on what is averaged (LDM: the U-Net). The extractor gets evaluated: it too.
        ema_update(average.extractor, model.extractor, cfg["ema_half_life"], batch, seen)
        ema_update(average.unet, model.unet, cfg["ema_half_life"], batch, seen)

        # In the step that crosses such a share of the course.
        if any(now < share * total <= seen for share in cfg["select_at"]):
            select_units(run)
        if any(now < share * total <= seen for share in cfg["unmix_at"]):
            unmix_units(run)
        if seen // fit_every > now // fit_every:
            fit_anchors(run, model)
        run.after_step(batch, row)

    run.write_row()
    # The averaged weights have units of their own, which the training weights' anchors do not fit.
    # So the average is unaligned (samples.png too) until it gets its anchors, here.
    fit_anchors(run, average)
    run.finished = True

def scalars_of(run):
    """The averaged weights' scalars of the images that anchors are fitted to, (n, N)."""
    s = [run.average.extractor.scalars(to_float(run.ds.images(i))) for i in run.fit_idx.split(500)]
    s = torch.cat(s)
    if run.world > 1:
        dist.broadcast(s, 0)  # so that all processes come to the same conclusion
    return s

def select_units(run):
    """Beyond the paper: silence units, in both models, that are redundant in the average."""
    kept = informative_units(scalars_of(run), run.cfg["select_least"])
    for model in (run.model, run.average):
        model.extractor.kept.zero_()
        model.extractor.kept[kept] = True
    run.log(kept=kept)

@torch.no_grad()
def unmix_units(run):
    """Beyond the paper: part factors that kept units mix, by one turn for both models, measured on
    the average. MLPs and U-Net learn to read new scalars; anchors stay old until their next fit."""
    s = scalars_of(run)[:, run.average.extractor.kept]  # (n, U)
    turn = unmixing(s.cpu()).to(s)  # (U, U); too small for a GPU
    for model in (run.model, run.average):
        model.extractor.turn_scalars(turn, s.mean(0))
    run.log(turn=turn.tolist())

def fit_anchors(run, model):
    """Anchor selection (Algorithm 2) on the model's units of a fixed sample of images."""
    if run.rank or not run.cfg["dyga.lam"]:
        return  # process 0 fits for all; with lambda 0, c~ is c
    model.extractor.eval()  # a unit must not depend on the rest of its batch
    units = torch.cat([model.units(run.ds.images(i)) for i in run.fit_idx.split(500)])  # (n, N, D)
    model.extractor.train(model is run.model)
    if not units.isfinite().all():
        raise UserError("units are not finite; start again with a lower --lr")
    model.dyga.fit(units, torch.Generator().manual_seed(run.seed_of(3, run.seen[2])))
    run.log(of="training" if model is run.model else "average",
            anchors=model.dyga.mask.sum(1).tolist())

def make_optimizers(cfg, networks, others, betas, weight_decay):
    """A list: AdamW, and with muon also Muon, for the networks' weights of two or more dimensions.
    Never for `others`: a codebook, say, is a table of points, not a map between spaces."""
    matrices, rest = [], [p for network in others for p in network.parameters()]
    for p in torch.nn.ModuleList(networks).parameters():
        chosen = matrices if cfg["optimizer"] == "muon" and p.ndim > 1 else rest
        chosen.append(p)
    # The learning rates are set at every step, see below. fused: the whole update in one kernel.
    optimizers = [torch.optim.AdamW(rest, 0.0, betas, weight_decay=weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, 0.0))
    return optimizers

def step(optimizers, lr):
    """One step of every optimiser at this learning rate."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

# ---- The run: where it is, and what it writes ----------------------------------------------------
class Run:
    """One training run: images, model, optimisers, how far it is, and its files."""
    def __init__(self, cfg, device, world):
        self.cfg, self.device, self.out = cfg, device, Path(cfg["out"])
        self.ckpt_path, self.log_path = self.out / "ckpt.pt", self.out / "log.jsonl"
        self.world, self.rank = world, dist.get_rank() if world > 1 else 0
        self.bfloat16 = in_bfloat16(device)
        torch.manual_seed(self.seed_of(0))  # the initial weights
        self.model = Model(cfg).to(device).eval()
        self.disc = PatchDiscriminator().to(device) if cfg["stage1.disc_weight"] else None
        self.ds = data.load(cfg["dataset"], cfg["data_dir"], cfg["source"], device, cfg["vary"])
        cfg["source"] = self.ds.source  # in place of auto
        if world > 1 and device.type == "cuda":  # BatchNorm over the whole batch
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.average = copy.deepcopy(self.model).requires_grad_(False)  # EMA, own anchors
        self.average.vqgan = self.model.vqgan  # one stage 1 for both
        # Fixed random samples: images that anchors are fitted to, images of stage 2.
        generator = torch.Generator().manual_seed(self.seed_of(4))
        order = torch.randperm(len(self.ds), generator=generator).to(device)
        self.fit_idx = order[:cfg["fit_images"]]
        self.pool = order[:min(cfg["pool_images"], cfg["images"])]  # no more than will be seen
        # AdamW's averages: LDM's short ones where a discriminator keeps moving the loss. Its weight
        # decay in stage 2, 0.01, is torch's and LDM's; the paper names none. Muon has none.
        betas = (0.5, 0.9) if self.disc else (0.9, 0.99)
        net, vqgan = self.model, self.model.vqgan
        others = [vqgan.codebook, self.disc] if self.disc else [vqgan.codebook]
        self.optimizers = {
            1: make_optimizers(cfg, [vqgan.encoder, vqgan.decoder], others, betas, 0.0),
            2: make_optimizers(cfg, [net.extractor, net.unet], [], (0.9, 0.999), 0.01),
        }
        self.stage, self.seen, self.finished = 1, {1: 0, 2: 0}, False  # seen: images of each stage
        self.minutes, self.log_bytes = 0.0, 0
        self.start = self.saved = time.perf_counter()
        self.rows, self.stopped_by = [], None

    def seed_of(self, *place):
        """A seed for this place in the run: what is random there depends on nothing else."""
        return int(np.random.SeedSequence([self.cfg["seed"], *place]).generate_state(1)[0])

    def start_bar(self, total):
        """A progress bar in a terminal; elsewhere a plain line a minute."""
        style = {} if sys.stderr.isatty() else {"mininterval": 60, "bar_format": "{l_bar}{r_bar}\n"}
        self.bar = tqdm(desc=f"stage {self.stage}", total=total, initial=self.seen[self.stage],
                        unit=" images", disable=self.rank, **style)

    def after_step(self, batch, row):
        """Every LOG_STEPS write a row, save if due, heed signals."""
        self.bar.update(batch)
        # Numbers stay on the device until the row is written: the CPU would wait for the GPU.
        self.rows.append({name: value.detach() for name, value in row.items()})
        if len(self.rows) == LOG_STEPS:
            self.write_row()
            if time.perf_counter() - self.saved > 60 * SAVE_MINUTES:
                self.save()
            self.stop_if_signalled()

    def write_row(self):
        """Write and show the means of the steps since the last row. UserError if not finite."""
        if not self.rows:
            return
        means = {name: torch.stack([row[name] for row in self.rows]).mean().item()
                 for name in self.rows[0]}
        self.rows = []
        if not math.isfinite(sum(means.values())):
            raise UserError(f"stage {self.stage}, image {self.seen[self.stage]:,}: not finite: "
                            f"{means}; start again with a lower --lr or --stage1.lr; the last "
                            f"good state, if any, is in {self.ckpt_path}")
        self.log(**means)
        self.bar.set_postfix(means, refresh=False)

    def log(self, **row):
        """Append a row to log.jsonl."""
        if self.rank:
            return
        self.minutes = (time.perf_counter() - self.start) / 60
        place = {"stage": self.stage, "images": self.seen[self.stage], "minutes": self.minutes}
        with open(self.log_path, "a") as file:
            file.write(json.dumps(place | row) + "\n")

    def stop_if_signalled(self):
        """After a signal: save, say how to go on, end the process."""
        if self.stopped_by:
            self.save()
            print(f"\nstopped by signal {self.stopped_by}; go on with the same command and "
                  "--resume", file=sys.stderr)
            sys.exit(130)  # as a shell counts a program that was interrupted

    def save(self):
        """Write all that the rest of the run depends on, as one file; then the pictures."""
        self.saved = time.perf_counter()
        if self.rank:
            return  # one process writes
        self.log_bytes = self.log_path.stat().st_size
        ckpt = {name: getattr(self, name) for name in PLACE}
        ckpt |= {name: part.state_dict() for name, part in self.parts().items()}
        ckpt |= {"format": FORMAT, "config": self.cfg}
        with data.replacing(self.ckpt_path) as temporary, open(temporary, "wb") as file:
            content = io.BytesIO()  # first in memory: of a full disk torch says less than we do
            torch.save(ckpt, content)  # plain tensors and values: weights_only=True reads it
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        self.picture()

    def parts(self):
        """All that has a state: {name: network or optimiser}."""
        parts = {"model": self.model, "average": self.average}
        if self.disc and self.stage == 1:
            parts["disc"] = self.disc
        return parts | {f"optimizer {i}": o for i, o in enumerate(self.optimizers[self.stage])}

    def restore(self, ckpt):
        """Stand where the run that wrote ckpt stood. UserError if its parts do not fit."""
        with fitting(self.ckpt_path):
            for name in PLACE:
                setattr(self, name, ckpt[name])
            self.start -= 60 * self.minutes
            if self.stage == 2 and self.seen[2] == 0:  # its networks may have other settings now
                self.model.vqgan.load_state_dict(part(ckpt["model"], "vqgan"))
                return
            for name, module in self.parts().items():
                module.load_state_dict(ckpt[name])

    def picture(self):
        """Write samples.png: input, through stage 1 and back, DDIM sample from its units alone."""
        images, model = self.ds.images(self.fit_idx[:10]), self.average
        noise = model.noise(len(images), torch.Generator().manual_seed(0))
        c_tilde = model.dyga.align(model.units(images))
        sample = model.sample(c_tilde, noise, self.cfg["ddim_steps"])
        rows = torch.stack([images, model.vqgan.reconstruct(images), sample])
        picture = data.image_grid(rows, ["input", "stage 1", "sample"], scale=2,
                                  title=f"{self.seen[2]:,} images seen in stage 2")
        with data.replacing(self.out / "samples.png") as temporary:
            picture.save(temporary)

# ---- Checkpoints ---------------------------------------------------------------------------------
def read_checkpoint(path):
    """A checkpoint of this code, read safely -> dict. UserError: foreign, damaged, or older."""
    with fitting(path):
        # torch.load ignores the file's checksums: a flipped bit would become a wrong weight.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # the first damaged part
                raise zipfile.BadZipFile("damaged")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from a file
        if ckpt["format"] != FORMAT:
            raise ValueError(f"format {ckpt['format']}, expected {FORMAT}: train it again")
    return ckpt

@contextlib.contextmanager
def fitting(path):
    """UserError for a file that is no checkpoint, or whose parts are not what we build."""
    try:
        yield
    except (FileNotFoundError, PermissionError, UserError):  # their own words name the file
        raise
    except Exception as error:  # foreign bytes fail in any way
        reason = str(error).partition("\n")[0]  # torch says much more
        raise UserError(f"{path}: cannot be read as a checkpoint, or is not as this train.py wrote "
                        f"it ({type(error).__name__}: {reason}); expected a whole ckpt.pt "
                        "(tests/released.py converts those of the paper's code)") from error

def load_checkpoint(path, device="cpu"):
    """Checkpoint file -> (averaged model in eval mode, the checkpoint)."""
    ckpt = read_checkpoint(path)
    with fitting(path):
        if ckpt["seen"] and not ckpt["seen"][2]:
            raise UserError(f"{path}: holds stage 1 only, expected both; finish it with --resume")
        model = Model(ckpt["config"])
        model.load_state_dict(ckpt["average"])
    return model.float().to(device).eval(), ckpt

# ---- Settings: default < preset < dataset < flag -------------------------------------------------
# One row a setting: name, default (*: see the signature of the class), least and most or choices,
# help. Defaults are the paper's where it states them (Tables 7 to 9, section C.1).
TABLE = """
dataset                'shapes3d' shapes3d|cars3d|mpi3d_toy|celeba|folder   see data.py
data_dir               'data'     text       folder of the datasets' files
source                 'auto'     auto|official|rendered    of shapes3d: its file or our twin of it
vary                   ''         text       hold all factors but these: names with commas between
preset                 ''         paper|laptop|minute  none: paper on CUDA, laptop on CPU
out                    ''         text       folder to write to; none: out/DATASET-PRESET
resume                 False      0..1       go on from ckpt.pt in --out
stage1_only            False      0..1       stop after stage 1
device                 'auto'     text       auto, cpu, cuda, cuda:1
seed                   0          0..4294967295             same seed, CPU, threads: same numbers
stage1.images          2_000_000  1..1e12    images that stage 1 sees (not in the paper)
stage1.batch           64         1..1e5     images per step of stage 1 (not in the paper)
stage1.lr              2e-4       0..1       learning rate of stage 1 (not in the paper)
stage1.loss            'l1'       l1|mse     of the reconstruction (mse: sharper edges)
stage1.disc_weight     0.75       0..100     of the discriminator; 0 leaves it out altogether
stage1.restart_images  100_000    1..1e12    images between two rescues of unused codes
images                 10_000_000 1..1e12    images that stage 2 sees (not in the paper)
pool_images            10_000_000 1..1e12    different ones among these, at random, at most
batch                  512        1..1e5     images per step of stage 2
lr                     1e-4       0..1       learning rate of stage 2
optimizer              'adamw'    adamw|muon                of both stages (not in the paper)
warmup                 0          0..1e12    images over which the learning rate rises from 0
decay                  0.0        0..1       last share of the course in which it falls to 0
clip                   0.0        0..1e6     largest gradient norm; 0 does not clip
loss                   'l1'       l1|mse     of eps^ - eps (equation 2 names none; released: l1)
t_sampling             'uniform'  uniform|logit_normal      how t is drawn in training
v_weight               0.0        0..2       0: error of eps; 1, with mse: grows into that of v
select_at              0.0,       0..1       silence redundant units at these shares; 0: never
select_least           0.06       0..1e6     least gain, beside what was known (informative_units)
unmix_at               0.0,       0..1       make kept scalars independent at these shares; 0: never
ema_half_life          3_550_000  1..1e12    images; of the averaged weights (0.9999 a step)
fit_every              1          1..1e6     r: epochs (passes over the pool) between two fits
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
extractor.unit_relu    *          0..1       end every unit's MLP in a ReLU
extractor.unit_line    *          0..1       beyond the paper: add a straight line to every unit
extractor.fsq_levels   *          2..1000    Table 11's rival of DyGA: 8 5 5, with --dyga.lam 0
dyga.k_init            *          1..1024    anchors a unit to start with
dyga.k_max             *          1..1024    anchors a unit at most
dyga.max_iter          *          1..1e4     EM iterations at most
dyga.lam               *          0..1       lambda of equation 6; 0 switches alignment off
dyga.accept            *          always|bic which splits are kept; bic: those that improve the BIC
dyga.spread            *          0..1e6     a wider cluster is split, in scales of its unit
dyga.split_odds        *          0..1       chance of other clusters to be split (accept always)
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
PARTS = {"vqgan": VQGAN, "extractor": Extractor, "dyga": DyGA, "unet": UNet}
HERE = ("data_dir", "out", "resume", "stage1_only", "device")  # may differ when a run is resumed

def build_parser():
    """Every setting as a flag with its help; the defaults are the paper's."""
    p = data.Parser(description="Defaults are the paper's, or ours; a preset changes some.")
    for row in TABLE.strip().splitlines():
        name, default, limits, text = row.split(maxsplit=3)
        if default == "*":
            network, argument = name.split(".")
            default = inspect.signature(PARTS[network]).parameters[argument].default
        else:
            default = ast.literal_eval(default)
        kind = {}
        if isinstance(default, bool):  # --unet.self_attention and --no-unet.self_attention
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):  # --unet.multipliers 1 2 4 4
            default = list(default)
            kind = {"type": within(type(sum(default)), limits), "nargs": "+"}
        elif ".." in limits:
            kind = {"type": within(type(default), limits)}
        elif "|" in limits:
            kind = {"choices": limits.split("|")}
        p.add_argument(f"--{name}", default=default, **kind, help=f"{text}; {limits}")
    return p

def within(kind, limits):
    """What argparse calls to read a number of this kind within limits such as "0..1"."""
    least, most = map(float, limits.split(".."))
    def number(text):
        value = kind(text)
        if not least <= value <= most:  # nan is in no range
            raise argparse.ArgumentTypeError(f"{text}: expected {limits}")
        return value
    return number

def parse():
    """The command line -> settings (a plain dict), device, checkpoint to resume or None."""
    parser = build_parser()
    args = parser.parse_args()
    device = pick_device(args.device)
    preset = args.preset or ("paper" if device.type == "cuda" else "laptop")
    out = Path(args.out or f"out/{args.dataset}-{preset}")
    if not args.resume:
        if (out / "ckpt.pt").exists():
            raise UserError(f"{out} holds a run already; add --resume, or choose another --out")
        flags = PRESETS[preset] + (PER_DATASET.get(args.dataset, "") if preset == "paper" else "")
        cfg = vars(parser.parse_args(shlex.split(flags, comments=True) + sys.argv[1:]))
        return cfg | {"preset": preset, "out": str(out)}, device, None
    ckpt = read_checkpoint(out / "ckpt.pt")
    begun = {name: held for name, held in ckpt["config"].items() if name not in HERE}
    parser.set_defaults(**begun)  # flags that are left out keep the run's values
    cfg = vars(parser.parse_args()) | {"out": str(out)}
    # Before its first step stage 2 may get other settings: copy a finished stage 1's folder and
    # resume each copy with its own. Then they are fixed: the learning rate follows the length.
    stage2_untouched = ckpt["stage"] == 2 and ckpt["seen"][2] == 0
    for name, held in begun.items():
        stage1 = name in ("dataset", "source", "vary", "preset")
        stage1 |= name.startswith(("vqgan.", "stage1."))
        if cfg[name] != held and (stage1 or not stage2_untouched):
            raise UserError(f"--{name} {cfg[name]}: the run began with {held}; leave it out")
    return cfg, device, ckpt

def check_settings(cfg, world):
    """UserError for numbers that do not fit each other."""
    levels = len(cfg["vqgan.multipliers"]) + len(cfg["unet.multipliers"])
    shrunk = cfg["extractor.shrink"] * 2 ** (len(cfg["extractor.channels"]) - 1)
    unit = math.lcm(2, cfg["unet.groups"], cfg["unet.heads"])
    for what, found, factor in [
        ("--unet.base, by 2, --unet.groups and --unet.heads", cfg["unet.base"], unit),
        ("--batch, by the number of processes", cfg["batch"], world),
        ("pixels, by --vqgan.patch and the halvings of --vqgan.multipliers and --unet.multipliers",
         64, cfg["vqgan.patch"] * 2 ** (levels - 2)),
        ("pixels, by --extractor.shrink and the halvings of --extractor.channels", 64, shrunk),
    ]:
        if found % factor:
            raise UserError(f"{what}: found {found}, expected a multiple of {factor}")

# ---- The machine ---------------------------------------------------------------------------------
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
        raise UserError(f"--device {text}: cannot be used here ({error}); try cpu") from error

def in_bfloat16(device):
    """Does stage 2 compute in bfloat16? Not on CPUs, nor on older GPUs, which emulate it slowly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

def lock(path):
    """Hold the log open and locked: a second run in its folder is refused. UserError."""
    file = open(path, "a")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that dies lets go of it
    except ImportError:
        pass  # Windows has no fcntl: no lock there
    except OSError:
        raise UserError(f"{path.parent}: another run writes there; choose another --out") from None
    return file

def main():
    """Parse, say what was chosen, run both stages, write everything."""
    # Momenta that decay below 1e-38 count as 0: many CPUs are a hundred times slower with them.
    torch.set_flush_denormal(True)
    cfg, device, ckpt = parse()
    world = 1
    if dist.is_torchelastic_launched():
        # A process that dies ends the run: torchrun stops the others, or they give up waiting.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        world = dist.get_world_size()
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    check_settings(cfg, world)
    run = Run(cfg, device, world)
    if ckpt:
        run.restore(ckpt)
    if run.rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        log = lock(run.log_path)
        for half in run.out.glob(".[0-9]*-*"):  # what a killed run was writing
            half.unlink()
        # Rows logged after the checkpoint will be made again: cut them off, half a row too.
        log.truncate(min(run.log_bytes, run.log_path.stat().st_size))
    print(f"images: {run.ds.source_note}\npreset {cfg['preset']}; device {device}, stage 2 in "
          f"{'bfloat16' if run.bfloat16 else 'float32'}; writes to {run.out}")

    def stop(signum, frame):  # finish a few steps, save, leave; a second signal ends at once
        run.stopped_by = signum
        signal.signal(signum, signal.SIG_DFL)
    if world == 1:  # several processes just end, and go on from their last checkpoint
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    if run.stage == 1:
        train_stage1(run)
    if not cfg["stage1_only"] and not run.finished:
        try:
            train_stage2(run)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch {cfg['batch']}: a step of stage 2 does not fit into the "
                            f"memory of {device}; halve it (with --resume if none was done)"
                            ) from error
    run.save()
    if world > 1:
        dist.destroy_process_group()
    print(f"done in {run.minutes:.1f} minutes; wrote {run.ckpt_path}, samples.png, log.jsonl")

if __name__ == "__main__":
    data.run(main)
