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

@pytest.mark.parametrize("asked", [True, False])
def test_a_unit_depends_on_its_own_scalar_only_and_ends_in_a_relu_only_if_asked(asked):
    net, x = small(unit_relu=asked), torch.randn(6, 3, 64, 64)
    changed = net.scalars(x) + torch.tensor([0, 0, 1.0, 0])
    difference = (net.expand(changed) - net(x)).abs().amax(dim=(0, 2))  # (N,)
    assert difference[2] > 0.01 and difference[[0, 1, 3]].max() < 1e-6
    assert (net.expand(torch.randn(50, 4)) >= 0).all() == asked

def test_the_line_adds_a_multiple_of_the_scalar_in_one_direction_to_each_unit():
    net, s = small(unit_line=True), torch.randn(5, 4)
    c = net.unit_mlp(s.T[..., None]).transpose(0, 1)  # (B, N, D), by the private MLPs alone
    line = s[..., None] * net.unit_line.weight[:, 0] + net.unit_line.bias[:, 0]  # (B, N, D)
    torch.testing.assert_close(net.expand(s), c + line)

def test_a_unit_that_is_not_kept_says_the_same_of_every_image():
    net, x = small(), torch.randn(5, 3, 64, 64)
    net.kept[1] = False
    assert (net(x).std(0).amax(1) > 1e-6).tolist() == [True, False, True, True]  # (N,)

@torch.no_grad()
def test_turned_scalars_are_the_linear_map_of_those_before_and_a_silenced_one_stays():
    net, x = small(), torch.randn(5, 3, 64, 64)
    net.kept[1] = False
    s, turn, mean = net.scalars(x)[:, net.kept], torch.randn(3, 3), torch.randn(3)
    silenced = net.to_scalars[-1].weight[1].clone()
    net.turn_scalars(turn, mean)
    torch.testing.assert_close(net.scalars(x)[:, net.kept], mean + (s - mean) @ turn.T)
    assert torch.equal(net.to_scalars[-1].weight[1], silenced)

def test_fsq_rounds_each_unit_to_a_grid_of_the_given_levels_and_lets_gradients_through():
    torch.manual_seed(0)
    fsq, c = FSQ(dim=6, levels=(8, 5, 5)), (10 * torch.randn(20_000, 1, 6)).requires_grad_()
    out = fsq(c)  # (20000, 1, 6)
    assert 150 < len(out.detach().mul(1e4).round().unique(dim=0)) <= 200
    out.sum().backward()
    assert (c.grad.abs().amax((1, 2)) > 0).float().mean() > 0.9
