"""Facts about the feature extractor (Table 9)."""

import math

import pytest
import torch
import torch.nn.functional as F

from extractor import FSQ, Extractor, UnitLinear


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Extractor(4, 8, channels=(8, 16, 16), hidden=(32, 16), unit_hidden=(12, 12)).eval()


def test_paper_size_has_the_papers_parameter_count():
    # By hand from Table 9: 2,764,800 convolutions and norms, 17,835,284 dense, 20 x 148,512 MLPs.
    assert sum(p.numel() for p in Extractor().parameters()) == 23_570_324


def test_batched_unit_mlp_equals_a_loop_of_ordinary_linear_layers():
    layer, x = UnitLinear(5, 7, 3), torch.randn(5, 11, 7)
    loop = [F.linear(x[n], layer.weight[n].T, layer.bias[n, 0]) for n in range(5)]
    torch.testing.assert_close(layer(x), torch.stack(loop))


def test_a_unit_depends_on_its_own_scalar_only(small):
    s = torch.randn(6, 4)
    changed = s.clone()
    changed[:, 2] += 1.0
    difference = (small.expand(changed) - small.expand(s)).abs().amax(dim=(0, 2))  # (N,)
    assert difference[2] > 0 and difference[[0, 1, 3]].eq(0).all()


def test_forward_is_scalars_then_expand(small):
    x = torch.randn(3, 3, 64, 64)
    assert small(x).shape == (3, 4, 8)
    torch.testing.assert_close(small(x), small.expand(small.scalars(x)))


def test_units_end_in_a_relu_only_if_asked(small):
    s = torch.randn(50, 4)
    assert (small.expand(s) >= 0).all()
    assert (Extractor(4, 8, unit_relu=False).expand(s) < 0).any()


def test_the_price_is_that_of_the_divergence_from_a_normal_and_concave_in_each_unit():
    net = Extractor(4, 8, (8, 16), (16, 16), (12, 12), noisy=True)
    torch.nn.init.normal_(net.log_sigma_tenth, std=0.1)
    s = torch.randn(5, 4)
    channel = torch.distributions.Normal(s, (10 * net.log_sigma_tenth).exp().expand(5, 4))
    unit = torch.distributions.Normal(torch.zeros(5, 4), torch.ones(5, 4))
    nats = torch.distributions.kl_divergence(channel, unit).mean(0)  # (N,)
    noisy, price = net.price(s)
    torch.testing.assert_close(price, (1 + nats).log().sum())
    # So ten hues told by one unit (log 10 nats) cost less than as 5 x 2 by two.
    assert math.log1p(math.log(10)) < math.log1p(math.log(5)) + math.log1p(math.log(2))
    deviation = (net.price(s.expand(2000, 5, 4).flatten(0, 1))[0].view(2000, 5, 4) - s).std((0, 1))
    torch.testing.assert_close(deviation, (10 * net.log_sigma_tenth).exp(), rtol=0.05, atol=0)


def test_fsq_rounds_each_unit_to_a_grid_of_the_given_levels_and_lets_gradients_through():
    torch.manual_seed(0)
    fsq = FSQ(dim=6, levels=(8, 5, 5))
    c = (10 * torch.randn(20_000, 1, 6)).requires_grad_()
    out = fsq(c)  # (20000, 1, 6)
    found = len(out.detach().mul(1e4).round().unique(dim=0))
    assert 150 < found <= 200
    out.sum().backward()
    assert (c.grad.abs().amax((1, 2)) > 0).float().mean() > 0.9
