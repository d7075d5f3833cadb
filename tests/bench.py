"""The benchmark: one command, one table.

    OMP_NUM_THREADS=1 python tests/bench.py            # all rows, about five minutes
    OMP_NUM_THREADS=1 python tests/bench.py dyga data  # some of them

Every number is the median of several runs after a warm-up, in this process, on the threads that torch was given. On a
shared machine trust the ratios (measured in one run), not the seconds.
"""

import copy
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from joblib.externals.loky import get_reusable_executor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import dyga  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
import unet  # noqa: E402


def median_seconds(f, runs=5, warmup=1):
    """Median wall time of f() over `runs` calls, after `warmup` calls that do not count."""
    times = []
    for i in range(warmup + runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def bench_data():
    """Random images from the renderer and from a memory-mapped file: images per second, and a process's memory."""
    start = time.perf_counter()
    data.weight_maps()
    yield "all 480 geometries", f"{time.perf_counter() - start:.1f} s", ""
    # Memory of one's own, without pages of files that the system can drop: libraries' code, and the images.
    memory = ("import torch, data\nds = data.load('shapes3d', {!r}, {!r})\n"
              "for _ in range(50): ds.images(torch.randint(48_000, (512,)))\n"
              "print(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])")
    with tempfile.TemporaryDirectory() as folder:
        # The size of the official file, so that nothing is converted, but with a hole instead of images: 6 GB that take
        # no room on the disk. The first 48,000 images are then read once, so that they lie in memory, as a file's do.
        with open(Path(folder) / "shapes3d-64x64.npy", "wb") as file:
            header = dict(descr="|u1", fortran_order=False, shape=(480_000, 64, 64, 3))
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 480_000 * 64 * 64 * 3)
        for source, target in (("rendered", 15_000), ("official", 20_000)):
            ds = data.load("shapes3d", folder, source)
            for part in torch.arange(48_000 if source == "official" else 0).split(1000):
                ds.images(part)
            for batch in (64, 512):
                seconds = median_seconds(lambda: ds.images(torch.randint(48_000, (batch,))), 20, 3)
                yield f"{source}, batch {batch}", f"{batch / seconds:,.0f} images/s", f"target {target:,} on 2 cores"
            done = subprocess.run([sys.executable, "-c", memory.format(folder, source)], capture_output=True, text=True,
                                  cwd=Path(data.__file__).parent, check=True)
            yield f"{source}, memory", f"{int(done.stdout) / 1024:,.0f} MB", "target below 300 MB"


def preset(name):
    """A model of this preset, untrained."""
    args = train.build_parser().parse_args(["--dataset", "shapes3d", "--preset", name])
    args.device = torch.device("cpu")
    return train.Model(train.settings(args))


class PlainAttention(torch.nn.Module):
    """The peer of unet.Attention: a product each for queries, keys and values, and the softmax written out."""

    def __init__(self, ours):
        super().__init__()
        dim, context_dim, self.heads = ours.to_q.in_features, ours.to_kv.in_features, ours.heads
        self.q, self.out = torch.nn.Linear(dim, dim, bias=False), torch.nn.Linear(dim, dim)
        self.k, self.v = (torch.nn.Linear(context_dim, dim, bias=False) for _ in range(2))

    def forward(self, x, context=None, maps=None):
        context = x if context is None else context
        q, k, v = (f(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L or N, C/heads)
                   for f, y in ((self.q, x), (self.k, context), (self.v, context)))
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, L, N)
        return self.out((attention @ v).transpose(1, 2).flatten(2))


class PlainTransformer(unet.Transformer):
    """The peer of unet.Transformer: 1x1 convolutions before and after, values and gates from one product."""

    def __init__(self, ours):
        dim, groups = ours.norm.num_channels, ours.norm.num_groups
        context_dim, heads = ours.cross_attention.k.in_features, ours.cross_attention.heads
        super().__init__(dim, context_dim, groups, heads, ours.self_attention is not None)
        self.self_attention, self.cross_attention = ours.self_attention, ours.cross_attention
        self.proj_in, self.proj_out = torch.nn.Conv2d(dim, dim, 1), unet.zero(torch.nn.Conv2d(dim, dim, 1))

    def forward(self, x, time, context, maps):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H*W, C)
        if self.self_attention is not None:
            h = h + self.self_attention(self.norm_self(h))
        h = h + self.cross_attention(self.norm_cross(h), context)
        value, gate = self.ff_in(self.norm_ff(h)).chunk(2, dim=-1)  # two of (B, H*W, 4C)
        h = h + self.ff_out(value * torch.nn.functional.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, C, H, W)


class PlainUnits(torch.nn.Module):
    """The peer of the extractor's batched private MLPs: a list of networks, called one after the other."""

    def __init__(self, ours):
        super().__init__()
        widths = [ours.unit_mlp[0].weight.shape[1], *(layer.weight.shape[2] for layer in ours.unit_mlp)]
        self.last = torch.nn.ReLU() if ours.unit_relu else torch.nn.Identity()
        self.nets = torch.nn.ModuleList(torch.nn.Sequential(*(
            layer for a, b in zip(widths, widths[1:]) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())))[:-1]
            for _ in range(ours.unit_mlp[0].weight.shape[0]))

    def forward(self, s):
        return torch.stack([self.last(net(s[:, u:u + 1])) for u, net in enumerate(self.nets)], 1)  # (B, N, D)


def plain(model):
    """Rebuild a model of train.py in the plainest PyTorch form of the same networks."""
    for ours, peer in ((unet.Attention, PlainAttention), (unet.Transformer, PlainTransformer)):
        for module in list(model.unet.modules()):
            for name, child in list(module.named_children()):
                if type(child) is ours:
                    setattr(module, name, peer(child))
    model.extractor.cnn.to(memory_format=torch.contiguous_format)
    units = PlainUnits(model.extractor)
    model.extractor.unit_mlp = units  # their parameters are the extractor's
    model.extractor.__dict__["expand"] = units  # before the method of that name
    return model


def stepper(model, batch, fast, half=False):
    """A function that does one training step of stage 2 on latents that are at hand, in our form or the plain one.
    half: in bfloat16."""
    images = torch.randint(256, (batch, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        z0 = model.vqgan.encode(images)
    average = copy.deepcopy(model).requires_grad_(False)
    parameters = [*model.extractor.parameters(), *model.unet.parameters()]
    opt = torch.optim.AdamW(parameters, lr=1e-4, fused=fast, foreach=False if not fast else None)
    model.train()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, _ = model(images, z0)
        opt.zero_grad(set_to_none=fast)
        loss.backward()
        opt.step()
        if fast:
            for name in ("extractor", "unet"):
                unet.ema_update(getattr(average, name), getattr(model, name), 20_000, batch, 100_000)
        else:
            with torch.no_grad():
                for mean, new in zip(average.parameters(), model.parameters()):
                    mean.mul_(0.999).add_(new, alpha=0.001)
    return step


def bench_step():
    """One training step of the laptop preset and its parts; then against the plainest PyTorch form, in both sizes."""
    ds, model = data.load("shapes3d", source="rendered"), preset("laptop")
    model.train()
    batch = model.cfg["batch"]
    opt = unet.Muon([*model.extractor.parameters(), *model.unet.parameters()], lr=1e-4, fused=True)
    idx = torch.randint(len(ds), (batch,))
    images = ds.images(idx)
    z0 = model.vqgan.encode(images)

    def step():
        loss, _ = model(ds.images(idx), z0)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()

    whole = median_seconds(step)
    yield f"step, laptop, batch {batch}", f"{batch / whole:.0f} images/s", ""
    for name, f in (("data", lambda: ds.images(idx)), ("forward", lambda: model(images, z0)), ("optimiser", opt.step)):
        seconds = median_seconds(f)
        yield f"  {name}", f"{seconds * 1e3:.1f} ms", f"{seconds / whole:.0%} of the step"
    for name, batch in (("laptop", 64), ("paper", 8)):
        model = preset(name)
        steps = [stepper(plain(preset(name)), batch, False)]
        steps += [stepper(preset(name), batch, True, half) for half in (False, True)]
        # Turn by turn, so that a busy moment of the machine meets all.
        times = [[median_seconds(f, 1, int(turn == 0)) for f in steps] for turn in range(9)]
        theirs, *both = (statistics.median(column) for column in zip(*times))
        encoder = median_seconds(lambda: model.vqgan.encode(images[:batch]))
        once = (model.cfg["pool_images"] or len(ds)) / model.cfg["images"]  # encodings per image seen: latents are kept
        yield f"step with AdamW, {name} size, batch {batch}", f"{batch / theirs:.1f} images/s", "plainest form, float32"
        yield "  stage-1 encoder, in none of them", f"{encoder * 1e3:.1f} ms", f"{once:.2f} times a step in our form"
        for kind, ours in zip(("float32", "bfloat16"), both):
            encoding = once * encoder / (ours + once * encoder)
            yield f"  our form, {kind}", f"{batch / ours:.1f} images/s", (
                f"{theirs / ours:.2f} times as fast, {(theirs + encoder) / (ours + once * encoder):.2f} if the plain "
                f"form encodes in each step (ours: {encoding:.0%} of the time)")


def bench_sampling():
    """DDIM sampling, 100 steps, and saving and loading a checkpoint."""
    model = preset("laptop").eval()
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
    from sklearn.exceptions import ConvergenceWarning
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
    x = (units - units.mean(0)).transpose(0, 1).contiguous()  # (N, n, D)
    for K in (12, 32):  # EM alone, as many components and iterations on both sides
        nearest = dyga.plus_plus(x, K, torch.Generator().manual_seed(0))
        start = dyga.hard_m_step(x, nearest, K, 8, torch.ones_like(x[..., 0]))
        ours = median_seconds(lambda: dyga.em(x, start, max_iter=5, tol=-1.0), 3) / 5
        # Five iterations here too: after its last one, scikit-learn's fit adds an E-step for the labels.
        theirs = GaussianMixture(K, covariance_type="full", max_iter=5, tol=0, init_params="random_from_data",
                                 reg_covar=1e-4, warm_start=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # five iterations are not meant to converge
            theirs.fit(units[:, 0].numpy())  # the first call also starts the mixture
            peer = median_seconds(lambda: theirs.fit(units[:, 0].numpy()), 3, 0) / 5 * N
        yield f"  per EM iteration, {K} components", f"{ours:.2f} s", (
            f"{peer / ours:.0f} times as fast as scikit-learn ({peer:.1f} s)")
    c = units[:64]
    yield "align, batch 64", f"{median_seconds(lambda: model.align(c), 20) * 1e3:.1f} ms", ""


def codes_of_the_whole_grid():
    """encode() for the metrics: ten noisy units for all 480,000 images of Shapes3D, and the sizes of its factors."""
    sizes, generator = [10, 10, 10, 8, 4, 15], np.random.default_rng(0)
    factors = np.stack(np.unravel_index(np.arange(480_000), sizes), 1)  # (480000, 6)
    codes = factors[:, [0, 1, 2, 3, 4, 5, 0, 1, 2, 5]] + 0.3 * generator.normal(size=(480_000, 10))
    return lambda idx: codes[idx], sizes


def bench_metrics():
    """The metrics without boosted trees, at full sample counts."""
    encode, sizes = codes_of_the_whole_grid()
    whole = 0
    for metric in (evaluate.factor_vae, evaluate.mig, evaluate.modularity, evaluate.sap, evaluate.infomec):
        seconds = median_seconds(lambda: metric(encode, sizes), 1, 0)
        whole += seconds
        yield metric.__name__, f"{seconds:.2f} s", f"{whole:.2f} s with those above"


def bench_dci():
    """A full DCI: does its wall time come near its CPU time over cores? (Several minutes.)"""
    def cpu_seconds():
        get_reusable_executor().shutdown(wait=True)  # the time of a process counts once it has ended
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    encode, sizes = codes_of_the_whole_grid()
    before = cpu_seconds()
    wall = median_seconds(lambda: evaluate.dci(encode, sizes), 1, 0)
    cores = len(os.sched_getaffinity(0))
    share = (cpu_seconds() - before) / cores
    yield "DCI, 10,000 / 5,000 samples", f"{wall:.0f} s", f"{wall / share:.2f} times its CPU time over {cores} cores"


def exponent(sizes, seconds):
    """The power of the size that the time goes with: the slope of a straight line through log time over log size."""
    return f"time goes with the power {np.polyfit(np.log(sizes), np.log(seconds), 1)[0]:.2f}"


def bench_scaling():
    """How time grows with batch, samples, units and images: three points each, and the exponent."""
    model = preset("laptop")
    batches, times = (16, 64, 256), []
    for batch in batches:
        times.append(median_seconds(stepper(model, batch, True), 5))
        yield f"step, laptop, batch {batch}", f"{batch / times[-1]:.0f} images/s", ""
    yield "", "", exponent(batches, times)
    units, _ = dyga.toy_units([10] * 20, 20_000, torch.Generator().manual_seed(0))  # (n, N, D)
    for what, parts in (("samples", [units[:n] for n in (1_250, 5_000, 20_000)]),
                        ("units", [units[:5_000, :N] for N in (5, 10, 20)])):
        times = []
        for part in parts:
            times.append(median_seconds(lambda: dyga.DyGA(part.shape[1]).fit(part), 1, 0))
            yield f"fit, {part.shape[1]} units x {len(part):,} samples", f"{times[-1]:.1f} s", ""
        yield "", "", f"{what}: {exponent([part.numel() for part in parts], times)}"
    encode, sizes = codes_of_the_whole_grid()
    counts = (2_500, 5_000, 10_000)
    for metric in (evaluate.factor_vae, evaluate.mig, evaluate.infomec):
        times = [median_seconds(lambda: metric(encode, sizes, n_train=n), 1, 0) for n in counts]
        yield f"{metric.__name__}, {counts[-1]:,} images or votes", f"{times[-1]:.2f} s", exponent(counts, times)


def bench_start():
    """From the command to an imported train.py, and to the first training step of the laptop preset."""
    folder = Path(train.__file__).parent
    leave = "import os, sys, train; sys.argv[1:] = {}; train.Run.tally = lambda *a, **k: os._exit(0); train.main()"
    with tempfile.TemporaryDirectory() as out:
        flags = ["--dataset", "shapes3d", "--source", "rendered", "--preset", "laptop", "--out", f"{out}/run"]
        for what, code in (("import train", "import train"), ("start to the first step", leave.format(flags))):
            seconds = median_seconds(lambda: subprocess.run([sys.executable, "-c", code], cwd=folder, check=True,
                                                            capture_output=True), 3)
            yield what, f"{seconds:.1f} s", ""


def main():
    """Run the chosen row groups and print the table."""
    torch.set_flush_denormal(True)  # as train.py
    torch.manual_seed(0)
    groups = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or groups:
        for row, value, note in groups[name]():
            print(f"{row:40} {value:>18}   {note}", flush=True)


if __name__ == "__main__":
    main()
