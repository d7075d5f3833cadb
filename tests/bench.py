"""The benchmark: one command, one table. What speed costs and buys is recorded here.

    OMP_NUM_THREADS=1 python tests/bench.py              # all rows
    OMP_NUM_THREADS=1 python tests/bench.py dyga --runs 1    # some of them, quick and rough
    OLD=/path/to/a/checkout python tests/bench.py step dyga    # beside the code of commit 97270dc

A row has a median time, and its ratio to the first row of its block. The rows of a block take turns
in one process, so that a busy moment of the machine meets all: trust the ratios, not the times.
"""

import argparse
import copy
import importlib
import os
import shlex
import sys
import timeit
from pathlib import Path

import numpy as np
import torch

ROOT, OLD = Path(__file__).resolve().parent.parent, os.environ.get("OLD")
if OLD:
    sys.path.insert(0, OLD)
    older_dyga, older_unet, older_train = map(importlib.import_module, ("dyga", "unet", "train"))
    for name in ("data", "dyga", "extractor", "train", "unet", "vqgan"):
        del sys.modules[name]  # so that ours of this name can be imported too
sys.path.insert(0, str(ROOT))
import data, dyga, train, unet  # noqa: E401, E402


def compare(runs, functions, images=0, warm_up=1):
    """Call {name: function} in turn, print a row each. images: in one call (of each)."""
    times = np.array([[timeit.timeit(function, number=1) for function in functions.values()]
                      for _ in range(warm_up + runs)])[warm_up:]  # (runs, functions)
    medians, ratios = np.median(times, axis=0), np.median(times / times[:, :1], axis=0)
    for name, median, ratio, rate in zip(functions, medians, ratios, images / medians):
        speed = f"{rate:10,.1f} images/s" if rate else ""
        print(f"{name:45} {1e3 * median:10,.1f} ms {ratio:8.3f} {speed}", flush=True)


def settings(preset):
    return vars(train.build_parser().parse_args(shlex.split(train.PRESETS[preset], comments=True)))


def layers(model):
    return [*model.extractor.parameters(), *model.unet.parameters()]


def optimizers(model):
    return train.make_optimizers(model.cfg, [model.extractor, model.unet], [], (0.9, 0.999), 0.01)


def stepper(model, batch, opts, half=False, ema_update=unet.ema_update):
    """A function that does one step of train_stage2's loop."""
    clip, device, average = model.cfg["clip"], model.alpha_bar.device, copy.deepcopy(model)
    ds = data.load("shapes3d", source="rendered", device=device)
    z0 = model.noise(batch, torch.Generator())  # (B, Z, h, w), in place of latents
    model.train()

    def step():
        x0 = ds.images(torch.randint(len(ds), (batch,), device=device))  # (B, 3, 64, 64)
        model.vqgan.encode(x0[:batch // 5])  # an image comes five times, and is encoded once
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(x0, z0)[0]
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers(model), clip or torch.inf)
        train.step(opts, 1e-4)
        for part in ("extractor", "unet"):
            ema_update(getattr(average, part), getattr(model, part), 20_000, batch, 100_000)

    return step


def bench_step(runs):
    """The laptop step: its parts, its growth, the OLD one; and sampling."""
    model, ds = train.Model(settings("laptop")), data.load("shapes3d", source="rendered")
    opts, x0 = optimizers(model), ds.images(torch.arange(64))
    z0 = model.noise(64, torch.Generator())
    compare(runs, {
        "laptop step, batch 64": stepper(model, 64, opts),
        "  encoder, 12 images": lambda: model.vqgan.encode(x0[:12]),
        "  images": lambda: ds.images(torch.arange(64)),
        "  forward": lambda: model(x0, z0),
        "  forward and backward": lambda: model(x0, z0)[0].backward(),
        "  optimiser, Muon and AdamW": lambda: train.step(opts, 1e-4),
    }, [64] + 5 * [0])
    sizes = [16, 64, 256]
    compare(runs, {f"laptop step, batch {n}": stepper(model, n, opts) for n in sizes}, sizes)
    c_tilde, noise = torch.randn(16, 20, 32), model.noise(16, torch.Generator())
    compare(runs, {"DDIM, 16 images, 100 steps": lambda: model.sample(c_tilde, noise, 100)}, 16)
    if OLD:
        cfg = {name: default for name, (default, _) in older_train.all_settings().items()}
        old = older_train.Model(cfg | older_train.PRESETS["laptop"])
        muon = older_unet.Muon(layers(old), 1e-4, weight_decay=0.01, fused=True)
        at = {"unet.attention_at": old.cfg["unet.attention_at"]}
        same = train.Model(settings("laptop") | at)
        compare(runs, {
            "older step": stepper(old, 64, [muon], ema_update=older_unet.ema_update),
            "  today's": stepper(model, 64, opts),
            "  today's, attention_at as older": stepper(same, 64, optimizers(same))}, 64)


def bench_dyga(runs):
    """Fits and their growth, an alignment."""
    units, _ = dyga.toy_units([10] * 20, 20_000, torch.Generator().manual_seed(0))  # (n, N, D)
    counts = (5_000, 20), (1_250, 20), (20_000, 20), (5_000, 5)
    fits = {f"fit of {N} units x {n:,} samples":
            lambda n=n, N=N: dyga.DyGA(N).fit(units[:n, :N]) for n, N in counts}
    if OLD:
        fits["older fit of 20 units x 5,000 samples"] = (
            lambda: older_dyga.DyGA(20, 32).fit(units[:5_000]))
    compare(min(runs, 3), fits, warm_up=0)
    model = dyga.DyGA(20).fit(units[:1_250])
    compare(4 * runs, {"align a batch of 64": lambda: model.align(units[:64])})


def bench_gpu(runs):
    """The paper-size step in bfloat16 on a GPU, and its memory: 12 GiB were estimated."""
    if not torch.cuda.is_available():
        print("paper step in bfloat16, batch 512, and its memory: no GPU here")
        return
    model = train.Model(settings("paper")).cuda()
    step = stepper(model, 512, optimizers(model), half=True)
    compare(runs, {"paper step in bfloat16": lambda: (step(), torch.cuda.synchronize())}, 512)
    print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main():
    torch.set_flush_denormal(True)  # as train.py
    groups = {name[6:]: bench for name, bench in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", choices=[*groups, "all"], default="all")
    parser.add_argument("--runs", type=int, default=5, help="whose median is shown [5]")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.runs} runs")
    for name in groups if "all" in args.rows else args.rows:
        groups[name](args.runs)


if __name__ == "__main__":
    main()
