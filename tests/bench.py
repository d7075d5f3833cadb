"""The benchmark: a table of median times, and of their ratios to the first row of each block.

    OMP_NUM_THREADS=1 python tests/bench.py              # quick and rough: --runs 1

The rows of a block take turns, so that a busy moment of the machine meets all: trust the ratios.
"""
import argparse
import shlex
import sys
import timeit
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dyga  # noqa: E402
import train  # noqa: E402

def compare(runs, functions):
    """Call {name: function} in turn, `runs` times after a warm-up; print a row each."""
    times = np.array([[timeit.timeit(function, number=1) for function in functions.values()]
                      for _ in range(1 + runs)])[1:]  # (runs, functions)
    for name, time, ratio in zip(functions, times.T, (times / times[:, :1]).T):
        print(f"{name:35} {1e3 * np.median(time):10,.1f} ms {np.median(ratio):8.3f}", flush=True)

def build(preset, batch, device="cpu"):
    """A run of ten steps of stage 2, in which every image comes five times; without fits."""
    flags = (f"{train.PRESETS[preset]} --batch {batch} --images {10 * batch} --select_at 0 "
             f"--pool_images {2 * batch} --source rendered --dyga.lam 0")
    cfg = vars(train.build_parser().parse_args(shlex.split(flags, comments=True)))
    run = train.Run(cfg, torch.device(device), 1)
    run.stage, run.rank = 2, 1  # not 0, so it writes nothing
    return run

def ten_steps(run):
    run.seen[2] = 0
    train.train_stage2(run)

def main():
    torch.set_flush_denormal(True)  # as train.py
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5, help="whose median is shown [5]")
    runs = parser.parse_args().runs
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {runs} runs")

    small, run, large = (build("laptop", batch) for batch in (16, 64, 256))
    model, x0 = run.model, run.ds.images(torch.arange(64))
    z0, c_tilde = model.noise(64, torch.Generator()), torch.randn(16, 20, 32)
    compare(runs, {
        "ten laptop steps, batch 64": lambda: ten_steps(run),
        "  one: encoder, 13 images": lambda: model.vqgan.encode(x0[:13]),
        "  one: images": lambda: run.ds.images(torch.arange(64)),
        "  one: forward": lambda: model(x0, z0),
        "  one: forward and backward": lambda: model(x0, z0)[0].backward(),  # then optimisers, EMA
        "ten laptop steps, batch 16": lambda: ten_steps(small),
        "ten laptop steps, batch 256": lambda: ten_steps(large),
        "DDIM, 16 images, 100 steps": lambda: model.sample(c_tilde, z0[:16], 100)})

    units, _ = dyga.toy_units([10] * 20, 20_000, torch.Generator().manual_seed(0))  # (n, N, D)
    fitted = dyga.DyGA(20).fit(units[:1_250])
    compare(min(runs, 3), {
        f"fit of {N} units x {n:,} samples": lambda n=n, N=N: dyga.DyGA(N).fit(units[:n, :N])
        for n, N in [(5_000, 20), (1_250, 20), (20_000, 20), (5_000, 5)]})
    compare(4 * runs, {"align a batch of 64": lambda: fitted.align(units[:64])})

    if torch.cuda.is_available():  # in bfloat16; 12 GiB were estimated
        paper = build("paper", 512, "cuda")
        compare(runs, {"ten paper steps, batch 512": lambda: ten_steps(paper)})
        print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

if __name__ == "__main__":
    main()
