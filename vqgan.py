"""Stage 1: a VQ-GAN that turns a 64x64 image into a 3x16x16 latent and back (Table 7, section C.2).

Where it sits: diffusion in pixels is slow, so the paper diffuses in the latent space of this
autoencoder (latent diffusion, LDM, reference 51). It is trained first, alone (`train_stage1` in
train.py), and then frozen. An encoder makes a small map of 3-vectors. A codebook of 2,048 such
vectors replaces each by its nearest entry, which stops the decoder from relying on fine numerical
detail. A decoder draws the image. L1 keeps it faithful, a discriminator keeps it sharp.

The diffusion model works on the encoder's output *before* quantisation: smooth numbers are what
noise can be added to. Decoding quantises first: the decoder has only ever seen codes, and an error
that does not change the nearest code disappears.

    python vqgan.py --dataset shapes3d     # trains stage 1 alone; the same flags as train.py
"""

import math
import runpy
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

def to_float(images):
    """Images uint8 (B, 3, H, W) -> float in [-1, 1], as stage 1 and the extractor read them."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Images float in [-1, 1], values beyond cut off -> uint8 (B, 3, H, W)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

# ---- Building blocks, smallest first -------------------------------------------------------------
def norm_silu(channels, group_channels):
    """GroupNorm and SiLU, before each 3x3 convolution of a ResBlock and the last 3x3 of encoder and
    decoder. LDM has 32 groups, in networks of 128 channels and more. At Table 7's 32 channels, 32
    groups would be of one channel each, and take away its mean, which is what tells a red wall from
    a blue one. So a group has at least `group_channels` channels here, if there are so many."""
    groups = math.gcd(32, channels, max(1, channels // group_channels))  # a divisor: 4 of 32
    return nn.Sequential(nn.GroupNorm(groups, channels, eps=1e-6), nn.SiLU())

class ResBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), a 1x1 convolution on the short path if the width changes."""
    def __init__(self, c_in, c_out, group_channels):
        super().__init__()
        self.branch = nn.Sequential(
            norm_silu(c_in, group_channels),
            nn.Conv2d(c_in, c_out, 3, padding=1),
            norm_silu(c_out, group_channels),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.shortcut(x) + self.branch(x)

class AttentionBlock(nn.Module):
    """One head of self-attention over all positions: where far parts of the image meet."""
    def __init__(self, channels, group_channels):
        super().__init__()
        self.norm = norm_silu(channels, group_channels)[0]  # no SiLU here
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.to_qkv(self.norm(x)).view(B, 3, C, H * W).mT  # (B, 3, H*W, C)
        h = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])  # (B, H*W, C)
        return x + self.to_out(h.mT.reshape(B, C, H, W))

def downsample(channels):
    """Halve height and width by a strided convolution, padded right and below, as LDM does."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))

def upsample(channels):
    """Double height and width: repeat, then convolve (a transposed one leaves a chequerboard)."""
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))

def middle(width, g):
    """The part between encoder levels and latent, and again between latent and decoder levels."""
    return [ResBlock(width, width, g), AttentionBlock(width, g), ResBlock(width, width, g)]

# ---- The codebook --------------------------------------------------------------------------------
class Codebook(nn.Module):
    """K vectors; `forward` replaces each latent vector by its nearest (van den Oord et al. 2017).
    A code that is never nearest gets no gradient, so a codebook easily collapses to a few used
    entries. `restart` cures that: codes that nothing chose since the last one move onto latents."""
    def __init__(self, size, dim):
        super().__init__()
        self.codes = nn.Parameter(torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self.register_buffer("uses", torch.zeros(size))  # times chosen since the last restart

    def forward(self, z):
        """The encoder's z (B, Z, h, w) -> quantised z, likewise, codebook and commitment loss."""
        B, Z, h, w = z.shape
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, Z)  # (B*h*w, Z)
        # Nearest code: |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every code.
        found = (self.codes.square().sum(1) - 2 * flat @ self.codes.T).argmin(dim=1)  # (B*h*w,)
        if torch.is_grad_enabled():  # in a training step, not for a picture between two
            self.uses += torch.bincount(found, minlength=len(self.codes))
        e = self.codes[found].view(B, h, w, Z).permute(0, 3, 1, 2)  # (B, Z, h, w)
        codebook_loss = F.mse_loss(e, z.detach())  # moves the codes towards the encoder
        commitment_loss = F.mse_loss(z, e.detach())  # keeps the encoder near its codes
        # argmin has no gradient of its own: gradients pass straight through to z.
        return z + (e - z).detach(), codebook_loss, commitment_loss

    @torch.no_grad()
    def restart(self, z):
        """Move unused codes (at step 1 all) onto random latents of z (B, Z, h, w); count anew."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B*h*w, Z)
        pick = torch.randint(len(flat), (len(self.codes),), device=z.device)
        unused = self.uses == 0  # (K,)
        self.codes[unused] = flat[pick][unused]
        self.uses.zero_()

# ---- Autoencoder and discriminator ---------------------------------------------------------------
class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Table 7 with the default arguments.
    channels: width after the first convolution.
    multipliers: width of each level, in `channels`; each level but the last halves the size.
    res_blocks: residual blocks per encoder level; decoder levels have one more.
    z_channels: Z, numbers per latent position ("embedding dimensionality").
    codebook_size: K ("number of embeddings").
    patch: fold patch x patch pixels into channels first, unfold them last (paper: 1, no folding).
        Convolutions at full resolution are most of a small VQ-GAN's cost.
    group_channels: least channels in a group of GroupNorm (see norm_silu; LDM: 1)."""
    def __init__(self, channels=32, multipliers=(1, 2, 4), res_blocks=2, z_channels=3,
                 codebook_size=2048, patch=1, group_channels=8):
        super().__init__()
        self.z_channels = z_channels
        side = 64 // patch // 2 ** (len(multipliers) - 1)
        self.latent_shape = (z_channels, side, side)  # of a 64x64 image
        widths = [channels * m for m in multipliers]
        g = group_channels
        pixels = 3 * patch ** 2  # channels of a folded image
        encoder = [nn.PixelUnshuffle(patch), nn.Conv2d(pixels, channels, 3, padding=1)]
        width = channels
        for level, level_width in enumerate(widths):
            for _ in range(res_blocks):
                encoder.append(ResBlock(width, level_width, g))
                width = level_width
            if level < len(widths) - 1:
                encoder.append(downsample(width))
        self.encoder = nn.Sequential(
            *encoder,
            *middle(width, g),
            norm_silu(width, g),
            nn.Conv2d(width, z_channels, 3, padding=1),
            nn.Conv2d(z_channels, z_channels, 1),
        )
        self.codebook = Codebook(codebook_size, z_channels)
        decoder = [
            nn.Conv2d(z_channels, z_channels, 1),
            nn.Conv2d(z_channels, width, 3, padding=1),
            *middle(width, g),
        ]
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(res_blocks + 1):
                decoder.append(ResBlock(width, level_width, g))
                width = level_width
            if level > 0:
                decoder.append(upsample(width))
        self.decoder = nn.Sequential(
            *decoder,
            norm_silu(width, g),
            nn.Conv2d(width, pixels, 3, padding=1),
            nn.PixelShuffle(patch),
        )
        # Diffusion assumes data of about unit variance. So latents are divided by their standard
        # deviation over images, positions and channels (LDM's scale_by_std), see finish().
        self.register_buffer("latent_std", torch.ones(()))

    @torch.no_grad()
    def encode(self, images):
        """Images uint8 (B, 3, H, W) -> latents z0 (B, Z, h, w), scaled, not quantised."""
        return self.encoder(to_float(images)).float() / self.latent_std

    @torch.no_grad()
    def decode(self, z):
        """Scaled latents (B, Z, h, w) -> images uint8 (B, 3, H, W); quantises on the way."""
        z_q, _, _ = self.codebook(z * self.latent_std)
        return to_uint8(self.decoder(z_q))

    def reconstruct(self, images):
        """There and back: uint8 (B, 3, H, W) -> same. The best that a sample can look."""
        return self.decode(self.encode(images))

    def finish(self, images):
        """End stage 1: measure latent_std on images uint8 (n, 3, H, W) -> their PSNR in dB."""
        z = torch.cat([self.encode(x) for x in images.split(128)])  # (n, Z, h, w)
        self.latent_std.mul_(z.std())  # z is already divided by the old one
        drawn = torch.cat([self.reconstruct(x) for x in images.split(128)])  # (n, 3, H, W)
        return psnr(images, drawn)

class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches as real or drawn: (B, 3, 64, 64) -> logits (B, 1, 6, 6)."""
    def __init__(self, width=64):
        layers = [
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False),
                       nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
            width = 2 * width
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))

# ---- Losses --------------------------------------------------------------------------------------
# LDM, and the paper's released configuration, add a perceptual loss (LPIPS), whose VGG weights are
# a download. The paper's Table 7 has none, and this code downloads nothing: it is left out.

def stage1_losses(vqgan, disc, x, kind, disc_weight, commitment=0.25):
    """Losses on images x float (B, 3, H, W) in [-1, 1] -> (the VQ-GAN's loss, a dict for the log).
    kind: "l1", LDM's, or "mse", four times the squared error (about as large as L1 early on), which
    counts most the few pixels that are far off, those at edges. disc: a PatchDiscriminator, or
    None; disc_weight: of its judgement, commitment: of the loss of that name. The dict has 0-dim
    tensors; disc_loss, if any, trains the discriminator."""
    z_q, codebook_loss, commitment_loss = vqgan.codebook(vqgan.encoder(x))
    x_hat = vqgan.decoder(z_q)  # (B, 3, H, W)
    mse = F.mse_loss(x_hat, x)
    reconstruction = 4 * mse if kind == "mse" else F.l1_loss(x_hat, x)
    loss = reconstruction + codebook_loss + commitment * commitment_loss
    row = {"psnr": 10 * torch.log10(4 / mse),  # of the whole batch; values are 2 apart at most
           "codes_used": (vqgan.codebook.uses > 0).float().mean()}  # since the last restart
    if disc:
        adversarial = -disc(x_hat).mean()  # the decoder wants its patches called real
        # Scaled so that, at the decoder's last convolution, its gradient is disc_weight times the
        # reconstruction loss's (Esser et al. 2021). Why there? On to earlier layers both gradients
        # take the same way, so their ratio stays alike, and one small layer is cheap.
        last = vqgan.decoder[-2].weight
        g_reconstruction, = torch.autograd.grad(reconstruction, last, retain_graph=True)
        g_adversarial, = torch.autograd.grad(adversarial, last, retain_graph=True)
        ratio = g_reconstruction.norm() / (g_adversarial.norm() + 1e-4)
        weight = disc_weight * ratio.clamp(max=1e4)
        loss = loss + weight * adversarial
        row["adversarial_weight"] = weight
        # Hinge loss: push real patches above +1, drawn ones below -1, and no further.
        real, drawn = disc(x), disc(x_hat.detach())
        row["disc_loss"] = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + drawn).mean())
    return loss, row

def psnr(images, drawn):
    """Mean over images uint8 (B, 3, H, W) of 10 log10(255^2 / mean squared error), in dB."""
    error = (drawn.float() - images.float()).square().mean((1, 2, 3))  # (B,)
    return (10 * torch.log10(255 ** 2 / error)).mean().item()

def main():
    """Hand over to train.py, which owns the images, the loop and the checkpoint."""
    sys.argv.insert(1, "--stage1_only")
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")

if __name__ == "__main__":
    main()
