"""Facts about the U-Net (Table 8), skip dropout (equation 7), the noise schedule, DDIM and the averaged weights."""

import copy
import math

import pytest
import torch
from torch import nn

import unet as U


def small(**options):
    torch.manual_seed(0)
    settings = dict(base=16, multipliers=(1, 2), res_blocks=1, attention_at=(1, 2), heads=2, groups=4, context_dim=8,
                    dropout=0.0)
    return U.UNet(**(settings | options))


def noisy_output(net):
    """A fresh U-Net answers 0, since its last layer starts at 0; give every zeroed layer some weights."""
    torch.manual_seed(1)
    for p in net.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.1)
    return net


def test_paper_size_has_the_papers_parameter_count():
    assert round(sum(p.numel() for p in U.UNet().parameters()) / 1e6, 3) == 37.550


def test_a_fresh_unet_answers_zero():
    assert small()(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 8)).eq(0).all()


# ---- the schedule ----


def test_alpha_bar_is_the_product_of_one_minus_beta():
    root = [math.sqrt(0.0015) + (math.sqrt(0.0155) - math.sqrt(0.0015)) * i / 999 for i in range(1000)]
    product, expected = 1.0, []
    for r in root:
        product *= 1 - r * r
        expected.append(product)
    torch.testing.assert_close(U.alpha_bar_schedule(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_noising_keeps_unit_variance():
    torch.manual_seed(0)
    z0, eps = torch.randn(2, 200, 3, 16, 16)
    z_t = U.add_noise(z0, eps, torch.arange(0, 1000, 5), U.alpha_bar_schedule())
    assert abs(z_t.var().item() - 1) < 0.01


def test_losses_of_a_unet_that_answers_zero():
    # eps is standard normal: E eps^2 = 1 and E |eps| = sqrt(2 / pi).
    net, z0, c = small(), torch.randn(512, 3, 8, 8), torch.randn(512, 5, 8)
    for times in ("uniform", "logit_normal"):
        assert U.diffusion_loss(net, z0, c, U.alpha_bar_schedule(), "mse", times).item() == pytest.approx(1, abs=0.02)
        assert U.diffusion_loss(net, z0, c, U.alpha_bar_schedule(), "l1", times).item() == pytest.approx(
            math.sqrt(2 / math.pi), abs=0.01)


# ---- skip dropout ----


@pytest.mark.parametrize("where, widths", [("released", {16, 8}), ("text", {2})])
def test_the_two_readings_of_where_skips_are_dropped(where, widths):
    net = U.UNet(skip_dropout_where=where)
    assert {16 // f for f in net.up_factors if net.drops_skips(f, 16 // f)} == widths


def test_skip_dropout_drops_whole_channels_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(100, 200, 4, 4)
    y = U.drop_channels(x, 0.2, training=True)
    assert set(y.unique().tolist()) == {0.0, 1.25}  # 0, or 1 / (1 - 0.2)
    assert (y == y[:, :, :1, :1]).all()  # a channel is dropped at all of its positions or at none
    assert y.mean().item() == pytest.approx(1, abs=0.01)


def test_skip_dropout_acts_in_training_only():
    net = noisy_output(small(skip_dropout=0.5))
    z, t, c = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 8)
    assert not torch.equal(net(z, t, c), net(z, t, c))
    net.eval()
    assert torch.equal(net(z, t, c), net(z, t, c))


# ---- attention ----


@pytest.mark.parametrize("units", [5, 80])  # on a CPU, more than 64 units go through the fused kernel
def test_attention_maps_sum_to_one_and_do_not_change_the_result(units):
    net = noisy_output(small()).eval()
    z, t, c = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, units, 8)
    maps = []
    slow = net(z, t, c, maps)
    torch.testing.assert_close(slow, net(z, t, c), rtol=0, atol=1e-5)
    assert len(maps) == 7  # two levels with 1 + 2 Transformers each, and the middle
    for m in maps:
        torch.testing.assert_close(m.sum(dim=1), torch.ones_like(m[:, 0]))


def test_units_are_a_set():
    # Cross-attention has no notion of order: permuting the units changes nothing.
    net = noisy_output(small()).eval()
    z, t, c = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 8)
    torch.testing.assert_close(net(z, t, c), net(z, t, c[:, [3, 1, 4, 0, 2]]), rtol=0, atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="16 channels cannot be split over 3 attention heads"):
        small(heads=3)


# ---- sampling and averaging ----


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_ddim_with_a_perfect_denoiser_returns_the_clean_latent(steps):
    alpha_bar, z0 = U.alpha_bar_schedule(), torch.randn(4, 3, 8, 8)

    def oracle(z, t, context, maps):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (z - a.sqrt() * z0) / (1 - a).sqrt()

    found = U.ddim(oracle, torch.randn(4, 3, 8, 8), None, alpha_bar, steps)
    torch.testing.assert_close(found, z0, rtol=0, atol=1e-3)


def test_ddim_attention_is_an_average_over_units():
    net = noisy_output(small()).eval()
    noise, c = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)
    z, maps = U.ddim(net, noise, c, U.alpha_bar_schedule(), 3, attention=True)
    fast = U.ddim(net, noise, c, U.alpha_bar_schedule(), 3)
    assert (z - fast).abs().max() < 1e-5 * fast.abs().max()  # an untrained net's samples are far larger than 1
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 8, 8))


def test_ddim_refuses_impossible_step_counts():
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="DDIM steps"):
            U.ddim(None, torch.randn(1, 3, 8, 8), None, U.alpha_bar_schedule(), steps)


def test_after_one_half_life_the_average_has_come_half_way():
    average, module = nn.Linear(3, 2), nn.Linear(3, 2)
    for p in average.parameters():
        nn.init.zeros_(p)
    for p in module.parameters():
        nn.init.ones_(p)
    for step in range(100):  # 100 batches of 10 images: one half-life of 1,000, long after the warm-up
        U.ema_update(average, module, half_life=1000, batch=10, images_seen=1_000_000 + 10 * step)
    torch.testing.assert_close(average.weight, torch.full((2, 3), 0.5), rtol=1e-4, atol=0)


def test_orthogonalise_keeps_singular_vectors_and_brings_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8)):
        x = torch.randn(shape, generator=generator)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        turned = u.mT @ U.orthogonalise(x) @ v.mT  # in the basis of x's singular vectors: diagonal
        values = turned.diagonal(dim1=1, dim2=2)
        assert (turned - torch.diag_embed(values)).abs().max() < 1e-4
        assert 0.5 < values.min() and values.max() < 1.3


def muon_and_adamw(shape, **group):
    """A weight of this shape after one step of either optimiser with the same gradient, and what each changed."""
    generator, changes = torch.Generator().manual_seed(1), []
    start, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    for optimizer in (U.Muon, torch.optim.AdamW):
        p = torch.nn.Parameter(start.clone())
        p.grad = gradient.clone()
        optimizer([dict(params=[p], **group)], lr=0.01, weight_decay=0.0).step()
        changes.append(p.detach() - start)
    return changes


def test_muon_is_adamw_for_vectors_and_for_groups_that_ask_for_it():
    assert torch.equal(*muon_and_adamw((7,)))
    assert torch.equal(*muon_and_adamw((4, 6), orthogonalise=False))


@pytest.mark.parametrize("shape", [(16, 48), (8, 4, 3, 3), (5, 4, 16)])  # linear, convolution, five units' layers
def test_a_muon_step_moves_all_directions_alike_and_is_a_fifth_of_lr_in_root_mean_square(shape):
    change, _ = muon_and_adamw(shape)
    matrices = change if len(shape) == 3 else change.flatten(1)[None]
    values = torch.linalg.svdvals(matrices)
    assert values.max() / values.min() < 2.5  # a Gaussian gradient's own ratio here is up to 7
    assert change.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.15)


def test_muon_goes_on_after_a_checkpoint_as_if_nothing_had_been():
    def run(stop):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        opt = U.Muon(net.parameters(), lr=0.01)
        for step in range(6):
            if step == stop:
                state, opt = copy.deepcopy(opt.state_dict()), U.Muon(net.parameters(), lr=0.01)
                opt.load_state_dict(state)
            opt.zero_grad()
            net(torch.ones(3, 4)).square().sum().backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.equal(run(stop=3), run(stop=None))
