"""Stage 1: a VQ-GAN that turns a 64x64 image into a 3x16x16 latent and back (paper section C.2, Table 7).

Where it sits: diffusion in pixels is slow, so the paper diffuses in the latent space of this autoencoder (latent
diffusion, reference 51). It is trained first, alone, and then frozen. An encoder makes a small map of 3-vectors; a
codebook of 2,048 such vectors replaces each by its nearest entry, which stops the decoder from relying on fine
numerical detail; a decoder draws the image from the result. L1 keeps it faithful, a discriminator keeps it sharp.

The diffusion model works on the encoder's output *before* quantisation: smooth numbers are what noise can be added to.
Decoding quantises first: the decoder has only ever seen codes, and an error that does not change the nearest code
disappears.

    python vqgan.py --dataset shapes3d     # trains stage 1 alone; the same flags as train.py, which owns data and loop
"""

import math
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


def to_float(images):
    """Images uint8 (B, 3, H, W) -> float in [-1, 1], what every network here reads and draws."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Images float in [-1, 1], values beyond cut off -> uint8 (B, 3, H, W)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks, smallest first


def group_norm(channels):
    """GroupNorm with 32 groups, as LDM has it, but never fewer than 8 channels in a group.

    LDM's networks are 128 channels wide and more. At Table 7's 32 channels, 32 groups would normalise every channel
    by itself, and with its mean goes the very thing that tells a red wall from a blue one.
    """
    return nn.GroupNorm(min(32, max(1, channels // 8)), channels, eps=1e-6)


def norm_silu(channels):
    """What precedes each 3x3 convolution of a ResBlock, and the last one of encoder and decoder."""
    return nn.Sequential(group_norm(channels), nn.SiLU())


class ResBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), with a 1x1 convolution on the short path where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.branch = nn.Sequential(norm_silu(c_in), nn.Conv2d(c_in, c_out, 3, padding=1),
                                    norm_silu(c_out), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.shortcut(x) + self.branch(x)


class AttentionBlock(nn.Module):
    """One head of self-attention over all positions: the one place where far parts of the image meet."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.to_qkv(self.norm(x)).view(B, 3, C, H * W).transpose(2, 3)  # (B, 3, H*W, C)
        h = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])  # (B, H*W, C)
        return x + self.to_out(h.transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded at the right and bottom only, as LDM does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def upsample(channels):
    """Double height and width: repeat every pixel, then convolve (a transposed convolution leaves a chequerboard)."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


def middle(channels):
    """The part between encoder levels and latent, and again between latent and decoder levels."""
    return [ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)]


# ----------------------------------------------------------------------------------------------------------------------
# The codebook


class Codebook(nn.Module):
    """K vectors; `forward` replaces every latent vector by its nearest one (van den Oord et al. 2017).

    A code that is never nearest gets no gradient, so a codebook easily collapses to a few used entries. `restart`
    cures that: codes that nobody used lately are moved onto latents of the current batch.
    """

    def __init__(self, size, dim):
        super().__init__()
        self.codes = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("uses", torch.zeros(size))  # how often each code was chosen since the last restart

    def indices(self, flat):
        """Nearest code of each row: (M, dim) -> int64 (M,)."""
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; |z|^2 is the same for every code, so it cannot change the winner.
        distances = torch.addmm(self.codes.square().sum(1), flat, self.codes.t(), alpha=-2)  # (M, K)
        return distances.argmin(dim=1)

    def forward(self, z):
        """Unscaled latents z (B, Z, h, w) -> (quantised latents, codebook loss, commitment loss), losses 0-dim.

        The quantised latents pass gradients straight through to z, as if quantisation were not there: argmin has
        no gradient of its own.
        """
        B, Z, h, w = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, Z)  # (B*h*w, Z)
        found = self.indices(flat.detach())  # (B*h*w,)
        if self.training:
            self.uses.index_add_(0, found, torch.ones_like(found, dtype=self.uses.dtype))
        e = F.embedding(found, self.codes).view(B, h, w, Z).permute(0, 3, 1, 2)  # (B, Z, h, w)
        codebook_loss = F.mse_loss(e, z.detach())  # moves the codes towards the encoder
        commitment_loss = F.mse_loss(z, e.detach())  # keeps the encoder near its codes
        return z + (e - z).detach(), codebook_loss, commitment_loss

    def used(self):
        """Share of codes in use since the last restart, a 0-dim tensor in [0, 1]: the number to watch for collapse.

        It starts from 0 after each restart; read it where it is highest.
        """
        return (self.uses > 0).float().mean()

    @torch.no_grad()
    def restart(self, z):
        """Move every unused code onto a random latent vector of z (B, Z, h, w), and begin counting anew."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B*h*w, Z)
        pick = torch.randint(len(flat), (len(self.codes),), device=z.device)
        self.codes.copy_(torch.where((self.uses == 0)[:, None], flat[pick], self.codes))
        self.uses.zero_()


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder and discriminator


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Table 7 with the default arguments: 64x64 pixels <-> 3x16x16 latents.

    Args:
        channels: width after the first convolution.
        multipliers: width of each level as a multiple of `channels`; every level but the last halves the size.
        res_blocks: residual blocks per encoder level; decoder levels have one more.
        z_channels: Z, numbers per latent position ("embedding dimensionality").
        codebook_size: number of codes ("number of embeddings").
        patch: fold patch x patch pixels into channels before the first convolution and unfold after the last. 1 in
            the paper. Convolutions at full resolution are most of a small VQ-GAN's cost, and on a CPU of this stage's.
    """

    def __init__(self, channels=32, multipliers=(1, 2, 4), res_blocks=2, z_channels=3, codebook_size=2048, patch=1):
        super().__init__()
        self.patch, self.z_channels = patch, z_channels
        self.factor = patch * 2 ** (len(multipliers) - 1)  # f: pixels per latent position, each way
        widths = [channels * m for m in multipliers]

        encoder = [nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch ** 2, channels, 3, padding=1)]
        width = channels
        for level, level_width in enumerate(widths):
            for _ in range(res_blocks):
                encoder.append(ResBlock(width, level_width))
                width = level_width
            if level < len(widths) - 1:
                encoder.append(Downsample(width))
        encoder += [*middle(width), norm_silu(width), nn.Conv2d(width, z_channels, 3, padding=1),
                    nn.Conv2d(z_channels, z_channels, 1)]
        self.encoder = nn.Sequential(*encoder)

        self.codebook = Codebook(codebook_size, z_channels)

        decoder = [nn.Conv2d(z_channels, z_channels, 1), nn.Conv2d(z_channels, width, 3, padding=1), *middle(width)]
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(res_blocks + 1):
                decoder.append(ResBlock(width, level_width))
                width = level_width
            if level > 0:
                decoder.append(upsample(width))
        decoder += [norm_silu(width), nn.Conv2d(width, 3 * patch ** 2, 3, padding=1), nn.PixelShuffle(patch)]
        self.decoder = nn.Sequential(*decoder)
        # Diffusion assumes data of about unit variance. Latents are divided by this one number, their standard
        # deviation over images, positions and channels (LDM's scale_by_std); their mean stays as it is.
        # Stage1.finish sets it, once; until then it is 1.
        self.register_buffer("latent_std", torch.ones(()))

    @torch.no_grad()
    def encode(self, images):
        """Images uint8 (B, 3, H, W) -> latents z0 float (B, Z, h, w), scaled, not quantised; h = H/f, w = W/f."""
        return self.encoder(to_float(images)).float() / self.latent_std

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (B, Z, h, w) -> images uint8 (B, 3, H, W); quantises on the way."""
        return to_uint8(self.decoder(self.codebook(z * self.latent_std)[0]))

    def reconstruct(self, images):
        """There and back: uint8 (B, 3, H, W) -> uint8 (B, 3, H, W). The best that a sample can look."""
        return self.decode(self.encode(images))

    def last_weight(self):
        """The decoder's last convolution: where the adversarial weight compares the two gradients."""
        return self.decoder[-2].weight


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches as real or drawn, not the whole image: (B, 3, 64, 64) -> logits (B, 1, 6, 6)."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for stride, c_in, c_out in ((2, width, 2 * width), (2, 2 * width, 4 * width), (1, 4 * width, 8 * width)):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(c_out),
                       nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, x):
        return self.net(x)


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Stage1:
    """One stage-1 training step after another: losses, two optimisers, codebook health.

    Args:
        vqgan: the VQGAN to train, on its device.
        lr: of both optimisers.
        disc_weight: 0.75 in Table 7; 0 leaves the discriminator out altogether (the off switch).
        disc_width: width of the discriminator's first layer.
        commitment: weight of the encoder's term; the codes' term has Table 7's weight 1.0.
        restart_images: images between two rescues of unused codes.
        optimizer: class of the VQ-GAN's optimiser, with AdamW's arguments; the discriminator's is AdamW.

    Paper: LDM adds a perceptual (LPIPS) loss, whose VGG weights are a download. This code downloads nothing, so that
    loss is absent, openly, in place of a network that silently failed to load.
    """

    def __init__(self, vqgan, lr=2e-4, disc_weight=0.75, disc_width=64, commitment=0.25, restart_images=100_000,
                 optimizer=torch.optim.AdamW):
        device = vqgan.last_weight().device
        self.vqgan, self.commitment, self.restart_images = vqgan, commitment, restart_images
        self.disc_weight = disc_weight
        self.lr = lr
        # LDM's short memories where the loss moves with the discriminator, longer ones where it does not.
        betas = (0.5, 0.9) if disc_weight > 0 else (0.9, 0.99)
        # orthogonalise=False is for Muon (unet.py), the laptop preset's optimiser: the codes are a table, no layer that
        # maps one space to another, so it must leave them to AdamW, which ignores the word.
        parts = [dict(params=[*vqgan.encoder.parameters(), *vqgan.decoder.parameters()]),
                 dict(params=vqgan.codebook.parameters(), orthogonalise=False)]
        self.opt = optimizer(parts, lr=lr, betas=betas, weight_decay=0.0, fused=True)
        self.disc = self.disc_opt = None
        if disc_weight > 0:
            self.disc = PatchDiscriminator(disc_width).to(device)
            self.disc_opt = torch.optim.AdamW(self.disc.parameters(), lr=lr, betas=betas, weight_decay=0.0)

    def step(self, images, images_seen, progress):
        """Train on images uint8 (B, 3, H, W), after `images_seen` others, `progress` in [0, 1) through the stage.
        Returns a dict of 0-dim tensors:

        l1, psnr (dB, range 0 to 255), codebook and commitment losses, codes_used (share), grad_norm, and with a
        discriminator disc_loss and adversarial_weight. Tensors, not floats: reading one would make a GPU wait.
        """
        self.vqgan.train()
        x = to_float(images)
        # Paper: says nothing of a schedule. Here: constant, then linearly to 0 over the second half.
        for opt in filter(None, (self.opt, self.disc_opt)):
            for group in opt.param_groups:
                group["lr"] = self.lr * min(1.0, 2 * (1 - progress))
        z = self.vqgan.encoder(x)
        if images_seen // self.restart_images != (images_seen - len(x)) // self.restart_images:
            # The first batch too (-len(x) // n is -1): it puts the codes where the encoder's outputs are, so that none
            # starts dead.
            self.vqgan.codebook.restart(z.detach())
        z_q, codebook_loss, commitment_loss = self.vqgan.codebook(z)
        x_hat = self.vqgan.decoder(z_q)
        l1 = F.l1_loss(x_hat, x)
        loss = l1 + codebook_loss + self.commitment * commitment_loss
        log = {"l1": l1.detach(), "psnr": 10 * torch.log10(4 / F.mse_loss(x_hat.detach(), x)),
               "codebook": codebook_loss.detach(), "commitment": commitment_loss.detach(),
               "codes_used": self.vqgan.codebook.used()}
        if self.disc is not None:
            adversarial = -self.disc(x_hat).mean()  # the decoder wants its patches called real
            # As strong as the reconstruction loss where both reach the decoder: the ratio of their gradient norms at
            # its last layer (Esser et al. 2021). It keeps the pair balanced while their scales drift.
            last = self.vqgan.last_weight()
            g_rec, = torch.autograd.grad(l1, last, retain_graph=True)
            g_adv, = torch.autograd.grad(adversarial, last, retain_graph=True)
            weight = self.disc_weight * (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, 1e4).detach()
            loss = loss + weight * adversarial
            log["adversarial_weight"] = weight
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        log["grad_norm"] = nn.utils.clip_grad_norm_(self.vqgan.parameters(), math.inf)  # clips nothing, measures
        self.opt.step()
        if self.disc is not None:
            # Hinge loss: push real patches above +1 and drawn ones below -1, and care for nothing beyond that.
            real, drawn = self.disc(x), self.disc(x_hat.detach())
            disc_loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + drawn).mean())
            self.disc_opt.zero_grad(set_to_none=True)
            disc_loss.backward()
            self.disc_opt.step()
            log["disc_loss"] = disc_loss.detach()
        return log

    @torch.no_grad()
    def finish(self, images):
        """Freeze the VQGAN, set its `latent_std` from images uint8 (n, 3, H, W), and return the mean PSNR in dB, a
        float, of its reconstructions of them."""
        self.vqgan.eval().requires_grad_(False)
        z = torch.cat([self.vqgan.encode(part) for part in images.split(128)])  # (n, Z, h, w)
        self.vqgan.latent_std.mul_(z.std())  # times, not set: a stage 1 taken from another run is scaled already
        drawn = torch.cat([self.vqgan.reconstruct(part) for part in images.split(128)])
        error = (drawn.float() - images.float()).square().mean((1, 2, 3))  # (n,)
        return (10 * torch.log10(255 ** 2 / error)).mean().item()

    def state_dict(self):
        """All that the next step depends on, but for the VQGAN's own weights: discriminator and optimisers."""
        parts = {"opt": self.opt, "disc": self.disc, "disc_opt": self.disc_opt}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state):
        """Take over what `state_dict` returned."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def main():
    """Hand over to train.py: it owns the images, the loop and the checkpoint, and stops after stage 1."""
    train = Path(__file__).with_name("train.py")
    os.execv(sys.executable, [sys.executable, str(train), "--stage1_only", *sys.argv[1:]])


if __name__ == "__main__":
    main()
