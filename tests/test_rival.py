"""Facts about the rivals of tests/rival.py: their losses against closed forms, and a short run."""

import math
import sys

import numpy as np
import pytest
import rival
import torch
from torch.distributions import MultivariateNormal, Normal

import data
import evaluate
import train

RHO = 0.8
TRUE_TC = -0.5 * math.log(1 - RHO**2)  # of two normals that correlate by RHO
COVARIANCE = torch.tensor([[1, RHO], [RHO, 1]])
FEW = ["--vary", "floor hue,shape", "--device", "cpu", "--images", "96", "--batch", "16",
       "--extractor.shrink", "4", "--extractor.channels", "8", "16", "--units", "3"]
MAPS = torch.rand(480, 5, 64 * 64, generator=torch.Generator().manual_seed(0)).half()


@pytest.fixture(autouse=True)
def noise_in_place_of_rooms(monkeypatch):
    monkeypatch.setattr(data, "weight_maps", lambda: MAPS)  # drawing them takes seconds


def model(monkeypatch, *flags):
    """The networks that a command line asks for, and its settings."""
    monkeypatch.setattr(sys, "argv", ["rival.py", *flags])
    cfg = rival.parse()
    torch.manual_seed(0)
    return rival.Rival(cfg), cfg


def narrow(n):
    """n narrow q(z|x) whose mixture is normal with COVARIANCE, and a draw from each (n, 2)."""
    torch.manual_seed(0)
    sd = 0.2
    means = MultivariateNormal(torch.zeros(2), COVARIANCE - sd**2 * torch.eye(2)).sample((n,))
    q = Normal(means, sd)
    return q, q.sample()


def test_the_total_correlation_of_a_large_batch_is_that_of_correlated_normals():
    _, total_correlation, _ = rival.decompose(*narrow(2_000))
    assert total_correlation.item() == pytest.approx(TRUE_TC, abs=0.05)


def test_mutual_information_total_correlation_and_dimensions_add_up_to_the_kl_divergence():
    q, z = narrow(2_000)
    kl = torch.distributions.kl_divergence(q, rival.PRIOR).sum(1).mean()
    assert sum(rival.decompose(q, z)).item() == pytest.approx(kl.item(), abs=0.05)


def test_a_discriminator_that_is_the_density_ratio_gives_the_total_correlation():
    torch.manual_seed(0)
    joint = MultivariateNormal(torch.zeros(2), COVARIANCE)
    z = joint.sample((100_000,))
    logits = torch.stack([joint.log_prob(z), rival.PRIOR.log_prob(z).sum(1)], 1)  # (n, 2)
    assert rival.density_ratio(logits).item() == pytest.approx(TRUE_TC, abs=0.02)


def test_permuted_dims_keep_every_column_and_are_independent():
    _, z = narrow(20_000)
    permuted = rival.permute_dims(z)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    assert z.T.corrcoef()[0, 1] > 0.75 and permuted.T.corrcoef()[0, 1].abs() < 0.03


def test_a_perfect_reconstruction_costs_nothing_and_any_other_something():
    torch.manual_seed(0)
    images = torch.randint(1, 255, (2, 3, 64, 64)).byte()
    logits = (images / 255).logit()
    assert rival.reconstruction(logits, images).abs() < 0.05
    # A shift by d costs p (1 - p) d^2 / 2 a number, and p (1 - p) is 1/6 on average.
    shifted = rival.reconstruction(logits + 0.1, images).item()
    assert shifted == pytest.approx(3 * 64 * 64 / 6 * 0.1**2 / 2, rel=0.05)


def test_the_decoder_is_as_large_as_the_laptop_presets_unet(monkeypatch):
    net, cfg = model(monkeypatch)
    unet = train.UNet(cfg["vqgan.z_channels"], context_dim=32, **train.part(cfg, "unet"))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.decoder, unet)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_batches_are_those_of_the_diffusion_model(monkeypatch):
    net, cfg = model(monkeypatch, *FEW, "--images", "16", "--pool_images", "20")
    ds = data.load("shapes3d", source="rendered", vary=cfg["vary"])
    asked = []
    images = ds.images
    monkeypatch.setattr(ds, "images", lambda idx: asked.append(idx) or images(idx))
    rival.fit(net, ds)
    run = train.Run(cfg, torch.device("cpu"), 1)
    torch.manual_seed(run.seed_of(2, 0, 0))
    assert torch.equal(asked[0], run.pool[torch.randint(len(run.pool), (16,))])


@pytest.mark.parametrize("flags", [
    "--method beta_tcvae", "--method factorvae --optimizer adamw", "--method factorvae --plug_in",
    "--minutes 0.01"])
def test_a_short_run_writes_the_means_of_all_images(monkeypatch, tmp_path, capsys, flags):
    out = tmp_path / "new" / "codes.npz"
    flags += f" --dyga.k_max 4 --dyga.max_iter 3 --out {out}"
    monkeypatch.setattr(sys, "argv", ["rival.py", *FEW, *flags.split()])
    rival.main()
    codes = evaluate.read_codes(out, 40)  # (40, 3, 1)
    assert codes.shape == (40, 3, 1) and codes.dtype == np.float32
    assert (codes.std(0) > 0).all() and "reconstruction" in capsys.readouterr().out


def test_a_diverged_run_ends_in_one_line(monkeypatch):
    net, cfg = model(monkeypatch, *FEW)
    torch.nn.init.constant_(net.decoder[0].bias, math.nan)
    with pytest.raises(data.UserError, match="--lr"):
        rival.fit(net, data.load("shapes3d", source="rendered", vary=cfg["vary"]))


def test_with_plug_in_the_anchors_are_those_of_the_means_units(monkeypatch):
    net, cfg = model(monkeypatch, *FEW, "--plug_in", "--dyga.k_max", "4", "--lr", "0")
    ds = data.load("shapes3d", source="rendered", vary=cfg["vary"])
    rival.fit(net, ds)
    with torch.no_grad():
        units = net.encoder.expand(net.means(ds, torch.arange(40)))  # (40, 3, 32)
    assert net.dyga.mask.any(1).all() and (net.dyga.delta(units) > 0).all()
