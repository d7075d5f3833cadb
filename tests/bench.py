"""The benchmark: one command, one table.

    OMP_NUM_THREADS=1 python tests/bench.py              # quick and rough: --runs 1

A row has a median time, and its ratio to the first row of its block. The rows of a block take turns
in one process, so that a busy moment of the machine meets all: trust the ratios, not the times.
"""

import argparse
import copy
import shlex
import sys
import timeit
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data, dyga, train, unet  # noqa: E401, E402


def compare(runs, functions, images=0, warm_up=1):
    """Call {name: function} in turn, print a row each. images: in one call (of each)."""
    times = np.array([[timeit.timeit(function, number=1) for function in functions.values()]
                      for _ in range(warm_up + runs)])[warm_up:]  # (runs, functions)
    medians, ratios = np.median(times, axis=0), np.median(times / times[:, :1], axis=0)
    for name, median, ratio, rate in zip(functions, medians, ratios, images / medians):
        speed = f"{rate:10,.1f} images/s" if rate else ""
        print(f"{name:45} {1e3 * median:10,.1f} ms {ratio:8.3f} {speed}", flush=True)


def build(preset):
    flags = shlex.split(train.PRESETS[preset], comments=True)
    return train.Model(vars(train.build_parser().parse_args(flags)))


def stepper(model, batch, half=False):
    """A function that does one step of train_stage2's loop."""
    device, average = model.alpha_bar.device, copy.deepcopy(model)
    ds = data.load("shapes3d", source="rendered", device=device)
    z0 = model.noise(batch, torch.Generator())  # (B, Z, h, w), in place of latents
    networks = [model.train().extractor, model.unet]
    opts = train.make_optimizers(model.cfg, networks, [], (0.9, 0.999), 0.01)
    layers = [p for network in networks for p in network.parameters()]

    def step():
        x0 = ds.images(torch.randint(len(ds), (batch,), device=device))  # (B, 3, 64, 64)
        model.vqgan.encode(x0[:batch // 5])  # an image comes five times, and is encoded once
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(x0, z0)[0]
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers, model.cfg["clip"] or torch.inf)
        train.step(opts, 1e-4)
        for network, mean in zip(networks, (average.extractor, average.unet)):
            unet.ema_update(mean, network, 20_000, batch, 100_000)

    return step


def main():
    torch.set_flush_denormal(True)  # as train.py
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5, help="whose median is shown [5]")
    runs = parser.parse_args().runs
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {runs} runs")

    # The laptop step, its parts and its growth; sampling.
    model, ds = build("laptop"), data.load("shapes3d", source="rendered")
    x0, c_tilde = ds.images(torch.arange(64)), torch.randn(16, 20, 32)
    z0 = model.noise(64, torch.Generator())
    compare(runs, {
        "laptop step, batch 64": stepper(model, 64),
        "  encoder, 12 images": lambda: model.vqgan.encode(x0[:12]),
        "  images": lambda: ds.images(torch.arange(64)),
        "  forward": lambda: model(x0, z0),
        "  forward and backward": lambda: model(x0, z0)[0].backward(),  # the rest: optimisers, EMA
        "laptop step, batch 16": stepper(model, 16),
        "laptop step, batch 256": stepper(model, 256),
        "DDIM, 16 images, 100 steps": lambda: model.sample(c_tilde, z0[:16], 100),
    }, [64, 0, 0, 0, 0, 16, 256, 16])

    # Fits and their growth, an alignment.
    units, _ = dyga.toy_units([10] * 20, 20_000, torch.Generator().manual_seed(0))  # (n, N, D)
    compare(min(runs, 3), {
        f"fit of {N} units x {n:,} samples": lambda n=n, N=N: dyga.DyGA(N).fit(units[:n, :N])
        for n, N in [(5_000, 20), (1_250, 20), (20_000, 20), (5_000, 5)]}, warm_up=0)
    fitted = dyga.DyGA(20).fit(units[:1_250])
    compare(4 * runs, {"align a batch of 64": lambda: fitted.align(units[:64])})

    # The paper-size step in bfloat16, and its memory: 12 GiB were estimated.
    if torch.cuda.is_available():
        step = stepper(build("paper").cuda(), 512, half=True)
        compare(runs, {"paper step in bfloat16": lambda: (step(), torch.cuda.synchronize())}, 512)
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    else:
        print("paper step in bfloat16, batch 512, and its memory: no GPU here")


if __name__ == "__main__":
    main()
