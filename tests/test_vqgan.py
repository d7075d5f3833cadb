"""Facts about stage 1 (Table 7): codebook, autoencoder, discriminator, losses."""

import pytest
import torch
import torch.nn.functional as F

import vqgan as V


def small(**options):
    torch.manual_seed(0)
    settings = dict(channels=16, multipliers=(1, 2), res_blocks=1, codebook_size=32, patch=4)
    return V.VQGAN(**(settings | options))


def pictures(n=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, 64, 64), generator=generator, dtype=torch.uint8)


# ---- codebook ----


def test_nearest_code_is_what_a_full_distance_table_says():
    torch.manual_seed(0)
    book, flat = V.Codebook(50, 3), torch.randn(200, 3)
    torch.nn.init.normal_(book.codes)
    assert torch.equal(book.indices(flat), torch.cdist(flat, book.codes).argmin(dim=1))


def test_gradients_pass_straight_through_quantisation():
    book, z = V.Codebook(20, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    (book(z)[0] * 5).sum().backward()
    assert z.grad.eq(5).all()


def test_codes_and_encoder_are_each_moved_by_their_own_loss():
    book, z = V.Codebook(20, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    _, codebook_loss, commitment_loss = book(z)
    assert codebook_loss == commitment_loss  # the same distance, as a function of either side
    for loss, (moves_z, moves_codes) in ((codebook_loss, (False, True)),
                                         (commitment_loss, (True, False))):
        grads = torch.autograd.grad(loss, [z, book.codes], allow_unused=True, retain_graph=True)
        assert [g is not None and bool(g.any()) for g in grads] == [moves_z, moves_codes]


def test_restart_moves_exactly_the_unused_codes_onto_latents():
    torch.manual_seed(0)
    book, z = V.Codebook(20, 3).train(), torch.randn(2, 3, 4, 4)
    book(z)
    used, before = book.uses > 0, book.codes.detach().clone()
    assert 0 < used.sum() < 20
    book.restart(z)
    assert torch.equal(book.codes[used], before[used])
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert all((rows == code).all(dim=1).any() for code in book.codes[~used])
    assert book.uses.sum() == 0


# ---- autoencoder ----


def test_paper_size_turns_64x64_pixels_into_3x16x16_latents():
    net = V.VQGAN().eval()
    z = net.encode(pictures(2))
    assert z.shape == (2, 3, 16, 16) and net.latent_shape == (3, 16, 16)
    assert net.codebook.codes.shape == (2048, 3)
    assert net.decode(z).shape == (2, 3, 64, 64)


def test_decoding_quantises_first():
    net = small().eval()
    z = net.encode(pictures(2))
    assert torch.equal(net.decode(z), net.decode(net.codebook(z)[0]))


@pytest.mark.parametrize("group_channels, passes", [(8, True), (1, False)])
def test_groups_of_eight_channels_let_the_colour_through_where_ldms_do_not(group_channels, passes):
    # Two pictures of one colour each: with one channel per group, both leave as 0 everywhere.
    torch.manual_seed(0)
    x = torch.randn(2, 32, 1, 1).expand(2, 32, 4, 4)
    one, other = V.norm_silu(32, group_channels)(x)
    assert bool((one - other).abs().max() > 0.1) is passes


def test_float_and_uint8_pictures_are_inverse():
    images = pictures()
    assert V.to_float(images).min() >= -1 and V.to_float(images).max() <= 1
    assert torch.equal(V.to_uint8(V.to_float(images)), images)


def test_psnr_of_an_error_of_one_level_is_twenty_times_the_decimal_logarithm_of_255():
    images = pictures() // 2
    assert V.psnr(images, images + 1) == pytest.approx(48.1308, abs=1e-3)


# ---- losses ----


def test_adversarial_weight_balances_the_two_gradients_at_the_last_layer():
    net, disc, x = small(), V.PatchDiscriminator(8), V.to_float(pictures())
    loss, row = V.stage1_losses(net, disc, x, "l1", disc_weight=0.75, commitment=0.25)
    x_hat = net.decoder(net.codebook(net.encoder(x))[0])
    last = net.decoder[-2].weight
    g_l1, = torch.autograd.grad(F.l1_loss(x_hat, x), last, retain_graph=True)
    g_adversarial, = torch.autograd.grad(-disc(x_hat).mean(), last)
    expected = 0.75 * g_l1.norm() / (g_adversarial.norm() + 1e-4)
    assert row["adversarial_weight"].item() == pytest.approx(expected.item(), rel=1e-2)


def test_the_discriminators_hinge_is_one_for_a_blind_judge_and_stops_at_the_drawing():
    net, disc, x = small(), V.PatchDiscriminator(8), V.to_float(pictures())
    torch.nn.init.zeros_(disc.net[-1].weight)
    torch.nn.init.zeros_(disc.net[-1].bias)  # answers 0 for all: both hinges are 1
    loss, row = V.stage1_losses(net, disc, x, "l1", disc_weight=0.75, commitment=0.25)
    assert row["disc_loss"].item() == 1
    row["disc_loss"].backward()
    assert all(p.grad is None for p in net.parameters())
    assert "adversarial_weight" not in V.stage1_losses(net, None, x, "mse", 0.75, 0.25)[1]
