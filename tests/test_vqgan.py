"""Facts about stage 1 (Table 7): codebook, autoencoder, discriminator, losses."""
import pytest
import torch
import torch.nn.functional as F

import vqgan as V

IMAGES = torch.randint(256, (8, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()

def test_a_latent_becomes_its_nearest_code_and_each_loss_moves_its_own_side_of_the_distance():
    book, z = V.Codebook(20, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    torch.nn.init.normal_(book.codes)
    quantised, codebook_loss, commitment_loss = book(z)
    rows, codes = (x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (z, quantised))
    torch.testing.assert_close(codes, book.codes[torch.cdist(rows, book.codes).argmin(dim=1)])
    # Gradients pass straight through to z.
    assert torch.autograd.grad((quantised * 5).sum(), z, retain_graph=True)[0].eq(5).all()
    # The same distance, as a function of either side.
    torch.testing.assert_close(codebook_loss, commitment_loss)
    for loss, moved, still in ((codebook_loss, book.codes, z), (commitment_loss, z, book.codes)):
        grads = torch.autograd.grad(loss, [moved, still], allow_unused=True, retain_graph=True)
        assert grads[0].any() and grads[1] is None

def test_restart_moves_exactly_the_unused_codes_onto_latents():
    torch.manual_seed(0)
    book, z = V.Codebook(20, 3).train(), torch.randn(2, 3, 4, 4)
    book(z)
    used, before = book.uses > 0, book.codes.detach().clone()
    assert 0 < used.sum() < 20
    book.restart(z)
    assert torch.equal(book.codes[used], before[used]) and book.uses.sum() == 0
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert all((rows == code).all(dim=1).any() for code in book.codes[~used])

def test_a_picture_drawn_between_two_steps_counts_no_code_as_used():
    # Pictures come by the clock: counted, they would make a run's restarts depend on its speed.
    net = V.VQGAN(channels=16, multipliers=(1,), res_blocks=1, codebook_size=32, patch=8).train()
    net.reconstruct(IMAGES)
    assert not net.codebook.uses.any()
    net.codebook(net.encoder(V.to_float(IMAGES)))
    assert net.codebook.uses.any()

def test_paper_size_turns_64x64_pixels_into_3x16x16_latents_and_quantises_before_it_decodes():
    net = V.VQGAN().eval()
    z = net.encode(IMAGES[:2])
    assert z.shape == (2, *net.latent_shape) == (2, 3, 16, 16)
    assert net.codebook.codes.shape == (2048, 3) and net.decode(z).shape == (2, 3, 64, 64)
    quantised_twice = net.decode(net.codebook(z)[0])
    torch.testing.assert_close(net.decode(z), quantised_twice, atol=1, rtol=0)  # a grey level

@pytest.mark.parametrize("group_channels, passes", [(8, True), (1, False)])
def test_groups_of_eight_channels_let_the_colour_through_where_ldms_do_not(group_channels, passes):
    # Two pictures of one colour each: with one channel per group, both leave as 0 everywhere.
    torch.manual_seed(0)
    x = torch.randn(2, 32, 1, 1).expand(2, 32, 4, 4)
    one, other = V.norm_silu(32, group_channels)(x)
    assert bool((one - other).abs().max() > 0.1) is passes

def test_pixels_become_floats_within_one_and_back_and_an_error_of_one_level_is_48_decibels():
    x = V.to_float(IMAGES)
    assert x.abs().max() <= 1 and torch.equal(V.to_uint8(x), IMAGES)
    assert V.psnr(IMAGES // 2, IMAGES // 2 + 1) == pytest.approx(48.1308, abs=1e-3)  # 20 log10 255

def test_adversarial_weight_balances_both_gradients_at_the_last_layer_and_a_blind_hinge_is_one():
    torch.manual_seed(0)
    net = V.VQGAN(channels=16, multipliers=(1, 2), res_blocks=1, codebook_size=32, patch=4)
    disc, x, last = V.PatchDiscriminator(8), V.to_float(IMAGES), net.decoder[-2].weight
    _, row = V.stage1_losses(net, disc, x, "l1", disc_weight=0.75, commitment=0.25)
    x_hat = net.decoder(net.codebook(net.encoder(x))[0])
    g_l1, = torch.autograd.grad(F.l1_loss(x_hat, x), last, retain_graph=True)
    g_adversarial, = torch.autograd.grad(-disc(x_hat).mean(), last)
    expected = 0.75 * g_l1.norm() / (g_adversarial.norm() + 1e-4)
    assert row["adversarial_weight"].item() == pytest.approx(expected.item(), rel=1e-2)
    for p in disc[-1].parameters():
        torch.nn.init.zeros_(p)  # answers 0 for all: both hinges are 1
    _, row = V.stage1_losses(net, disc, x, "l1", disc_weight=0.75, commitment=0.25)
    assert row["disc_loss"].item() == 1
    row["disc_loss"].backward()  # and stops at the drawing
    assert all(p.grad is None for p in net.parameters())
    assert "adversarial_weight" not in V.stage1_losses(net, None, x, "mse", 0.75, 0.25)[1]
