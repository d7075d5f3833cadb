"""Frechet Inception Distance of a checkpoint's images, as in the paper's Table 2 (CelebA: 12.0).

    python tests/fid.py out/celeba-paper/ckpt.pt --n 10000

Its network (91 MB) belongs into --data_dir, from the address below. It is TorchScript, a program:
take it from nowhere else."""
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402

INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt")

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of Gaussians: |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^1/2).
    mu: (D,), cov: (D, D), symmetric, no eigenvalue below 0 (few images: some are 0)."""
    # cov1 cov2 is not symmetric; root cov2 root, of the same eigenvalues, is (root root = cov1).
    values, vectors = np.linalg.eigh(cov1)  # (D,), (D, D)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # (D, D)
    eigenvalues = np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)  # (D,)
    trace = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(eigenvalues).sum()
    return float(((mu1 - mu2) ** 2).sum() + trace)

@torch.no_grad()
def fid(model, ds, inception, n, steps, seed=0):
    """Frechet Inception Distance (reference 20) of n generated and n real images; low is good.
    Paper: does not say what samples are conditioned on. Here: aligned units of n images, others
    than the n real ones where the dataset is large enough."""
    if n < 2_048:
        warnings.warn(f"FID of {n:,} images: far too high below 2,048, the number of features")
    generator, moments = torch.Generator().manual_seed(seed), []
    order = torch.randperm(len(ds), generator=generator)
    for kind, idx in (("real", order[:n]), ("generated", order[-n:])):
        features = []
        for part in tqdm(idx.split(64), f"{kind} images, 64 at once"):
            images = ds.images(part)  # (B, 3, 64, 64)
            if kind == "generated":
                c_tilde = model.dyga.align(model.units(images))  # (B, N, D)
                images = model.sample(c_tilde, model.noise(len(part), generator), steps)
            features.append(inception(images, return_features=True).cpu().double())  # (B, 2048)
        features = torch.cat(features).numpy()  # (n, 2048)
        moments += [features.mean(0), np.cov(features, rowvar=False)]
    return frechet_distance(*moments)

def main():
    p = data.Parser(description="Frechet Inception Distance of a checkpoint of train.py.")
    p.add_argument("checkpoint", help="ckpt.pt of train.py")
    p.add_argument("--n", type=int, default=10_000, help="images; best 2,048 and more")
    p.add_argument("--seed", type=int, default=0, help="of the images and the noise")
    p.add_argument("--data_dir", default="data", help="folder of the network and the datasets")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = p.parse_args()
    device = train.pick_device(args.device)
    model, ckpt = train.load_checkpoint(args.checkpoint, device)
    cfg, path = ckpt["config"], Path(args.data_dir) / Path(INCEPTION).name
    ds = data.load(cfg["dataset"], args.data_dir, cfg["source"], device)
    if not 2 <= args.n <= len(ds):
        raise data.UserError(f"--n {args.n}: expected 2 to {len(ds):,}, the images of {ds.name}")
    if not path.is_file():
        raise data.UserError(f"{path} is not there; put it there from {INCEPTION}")
    inception = torch.jit.load(path, map_location=device).eval()
    value = fid(model, ds, inception, args.n, cfg["ddim_steps"], args.seed)
    print(f"FID of {args.n:,} images of {ds.name}: {value:.2f}; the paper's on CelebA: 12.0 +- 1.2")

if __name__ == "__main__":
    data.run(main)
