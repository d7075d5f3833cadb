"""The benchmark: one command, one table.

    OMP_NUM_THREADS=1 python tests/bench.py            # all rows, about three minutes
    OMP_NUM_THREADS=1 python tests/bench.py dyga data  # some of them

Every number is the median of several runs after a warm-up, in this process, on the threads that torch was given. On a
shared machine trust the ratios (measured in one run), not the seconds.
"""

import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import dyga  # noqa: E402
import train  # noqa: E402


def median_seconds(f, runs=5, warmup=1):
    """Median wall time of f() over `runs` calls, after `warmup` calls that do not count."""
    times = []
    for i in range(warmup + runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def bench_data():
    """Rendering: images per second in batches of 64 and 512, and the time to draw all 480 geometries."""
    start = time.perf_counter()
    ds = data.load("shapes3d", source="rendered")
    yield "all 480 geometries", f"{time.perf_counter() - start:.1f} s", ""
    for batch in (64, 512):
        idx = torch.randint(len(ds), (batch,))
        yield f"render, batch {batch}", f"{batch / median_seconds(lambda: ds.images(idx)):,.0f} images/s", ""


def laptop(**changes):
    args = train.build_parser().parse_args(["--dataset", "shapes3d", "--preset", "laptop"])
    args.device = torch.device("cpu")
    return train.Model(train.settings(args) | changes)


def bench_step():
    """One training step of the laptop preset, and its parts."""
    ds, model = data.load("shapes3d", source="rendered"), laptop()
    batch = model.cfg["batch"]
    opt = torch.optim.AdamW([*model.extractor.parameters(), *model.unet.parameters()], lr=1e-4, fused=True)
    idx = torch.randint(len(ds), (batch,))
    images = ds.images(idx)
    z0 = model.vqgan.encode(images)

    def step():
        loss, _ = model.loss(ds.images(idx), model.vqgan.encode(images))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()

    whole = median_seconds(step)
    yield f"step, batch {batch}", f"{batch / whole:.0f} images/s", ""
    for name, f in (("data", lambda: ds.images(idx)), ("stage-1 encoder", lambda: model.vqgan.encode(images)),
                    ("forward", lambda: model.loss(images, z0)), ("optimiser", opt.step)):
        yield f"  {name}", f"{median_seconds(f) * 1e3:.1f} ms", f"{median_seconds(f) / whole:.0%} of the step"


def bench_sampling():
    """DDIM sampling, 100 steps, and saving and loading a checkpoint."""
    model = laptop().eval()
    c, noise = torch.randn(16, model.cfg["extractor.n_units"], 32), model.noise(16, torch.Generator().manual_seed(0))
    yield "DDIM, 100 steps", f"{16 / median_seconds(lambda: model.sample(c, noise, 100), 3):.1f} images/s", ""
    with tempfile.TemporaryDirectory() as folder:
        args = Namespace(out=folder, device=torch.device("cpu"), dataset="shapes3d", data_dir="data", source="rendered",
                         stage1_from=None)
        run = train.Run(args, model.cfg)
        run.log_path.touch()
        run.pictures = lambda: None
        yield "save a checkpoint", f"{median_seconds(run.save) * 1e3:.0f} ms", ""
        yield "load a checkpoint", f"{median_seconds(lambda: train.read_checkpoint(run.ckpt_path)) * 1e3:.0f} ms", ""


def bench_dyga():
    """A whole fit, aligning a batch, and one EM iteration against scikit-learn's GaussianMixture on the same units."""
    from sklearn.mixture import GaussianMixture

    torch.manual_seed(0)
    N, n, D = 20, 20_000, 32
    net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.ReLU(), torch.nn.Linear(64, D))
    levels = torch.randint(10, (n, N, 1)).float() / 5 + 0.02 * torch.randn(n, N, 1)
    units = net(levels).detach()  # (n, N, D)
    for count in (n // 16, n // 4, n):
        model = dyga.DyGA(N, D)
        seconds = median_seconds(lambda: model.fit(units[:count]), 1, 0)
        yield f"fit, {N} units x {count:,} samples", f"{seconds:.1f} s", ""
    iterations = sum(len(h) for h in model.report["log_likelihood"].values())
    K = int(model.mask.sum(1).float().mean())
    theirs = GaussianMixture(K, covariance_type="full", max_iter=2, tol=0, init_params="random_from_data", reg_covar=1e-4)
    start = time.perf_counter()
    theirs.fit(units[:, 0].numpy())
    per_iteration = (time.perf_counter() - start) / theirs.n_iter_ * N
    yield f"  per EM iteration, {K} components", f"{seconds / iterations:.2f} s", (
        f"{per_iteration / (seconds / iterations):.0f} times faster than scikit-learn ({per_iteration:.1f} s)")
    c = units[:64]
    yield "align, batch 64", f"{median_seconds(lambda: model.align(c), 20) * 1e3:.1f} ms", ""


def main():
    """Run the chosen row groups and print the table."""
    torch.manual_seed(0)
    groups = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or groups:
        for row, value, note in groups[name]():
            print(f"{row:40} {value:>18}   {note}", flush=True)


if __name__ == "__main__":
    main()
