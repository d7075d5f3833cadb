"""Facts about the U-Net (Table 8), skip dropout (equation 7), schedule, DDIM, EMA and Muon."""
import math

import pytest
import torch
from torch import nn

import unet as U

ALPHA_BAR = U.alpha_bar_schedule()

def small(**options):
    """A small U-Net whose zeroed layers have weights (a fresh one answers 0), and its input."""
    torch.manual_seed(0)
    net = U.UNet(base=16, multipliers=(1, 2), res_blocks=1, attention_at=(1, 2), heads=2, groups=4,
                 context_dim=8, dropout=0.0, **options)
    for p in net.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.1)
    return net.eval(), (torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 8))

def test_paper_size_has_the_papers_parameter_count_answers_zero_first_and_drops_skips_as_released():
    net = U.UNet()
    for where, sides in ("released", {16, 8}), ("text", {2}):
        net.skip_dropout_where = where
        assert {16 // f for f in net.up_factors if net.drops_skips(f, 16 // f)} == sides
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == 37.550
    assert net(torch.randn(1, 3, 16, 16), torch.tensor([3]), torch.randn(1, 5, 32)).eq(0).all()

def test_alpha_bar_is_the_product_of_one_minus_beta():
    beta = [(0.0015 ** 0.5 + (0.0155 ** 0.5 - 0.0015 ** 0.5) * i / 999) ** 2 for i in range(1000)]
    for t in (0, 500, 999):
        product = math.prod(1 - b for b in beta[:t + 1])
        assert ALPHA_BAR[t].item() == pytest.approx(product, rel=1e-5)

@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
@pytest.mark.parametrize("kind, expected", [("mse", 1), ("l1", math.sqrt(2 / math.pi))])
def test_losses_of_a_unet_that_answers_zero(times, kind, expected):
    def net(z_t, t, c_tilde):
        assert abs(z_t.var().item() - 1) < 0.02  # noising keeps unit variance
        return 0 * z_t
    # eps is standard normal: E eps^2 = 1 and E |eps| = sqrt(2 / pi).
    torch.manual_seed(0)
    loss = U.diffusion_loss(net, torch.randn(512, 3, 8, 8), None, ALPHA_BAR, kind, times)
    assert loss.item() == pytest.approx(expected, abs=0.02)

def test_with_v_weight_1_the_loss_is_the_error_of_v():
    z0, seen = torch.randn(64, 3, 8, 8), {}
    def net(z_t, t, c_tilde):
        seen.update(z_t=z_t, a=ALPHA_BAR[t].view(-1, 1, 1, 1))
        return z_t.tanh()  # some guess
    loss = U.diffusion_loss(net, z0, None, ALPHA_BAR, "mse", v_weight=1.0)
    z_t, a = seen["z_t"], seen["a"]
    eps, eps_hat = (z_t - a.sqrt() * z0) / (1 - a).sqrt(), z_t.tanh()
    z0_hat = (z_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
    error = a.sqrt() * (eps_hat - eps) - (1 - a).sqrt() * (z0_hat - z0)  # of v
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-3)

def test_skip_dropout_drops_whole_channels_and_keeps_the_mean():
    torch.manual_seed(0)
    y = U.drop_channels(torch.ones(100, 200, 4, 4), 0.2, training=True)
    assert set(y.unique().tolist()) == {0.0, 1.25}  # 0, or 1 / (1 - 0.2)
    assert (y == y[:, :, :1, :1]).all()  # a channel is dropped at all of its positions or at none
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    net, args = small(skip_dropout=0.5)
    assert torch.equal(net(*args), net(*args))  # in training only
    assert not torch.equal(net.train()(*args), net(*args))

def test_units_are_a_set_and_maps_of_who_is_looked_up_sum_to_one_and_change_no_result():
    net, (z_t, t, c_tilde) = small()
    eps, maps = net(z_t, t, c_tilde), []
    for same in (net(z_t, t, c_tilde[:, [3, 1, 4, 0, 2]]), net(z_t, t, c_tilde, maps)):
        torch.testing.assert_close(same, eps, rtol=0, atol=1e-5)
    assert len(maps) == 7  # two levels with 1 + 2 Transformers each, and the middle
    for m in maps:
        torch.testing.assert_close(m.sum(dim=2), torch.ones_like(m[..., 0]))
    z, mean = U.ddim(net, z_t, c_tilde, ALPHA_BAR, 3, attention=True)
    fast = U.ddim(net, z_t, c_tilde, ALPHA_BAR, 3)
    assert (z - fast).abs().max() < 1e-5 * fast.abs().max()  # an untrained net's are far above 1
    torch.testing.assert_close(mean.sum(dim=1), torch.ones(2, 8, 8))

@pytest.mark.parametrize("steps", [1, 7, 100])
def test_ddim_with_a_perfect_denoiser_returns_the_clean_latent(steps):
    def oracle(z_t, t, c_tilde, maps):
        a = ALPHA_BAR[t].view(-1, 1, 1, 1)
        return (z_t - a.sqrt() * z0) / (1 - a).sqrt()
    z0, noise = torch.randn(2, 4, 3, 8, 8)
    found = U.ddim(oracle, noise, None, ALPHA_BAR, steps)
    torch.testing.assert_close(found, z0, rtol=0, atol=1e-3)

def test_after_one_half_life_the_average_has_come_half_way():
    average, module = nn.Linear(3, 2), nn.Linear(3, 2)
    nn.init.zeros_(average.weight)
    nn.init.ones_(module.weight)
    for step in range(100):  # batches of 10: one half-life of 1,000, long after the warm-up
        U.ema_update(average, module, 1000, batch=10, images_seen=1_000_000 + 10 * step)
    torch.testing.assert_close(average.weight, torch.full((2, 3), 0.5), rtol=1e-4, atol=0)

# Linear, wide and high; convolution; UnitLinear.
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (8, 4, 3, 3), (5, 4, 16)])
def test_muon_steps_along_the_gradients_singular_vectors_alike_by_a_fifth_of_lr(shape):
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U.Muon([p], lr=0.01).step()
    moved, gradient = (x if x.ndim == 3 else x.flatten(1)[None] for x in (-p.detach(), p.grad))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    turned = u.mT @ moved @ v.mT  # in the basis of these vectors: diagonal
    values = turned.diagonal(dim1=1, dim2=2)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-5
    assert values.min() > 0 and values.max() / values.min() < 2.5  # the gradient's own: up to 7
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.15)
