"""The benchmark: one command, one table. What speed costs and buys is recorded here.

    OMP_NUM_THREADS=1 python tests/bench.py              # all rows
    OMP_NUM_THREADS=1 python tests/bench.py dyga data    # some of them; --runs 1: quick and rough
    OLD=/path/to/older/checkout python tests/bench.py step dyga    # beside the code at 97270dc

A row has a median time, and its ratio to the first row of its block. The rows of a block take turns
in one process, so that a busy moment of the machine meets all: trust the ratios, not the times.
"""

import argparse
import copy
import importlib
import os
import subprocess
import sys
import tempfile
import timeit
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

if "OLD" in os.environ:
    sys.path.insert(0, os.environ["OLD"])
    older_dyga, older_unet, older_train = map(importlib.import_module, ("dyga", "unet", "train"))
    for name in ("data", "dyga", "extractor", "train", "unet", "vqgan"):
        del sys.modules[name]  # so that ours of this name can be imported too
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data, dyga, evaluate, train, unet  # noqa: E401, E402


def compare(runs, functions, images=0, warm_up=1):
    """Call {name: function} in turn, print a row each. images: in one call (of each)."""
    times = np.array([[timeit.timeit(function, number=1) for function in functions.values()]
                      for _ in range(warm_up + runs)])[warm_up:]  # (runs, functions)
    medians, ratios = np.median(times, axis=0), np.median(times / times[:, :1], axis=0)
    for name, median, ratio, rate in zip(functions, medians, ratios, images / medians):
        speed = f"{rate:10,.1f} images/s" if rate else ""
        print(f"{name:45} {1e3 * median:10,.1f} ms {ratio:8.3f} {speed}", flush=True)


def bench_data(runs):
    """Images drawn, and read from a mapped file. Targets: 15,000 and 20,000 a second, 300 MB."""
    compare(1, {"all 480 geometries": data.weight_maps}, warm_up=0)
    with tempfile.TemporaryDirectory() as folder:
        # As large as the converted official file, but a hole: 6 GB that take no room on the disk.
        path, shape = f"{folder}/shapes3d-64x64.npy", (480_000, 64, 64, 3)
        np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        drawn = data.load("shapes3d", source="rendered")
        read = data.load("shapes3d", folder, "official")
        read.images(torch.arange(5_000))  # so much of the file then lies in memory
        compare(4 * runs, {"images, drawn": lambda: drawn.images(torch.randint(5_000, (64,))),
                           "images, read": lambda: read.images(torch.randint(5_000, (64,)))}, 64)
        code = ("import sys, torch, data; ds = data.load('shapes3d', *sys.argv[1:])\n"
                "for _ in range(50): ds.images(torch.randint(5_000, (512,)))\n"
                "print(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])")
        for source in ("rendered", "official") if sys.platform == "linux" else ():
            kB = subprocess.check_output([sys.executable, "-c", code, folder, source], cwd=ROOT)
            print(f"memory but for pages of files, {source} images: {int(kB) / 1024:.0f} MB")


def new_model(preset, **changes):
    cfg = train.default_settings() | train.PRESETS[preset] | changes
    return train.Model(cfg | {"seed": 0, "minutes": None})


def layers(model):
    return [*model.extractor.parameters(), *model.unet.parameters()]


def stepper(model, batch, encode, opts=None, half=False, ema_update=unet.ema_update):
    """A function that does one step of train_stage2's loop. encode: of how many images."""
    cfg, device = model.cfg, model.alpha_bar.device
    opts = opts or train.make_optimizers(cfg, layers(model), [], (0.9, 0.999), 0.01)
    average = copy.deepcopy(model).requires_grad_(False)
    ds = data.load("shapes3d", source="rendered", device=device)
    z0 = model.noise(batch, torch.Generator())  # (B, Z, h, w), in place of latents
    model.train()

    def step():
        x0 = ds.images(torch.randint(len(ds), (batch,), device=device))  # (B, 3, 64, 64)
        if encode:
            model.vqgan.encode(x0[:encode])
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss, _ = model(x0, z0)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers(model), cfg["clip"] or torch.inf)
        train.step(opts, 1e-4)
        for part in ("extractor", "unet"):
            ema_update(getattr(average, part), getattr(model, part), 20_000, batch, 100_000)
    return step


def gram_form(x, steps=5):
    """The peer of unet.orthogonalise: rounds on XX' alone; X is multiplied once, at the end."""
    if x.shape[1] > x.shape[2]:
        return gram_form(x.mT, steps).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for step in range(steps):
        gram = p @ gram @ p if step else x @ x.mT  # (B, m, m)
        p = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        p.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = p @ product if step else p
    return product @ x


def bench_step(runs):
    """The laptop step: its parts, peers of two of them, its growth, the OLD one."""
    model, ds = new_model("laptop"), data.load("shapes3d", source="rendered")
    opts = train.make_optimizers(model.cfg, layers(model), [], (0.9, 0.999), 0.01)
    step = stepper(model, 64, 13, opts)  # a fifth is encoded: images come five times
    x0, z0 = ds.images(torch.arange(64)), model.noise(64, torch.Generator())
    matrices = [p.detach() if p.ndim == 3 else p.detach().flatten(1)[None]  # (B, m, n)
                for p in opts[1].param_groups[0]["params"]]
    both, value, gate = torch.nn.Linear(64, 512), torch.nn.Linear(64, 256), torch.nn.Linear(64, 256)
    tokens = torch.randn(64, 16, 64, requires_grad=True)  # of one of four Transformers

    def geglu(value, gate):
        (value * torch.nn.functional.gelu(gate)).sum().backward()

    compare(runs, {
        "laptop step, batch 64": step,
        "  encoder, 13 images": lambda: model.vqgan.encode(x0[:13]),
        "  images": lambda: ds.images(torch.arange(64)),
        "  forward": lambda: model(x0, z0),
        "  forward and backward": lambda: model(x0, z0)[0].backward(),
        "  optimiser, Muon and AdamW": lambda: train.step(opts, 1e-4),
        "    Newton-Schulz, textbook": lambda: [unet.orthogonalise(x) for x in matrices],
        "    in Gram form": lambda: [gram_form(x) for x in matrices],
        "  1 of 4 GEGLUs, chunk": lambda: geglu(*both(tokens).chunk(2, dim=-1)),
        "    two products": lambda: geglu(value(tokens), gate(tokens)),
    }, [64] + 9 * [0])
    compare(runs, {f"laptop step, batch {n}": stepper(model, n, n // 5) for n in (16, 64, 256)})
    if "OLD" in os.environ:
        cfg = {name: default for name, (default, _) in older_train.all_settings().items()}
        old = older_train.Model(cfg | older_train.PRESETS["laptop"])
        muon = older_unet.Muon(layers(old), 1e-4, weight_decay=0.01, fused=True)
        same = new_model("laptop", **{"unet.attention_at": old.cfg["unet.attention_at"]})
        compare(runs, {"older step": stepper(old, 64, 0, [muon], False, older_unet.ema_update),
                       "  today's": stepper(model, 64, 0),
                       "  today's, attention_at as older": stepper(same, 64, 0)}, 64)


class UnitList(torch.nn.ModuleList):
    """The peer of extractor.UnitLinear: a list of torch.nn.Linear, called one after the other."""

    def forward(self, x):
        return torch.stack([layer(h) for layer, h in zip(self, x)])  # (N, B, d_out)


def bench_plain(runs):
    """The step against its plainest form, which encodes each batch anew. AdamW in both."""
    swap = mock.patch("torch.nn.functional.scaled_dot_product_attention",
                      lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    for preset, batch, encode in (("laptop", 64, 13), ("paper", 8, 0)):
        ours, peer = (new_model(preset, optimizer="adamw") for _ in range(2))
        for i, layer in enumerate(peer.extractor.unit_mlp):
            peer.extractor.unit_mlp[i] = UnitList(torch.nn.Linear(*w.shape) for w in layer.weight)
        plain = swap(stepper(peer, batch, batch, [torch.optim.AdamW(layers(peer))]))
        compare(runs, {f"plainest {preset} step, batch {batch}": plain,
                       "  ours": stepper(ours, batch, encode)}, batch)


def bench_dyga(runs):
    """Fits and their growth, an alignment, EM beside scikit-learn's."""
    units, _ = dyga.toy_units([10] * 20, 20_000, torch.Generator().manual_seed(0))  # (n, N, D)

    def fit(n, N, module=dyga):
        return lambda: module.DyGA(N, 32).fit(units[:n, :N])

    counts = (5_000, 20), (1_250, 20), (20_000, 20), (5_000, 5), (5_000, 10)
    fits = {f"fit of {N} units x {n:,} samples": fit(n, N) for n, N in counts}
    if "OLD" in os.environ:
        fits["older fit of 20 units x 5,000 samples"] = fit(5_000, 20, older_dyga)
    compare(min(runs, 3), fits, warm_up=0)
    model = dyga.DyGA(20).fit(units[:1_250])
    compare(4 * runs, {"align a batch of 64": lambda: model.align(units[:64])})
    x = (units[:, 0] - units[:, 0].mean(0)) / units[:, 0].std()  # (n, D)
    for K in (12, 32):
        start = dyga.m_step(x, dyga.plus_plus(x, K, torch.Generator()), 1, 8)
        peer = GaussianMixture(K, max_iter=5, tol=0, reg_covar=1e-3, warm_start=True)
        compare(runs, {f"5 EM iterations of a unit, {K}": lambda: dyga.em(x, start, 5, -1.0, 8),
                       "  scikit-learn's": lambda: peer.fit(x.numpy())})


def bench_metrics(runs):
    """The metrics at full counts, of ten noisy units on all images of Shapes3D."""
    sizes, rng = [10, 10, 10, 8, 4, 15], np.random.default_rng(0)
    factors = np.stack(np.unravel_index(np.arange(480_000), sizes), 1)  # (480000, 6)
    codes = factors[:, [0, 1, 2, 3, 4, 5, 0, 1, 2, 5]] + 0.3 * rng.normal(size=(480_000, 10))
    for name in ("factor_vae", "mig", "modularity", "sap", "infomec", "dci"):
        metric = getattr(evaluate, name)
        compare(1, {name: lambda: metric(lambda idx: codes[idx], sizes)}, warm_up=0)


def bench_run(runs):
    """DDIM, a checkpoint, the start of train.py."""
    model = new_model("laptop").eval()
    c_tilde, noise = torch.randn(16, 20, 32), model.noise(16, torch.Generator())
    compare(runs, {"DDIM, 16 images, 100 steps": lambda: model.sample(c_tilde, noise, 100)}, 16)
    flags = ["--dataset=shapes3d", "--source=rendered", "--preset=laptop"]
    with tempfile.TemporaryDirectory() as folder:
        args = train.build_parser().parse_args(flags)
        args.device = torch.device("cpu")
        run = train.Run(args, Path(folder), model.cfg, 1)
        run.start_stage2()
        stepper(run.model, 64, 13, run.optimizers)()  # now the optimisers have something to save
        run.log_path.touch()
        run.picture = lambda: None
        compare(runs, {"checkpoint, saved": run.save,
                       "checkpoint, loaded": lambda: train.load_checkpoint(run.ckpt_path)})
        code = "import os, train; train.Run.after_step = lambda *_: os._exit(0); train.main()"
        start = [sys.executable, "-c", code, *flags, f"--out={folder}/run"]
        compare(runs, {
            "import train": lambda: subprocess.check_output([*start[:2], "import train"], cwd=ROOT),
            "from the command to the first step": lambda: subprocess.check_output(
                start, cwd=ROOT, stderr=subprocess.STDOUT)})


def bench_gpu(runs):
    """The paper-size step in bfloat16 on a GPU, and its memory: 12 GiB were estimated."""
    if not torch.cuda.is_available():
        print("paper step in bfloat16, batch 512, and its memory: no GPU here")
        return
    step = stepper(new_model("paper").cuda(), 512, 0, half=True)
    compare(runs, {"paper step in bfloat16": lambda: (step(), torch.cuda.synchronize())}, 512)
    print(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main():
    torch.set_flush_denormal(True)  # as train.py
    warnings.simplefilter("ignore")  # scikit-learn's: five iterations do not converge
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
