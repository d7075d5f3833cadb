"""Two rivals on the same images, encoder and minutes: beta-TCVAE (Chen et al. 2018) and FactorVAE
(Kim & Mnih 2018), variational autoencoders whose loss asks for independent parts of the code z.

    python tests/rival.py --method factorvae --minutes 45 --out out/factorvae/codes.npz
    python evaluate.py --codes out/factorvae/codes.npz --dataset shapes3d

The extractor tells mean and log variance of z (B, U), a decoder draws the image from z. --plug_in
(Table 3): each z_u goes through a private MLP, the decoder gets aligned units c~ (B, U, 32), or
with --dyga.lam 0 unaligned ones. Other flags are train.py's, with the laptop preset's values (Muon;
the papers': --optimizer adamw --lr 1e-4)."""
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402

PRIOR = Normal(0.0, 1.0, validate_args=False)  # of each number of z

def reconstruction(logits, images):
    """Bernoulli cross-entropy an image, less the images' entropy (a constant): 0 if perfect.
    logits (B, 3, 64, 64), images uint8 (B, 3, 64, 64)."""
    p = images / 255
    least = torch.special.entr(torch.stack([p, 1 - p])).sum()
    return (F.binary_cross_entropy_with_logits(logits, p, reduction="sum") - least) / len(images)

def decompose(q, z):
    """Normals q(z|x) of a batch, z (B, U) from them -> the KL's three parts: index-code mutual
    information, total correlation, dimension-wise KL, by minibatch-weighted sampling (Chen et al.).
    Paper: divides by B times the number of images; here by B, for the true total correlation in a
    large batch, with the same gradient."""
    log_q = q.log_prob(z[:, None])  # (B, B, U): z of row i under q(z | image j)
    log_qz = log_q.sum(2).logsumexp(1) - math.log(len(z))  # (B,)
    log_marginals = (log_q.logsumexp(1) - math.log(len(z))).sum(1)  # (B,)
    information = q.log_prob(z).sum(1) - log_qz  # (B,)
    dimensions = log_marginals - PRIOR.log_prob(z).sum(1)  # (B,)
    return information.mean(), (log_qz - log_marginals).mean(), dimensions.mean()

def density_ratio(logits):
    """Total correlation from a discriminator's logits (B, 2): of z as it is, of permuted z."""
    return (logits[:, 0] - logits[:, 1]).mean()

def permute_dims(z):
    """z (B, U) with each column in an order of its own: every z_u as before, but independent."""
    return z.gather(0, torch.rand_like(z).argsort(0))  # (B, U)

class Rival(nn.Module):
    """Encoder, decoder, FactorVAE's discriminator, DyGA if asked for. cfg: see parse()."""
    seed_of = train.Run.seed_of  # the same rule, so the same images and the same batches

    def __init__(self, cfg):
        super().__init__()
        self.cfg, U = cfg, cfg["units"]
        sizes = train.part(cfg, "extractor")
        self.encoder = train.Extractor(**sizes | {"n_units": 2 * U})  # means, log variances
        self.encoder.unit_mlp, self.encoder.unit_line = nn.Identity(), None
        self.dyga, D = None, 1
        if cfg["plug_in"]:
            D = cfg["extractor.unit_dim"]
            units = train.Extractor(**sizes | {"n_units": U})  # U of them, not 2U
            self.encoder.unit_mlp, self.encoder.unit_line = units.unit_mlp, units.unit_line
            self.dyga = train.DyGA(U, D, **train.part(cfg, "dyga"))
        self.decoder = nn.Sequential(  # the papers' one, of the U-Net's size
            nn.Linear(U * D, 256), nn.ReLU(), nn.Linear(256, 128 * 4 * 4), nn.ReLU(),
            nn.Unflatten(1, (128, 4, 4)), nn.ConvTranspose2d(128, 128, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1))  # (B, 3, 64, 64)
        layers = []  # of the discriminator. Paper: six of 1,000; here four of 256, for time
        for d_in in (U, 256, 256, 256):
            layers += [nn.Linear(d_in, 256), nn.LeakyReLU(0.2)]
        factor_vae = cfg["method"] == "factorvae"
        self.disc = nn.Sequential(*layers, nn.Linear(256, 2)) if factor_vae else None

    def encode(self, images):
        """Images uint8 (B, 3, 64, 64) -> q(z|x): normals (B, U)."""
        mean, log_var = self.encoder.scalars(train.to_float(images)).chunk(2, 1)  # (B, U), (B, U)
        return Normal(mean, (log_var / 2).exp(), validate_args=False)

    def forward(self, images):
        """Images uint8 (B, 3, 64, 64) -> loss, z (B, U), and three numbers to print (3,)."""
        q = self.encode(images)
        z = q.rsample()  # (B, U)
        c = self.encoder.expand(z)  # (B, U, D); D is 1 without units
        c = self.dyga.align(c) if self.dyga else c
        error = reconstruction(self.decoder(c.flatten(1)), images)
        kl = kl_divergence(q, PRIOR).sum(1).mean()
        if self.disc:
            tc = density_ratio(self.disc(z))
            loss = error + kl + self.cfg["gamma"] * tc
        else:
            information, tc, dimensions = decompose(q, z)
            loss = error + information + self.cfg["beta"] * tc + dimensions
        return loss, z, torch.stack([error, kl, tc])

    @torch.no_grad()
    def means(self, ds, idx):
        """idx int64 (n,) -> means (n, U)."""
        self.eval()
        means = torch.cat([self.encode(ds.images(part)).mean for part in idx.split(500)])
        self.train()
        return means

def fit(model, ds):
    """Train until --minutes are over, or --images seen; a line a minute."""
    cfg, batch = model.cfg, model.cfg["batch"]
    generator = torch.Generator().manual_seed(model.seed_of(4))  # the images of train.Run
    order = torch.randperm(len(ds), generator=generator).to(ds.device)
    pool, fit_idx = order[:min(cfg["pool_images"], cfg["images"])], order[:cfg["fit_images"]]
    optimizers = train.make_optimizers(cfg, [model.encoder, model.decoder], [], (0.9, 0.999), 0.0)
    if model.disc:
        adam = torch.optim.Adam(model.disc.parameters(), 1e-4, (0.5, 0.9))
    seen, progress, rows = 0, 0.0, []
    start, printed = time.perf_counter(), 0.0
    while progress < 1:
        torch.manual_seed(model.seed_of(2, seen, 0))
        idx = torch.randint(len(pool), (batch,), device=ds.device)  # (B,)
        loss, z, terms = model(ds.images(pool[idx]))
        if not loss.isfinite():
            raise data.UserError(f"image {seen:,}: the loss is {loss}; start with a lower --lr")
        seen += batch
        rows.append(terms.detach())
        rise, fall = seen / max(cfg["warmup"], 1), (1 - progress) / max(cfg["decay"], 1e-9)
        model.zero_grad()
        loss.backward()
        train.step(optimizers, cfg["lr"] * min(1.0, rise, fall))
        if model.disc:  # the loss above has left gradients in it, too
            model.disc.zero_grad()
            # Paper: permutes z of another batch; here of this one, like disentanglement_lib.
            logits = model.disc(torch.cat([z, permute_dims(z)]).detach())  # (2B, 2)
            F.cross_entropy(logits, torch.arange(2 * batch, device=ds.device) // batch).backward()
            adam.step()
        if cfg["plug_in"] and cfg["dyga.lam"] and seen % len(pool) < batch:  # an epoch is over
            units = model.encoder.expand(model.means(ds, fit_idx)).detach()  # (n, U, D)
            model.dyga.fit(units, torch.Generator().manual_seed(model.seed_of(3, seen)))
        minutes = (time.perf_counter() - start) / 60
        progress = minutes / cfg["minutes"] if cfg["minutes"] else seen / cfg["images"]
        if minutes - printed > 1 or progress >= 1:
            error, kl, tc = torch.stack(rows).mean(0).tolist()  # since the last line
            print(f"{minutes:.1f} minutes, {seen:,} images: reconstruction {error:.1f}, "
                  f"KL {kl:.2f}, TC {tc:.2f}", flush=True)
            printed, rows = minutes, []

def parse():
    """The command line -> all settings, a dict: train.py's and these."""
    p = data.Parser(description="Train a rival, write its codes. Other flags are train.py's.")
    p.add_argument("--method", default="beta_tcvae", choices=["beta_tcvae", "factorvae"])
    p.add_argument("--beta", type=float, default=6.0, help="weight of TC in beta-TCVAE")
    p.add_argument("--gamma", type=float, default=40.0, help="weight of TC in FactorVAE")
    p.add_argument("--units", type=train.within(int, "2..4096"), default=10, help="U, size of z")
    p.add_argument("--plug_in", action="store_true", help="decode units that DyGA aligns")
    p.add_argument("--minutes", type=float, help="to train; none: --images")
    p.add_argument("--out", default="out/rival/codes.npz", help="file of codes to write")
    args, others = p.parse_known_args()
    flags = shlex.split(train.PRESETS["laptop"], comments=True) + others
    return vars(train.build_parser().parse_args(flags)) | vars(args)

def main():
    """Train, then write the means of all images in the dataset's order."""
    torch.set_flush_denormal(True)
    cfg = parse()
    Path(cfg["out"]).parent.mkdir(parents=True, exist_ok=True)  # if it cannot be made, say so now
    device = train.pick_device(cfg["device"])
    ds = data.load(cfg["dataset"], cfg["data_dir"], cfg["source"], device, vary=cfg["vary"])
    torch.manual_seed(cfg["seed"])
    model = Rival(cfg).to(device)
    fit(model, ds)
    codes = model.means(ds, torch.arange(len(ds))).cpu().numpy()  # (images, U)
    with data.replacing(cfg["out"]) as temporary, open(temporary, "wb") as file:
        np.savez(file, codes=codes)
    print(f"wrote {cfg['out']}: codes {codes.shape}")

if __name__ == "__main__":
    data.run(main)
