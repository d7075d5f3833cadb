"""Facts about stage 1 (Table 7): codebook, autoencoder, discriminator, losses."""

import pytest
import torch
import torch.nn.functional as F

import vqgan as V


def small(**options):
    torch.manual_seed(0)
    return V.VQGAN(**(dict(channels=16, multipliers=(1, 2), res_blocks=1, codebook_size=32, patch=4) | options))


def pictures(n=8):
    return torch.randint(256, (n, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# ---- codebook ----


def test_nearest_code_is_what_a_full_distance_table_says():
    torch.manual_seed(0)
    book = V.Codebook(50, 3)
    torch.nn.init.normal_(book.codes)
    flat = torch.randn(200, 3)
    assert torch.equal(book.indices(flat), torch.cdist(flat, book.codes).argmin(dim=1))


def test_gradients_pass_straight_through_quantisation():
    book, z = V.Codebook(20, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    (book(z)[0] * 5).sum().backward()
    assert z.grad.eq(5).all()


def test_codes_and_encoder_are_each_moved_by_their_own_loss():
    book, z = V.Codebook(20, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    _, codebook_loss, commitment_loss = book(z)
    assert codebook_loss == commitment_loss  # the same distance; they differ in what it is a function of
    grads = torch.autograd.grad(codebook_loss, [z, book.codes], allow_unused=True, retain_graph=True)
    assert grads[0] is None and grads[1].abs().sum() > 0
    grads = torch.autograd.grad(commitment_loss, [z, book.codes], allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None


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
    assert z.shape == (2, 3, 16, 16) and net.factor == 4 and net.codebook.codes.shape == (2048, 3)
    assert net.decode(z).shape == (2, 3, 64, 64)


def test_decoding_quantises_first():
    net = small().eval()
    z = net.encode(pictures(2))
    snapped = net.codebook(z)[0]
    assert torch.equal(net.decode(z), net.decode(snapped))


def test_group_norm_lets_the_colour_through():
    # Two pictures of one colour each: with one channel per group, both would leave as 0 everywhere.
    torch.manual_seed(0)
    x = torch.randn(2, 32, 1, 1).expand(2, 32, 4, 4)
    one, other = V.group_norm(32)(x)
    assert (one - other).abs().max() > 0.1


def test_float_and_uint8_pictures_are_inverse():
    images = pictures()
    assert V.to_float(images).min() >= -1 and V.to_float(images).max() <= 1
    assert torch.equal(V.to_uint8(V.to_float(images)), images)


# ---- training ----


def test_a_few_steps_reduce_the_reconstruction_error_and_use_the_codebook():
    stage1, images = V.Stage1(small(), lr=3e-3, disc_weight=0.0, restart_images=80), pictures() // 4 + 150
    logs = [stage1.step(images, 8 * i, i / 60) for i in range(60)]
    assert logs[-1]["l1"] < 0.5 * logs[0]["l1"]
    assert logs[-1]["codes_used"] > 0.5
    assert "adversarial_weight" not in logs[0] and stage1.disc is None


def test_finish_scales_latents_to_unit_deviation_and_freezes():
    net, images = small(), pictures()
    psnr = V.Stage1(net, disc_weight=0.0).finish(images)
    assert net.encode(images).std().item() == pytest.approx(1, rel=1e-4)
    error = (net.reconstruct(images).float() - images.float()).square().mean((1, 2, 3))
    assert psnr == pytest.approx((10 * torch.log10(255 ** 2 / error)).mean().item(), abs=1e-3)
    assert not any(p.requires_grad for p in net.parameters())


def test_adversarial_weight_balances_the_two_gradients_at_the_last_layer():
    net = small()
    stage1 = V.Stage1(net, disc_weight=0.75, disc_width=8)
    x = V.to_float(pictures())
    net.codebook.restart(net.encoder(x).detach())
    x_hat = net.decoder(net.codebook(net.encoder(x))[0])
    g_rec, = torch.autograd.grad(F.l1_loss(x_hat, x), net.last_weight(), retain_graph=True)
    g_adv, = torch.autograd.grad(-stage1.disc(x_hat).mean(), net.last_weight())
    torch.manual_seed(1)
    logged = stage1.step(pictures(), images_seen=8, progress=0.0)["adversarial_weight"]
    assert logged.item() == pytest.approx((0.75 * g_rec.norm() / (g_adv.norm() + 1e-4)).item(), rel=1e-3)


def test_state_dict_restores_the_next_step_exactly():
    def two_steps(interrupted):
        net = small()
        stage1 = V.Stage1(net, disc_width=8)
        torch.manual_seed(3)
        stage1.step(pictures(), 0, 0.0)
        if interrupted:
            saved, weights = stage1.state_dict(), net.state_dict()
            net = small()
            net.load_state_dict(weights)
            stage1 = V.Stage1(net, disc_width=8)
            stage1.load_state_dict(saved)
        stage1.step(pictures(), 8, 0.5)
        return net.state_dict()

    for a, b in zip(two_steps(False).values(), two_steps(True).values()):
        assert torch.equal(a, b)
