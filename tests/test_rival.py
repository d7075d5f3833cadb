"""Facts about the rivals of tests/rival.py: their losses against closed forms, and a short run."""
import math
import sys

import numpy as np
import pytest
import rival
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import data
import evaluate
import train

RHO = 0.8
TRUE_TC = -0.5 * math.log(1 - RHO**2)  # of two normals that correlate by RHO
COVARIANCE = torch.tensor([[1, RHO], [RHO, 1]])
FEW = ["--vary", "floor hue,shape", "--device", "cpu", "--images", "96", "--batch", "16",
       "--extractor.shrink", "4", "--extractor.channels", "8", "16", "--units", "3"]

def model(monkeypatch, *flags):
    """The networks that a command line asks for."""
    monkeypatch.setattr(sys, "argv", ["rival.py", *flags])
    torch.manual_seed(0)
    return rival.Rival(rival.parse())

def narrow(n):
    """n narrow q(z|x) whose mixture is normal with COVARIANCE, and a draw from each (n, 2)."""
    torch.manual_seed(0)
    means = MultivariateNormal(torch.zeros(2), COVARIANCE - 0.04 * torch.eye(2)).sample((n,))
    q = Normal(means, 0.2)
    return q, q.sample()

def test_either_total_correlation_is_that_of_the_normals_and_three_parts_add_up_to_the_divergence():
    q, z = narrow(2_000)
    parts = rival.decompose(q, z)
    assert parts[1].item() == pytest.approx(TRUE_TC, abs=0.05)
    kl = kl_divergence(q, rival.PRIOR).sum(1).mean().item()
    assert sum(parts).item() == pytest.approx(kl, abs=0.05)
    _, z = narrow(100_000)
    joint = MultivariateNormal(torch.zeros(2), COVARIANCE)  # a discriminator that knows it all:
    logits = torch.stack([joint.log_prob(z), rival.PRIOR.log_prob(z).sum(1)], 1)  # (n, 2)
    assert rival.density_ratio(logits).item() == pytest.approx(TRUE_TC, abs=0.02)

def test_permuted_dims_keep_every_column_and_are_independent():
    _, z = narrow(20_000)
    permuted = rival.permute_dims(z)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    assert z.T.corrcoef()[0, 1] > 0.75 and permuted.T.corrcoef()[0, 1].abs() < 0.03

@pytest.mark.parametrize("shift", [0, 0.1])
def test_a_perfect_reconstruction_costs_nothing_and_a_shift_by_d_half_p_1_minus_p_d_squared(shift):
    torch.manual_seed(0)
    images = torch.randint(1, 255, (2, 3, 64, 64)).byte()
    found = rival.reconstruction((images / 255).logit() + shift, images).item()
    # p (1 - p) is 1/6 on average.
    assert found == pytest.approx(3 * 64 * 64 / 6 * shift**2 / 2, rel=0.05, abs=0.05)

def test_the_decoder_is_as_large_as_the_laptop_presets_unet(monkeypatch):
    net = model(monkeypatch)
    unet = train.UNet(net.cfg["vqgan.z_channels"], context_dim=32, **train.part(net.cfg, "unet"))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.decoder, unet)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)

def test_batches_are_train_pys_anchors_those_of_the_means_units_and_a_diverged_run_is_one_line(
        monkeypatch):
    flags = "--images 40 --pool_images 20 --plug_in --dyga.k_max 4 --lr 0".split()
    net, ds = model(monkeypatch, *FEW, *flags), data.load("shapes3d", vary="floor hue,shape")
    asked, images = [], ds.images
    monkeypatch.setattr(ds, "images", lambda idx: asked.append(idx) or images(idx))
    rival.fit(net, ds)
    run = train.Run(net.cfg, torch.device("cpu"), 1)
    torch.manual_seed(run.seed_of(2, 0, 0))
    assert torch.equal(asked[0], run.pool[torch.randint(len(run.pool), (16,))])
    with torch.no_grad():
        units = net.encoder.expand(net.means(ds, torch.arange(40)))  # (40, 3, 32)
    assert net.dyga.mask.any(1).all() and (net.dyga.align(units, return_delta=True)[1] > 0).all()
    torch.nn.init.constant_(net.decoder[0].bias, math.nan)
    with pytest.raises(data.UserError, match="^image 0: the loss is nan; .* --lr$"):
        rival.fit(net, ds)

@pytest.mark.parametrize("flags", [
    "--method beta_tcvae", "--method factorvae --optimizer adamw", "--method factorvae --plug_in",
    "--minutes 0.01"])
def test_a_short_run_writes_the_means_of_all_images(main, tmp_path, capsys, flags):
    out = tmp_path / "new" / "codes.npz"
    flags = [*FEW, *flags.split(), "--dyga.k_max", 4, "--dyga.max_iter", 3, "--out", out]
    assert main(rival, *flags) == 0
    codes = evaluate.read_codes(out, 40)
    assert codes.shape == (40, 3, 1) and codes.dtype == np.float32
    assert (codes.std(0) > 0).all() and "reconstruction" in capsys.readouterr().out
