"""Facts about the feature extractor (Table 9)."""

import math

import pytest
import torch
import torch.nn.functional as F

from extractor import FSQ, Extractor, UnitLinear


def small(**options):
    torch.manual_seed(0)
    return Extractor(4, 8, (8, 16, 16), (32, 16), (12, 12), **options).eval()


def test_paper_size_has_the_papers_parameter_count():
    # By hand from Table 9: 2,764,800 convolutions and norms, 17,835,284 dense, 20 x 148,512 MLPs.
    assert sum(p.numel() for p in Extractor().parameters()) == 23_570_324


def test_batched_unit_mlp_equals_a_loop_of_ordinary_linear_layers():
    layer, x = UnitLinear(5, 7, 3), torch.randn(5, 11, 7)
    loop = [F.linear(x[n], layer.weight[n].T, layer.bias[n, 0]) for n in range(5)]
    torch.testing.assert_close(layer(x), torch.stack(loop))


def test_a_unit_depends_on_its_own_scalar_only():
    net, x = small(), torch.randn(6, 3, 64, 64)
    s = net.scalars(x)
    changed = s + torch.tensor([0, 0, 1.0, 0])
    difference = (net.expand(changed) - net(x)).abs().amax(dim=(0, 2))  # (N,)
    assert difference[2] > 0.01 and difference[[0, 1, 3]].max() < 1e-6


@pytest.mark.parametrize("asked", [True, False])
def test_units_end_in_a_relu_only_if_asked(asked):
    assert (small(unit_relu=asked).expand(torch.randn(50, 4)) >= 0).all() == asked


def test_the_price_is_that_of_the_divergence_from_a_normal_and_concave_in_each_unit():
    net, s = small(noisy=True), torch.randn(5, 4)
    torch.nn.init.normal_(net.log_sigma_tenth, std=0.1)
    sigma = (10 * net.log_sigma_tenth).exp()  # (N,)
    channel = torch.distributions.Normal(s, sigma.expand(5, 4))
    unit = torch.distributions.Normal(torch.zeros(5, 4), torch.ones(5, 4))
    nats = torch.distributions.kl_divergence(channel, unit).mean(0)  # (N,)
    torch.testing.assert_close(net.price(s)[1], (1 + nats).log().sum())
    # So ten hues told by one unit (log 10 nats) cost less than as 5 x 2 by two.
    assert math.log1p(math.log(10)) < math.log1p(math.log(5)) + math.log1p(math.log(2))
    noise = net.price(s.repeat(2_000, 1))[0] - s.repeat(2_000, 1)  # (10000, N)
    torch.testing.assert_close(noise.std(0), sigma, rtol=0.05, atol=0)


def test_fsq_rounds_each_unit_to_a_grid_of_the_given_levels_and_lets_gradients_through():
    torch.manual_seed(0)
    fsq, c = FSQ(dim=6, levels=(8, 5, 5)), (10 * torch.randn(20_000, 1, 6)).requires_grad_()
    out = fsq(c)  # (20000, 1, 6)
    assert 150 < len(out.detach().mul(1e4).round().unique(dim=0)) <= 200
    out.sum().backward()
    assert (c.grad.abs().amax((1, 2)) > 0).float().mean() > 0.9
