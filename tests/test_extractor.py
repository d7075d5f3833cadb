"""Facts about the feature extractor (Table 9)."""

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


def test_of_two_folded_readings_of_one_hue_the_selection_keeps_one_and_silences_the_other():
    torch.manual_seed(0)
    net, hue, size = small(), torch.rand(4_000) * 2 * torch.pi, torch.rand(4_000)
    # Sine and cosine are not correlated, but their squares are. Unit 1 is constant.
    s = torch.stack([3 * hue.cos(), torch.zeros(4_000), 2 * hue.sin(), size], 1)  # (n, N)
    assert net.select(s) == [0, 3]
    telling = net.scalars(torch.randn(5, 3, 64, 64)) != 0
    assert telling.any(0).tolist() == [True, False, False, True]


def test_of_two_normal_units_one_is_redundant_if_their_correlation_exceeds_the_threshold():
    # Of two normal variables no functions correlate by more than these themselves (Lancaster 1957).
    s = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    s[:, 1] = 0.6 * s[:, 0] + 0.8 * s[:, 1]  # correlation 0.6
    assert small().select(s, most=0.65) == [0, 1, 2, 3]
    assert len(small().select(s, most=0.55)) == 3


def test_fsq_rounds_each_unit_to_a_grid_of_the_given_levels_and_lets_gradients_through():
    torch.manual_seed(0)
    fsq, c = FSQ(dim=6, levels=(8, 5, 5)), (10 * torch.randn(20_000, 1, 6)).requires_grad_()
    out = fsq(c)  # (20000, 1, 6)
    assert 150 < len(out.detach().mul(1e4).round().unique(dim=0)) <= 200
    out.sum().backward()
    assert (c.grad.abs().amax((1, 2)) > 0).float().mean() > 0.9
