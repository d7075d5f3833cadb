"""The denoiser and its diffusion: U-Net with cross-attention to the latent units, skip dropout, schedule, DDIM, EMA.

Where it sits: stage 1 (vqgan.py) turned an image into a small latent z0; the extractor turned the same image into N
latent units c, which alignment (dyga.py) turns into c~. Diffusion drowns z0 in noise and this network must say what
the noise was, given the units:

    z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) eps          eps^ = UNet(z_t, t, c~)         (equations 1 and 2)

The units enter at one kind of place only, as keys and values of cross-attention. What the noisy latent already shows,
the network can copy through its skip connections without asking the units; *skip dropout* (section 3.3, equation 7)
blinds part of those skips while training, so that the units have to carry the image, and learn to.

    python unet.py     # builds the paper-size network (37.550M parameters) and prints the shape at every level
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------------------------------
# The noise schedule, and time


def alpha_bar_schedule(timesteps=1000, beta_start=0.0015, beta_end=0.0155):
    """alpha_bar_t = prod_{s<=t} (1 - beta_s) for t = 0 ... timesteps-1, float32 (timesteps,), from 0.9985 to 0.0007.

    Paper: Table 8 says "Linear". In the latent diffusion code that it builds on, that name means linear in
    sqrt(beta), which adds noise more gently at first than a straight line in beta; the end points are that code's.
    """
    betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, timesteps, dtype=torch.float64) ** 2
    # float64 while multiplying: 1,000 float32 products would lose the last digits of the smallest alpha_bar.
    return torch.cumprod(1 - betas, dim=0).float()


def add_noise(z0, eps, t, alpha_bar):
    """Forward process in one jump: z_t ~ q(z_t | z_0) for latents z0 and noise eps (B, Z, h, w), and t int64 (B,)."""
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * eps


def time_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000: int64 (B,) -> float (B, dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs[None]  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks, smallest first


def zero(module):
    """Start a layer at zero: its residual branch then adds nothing at first, which steadies early training."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def drop_channels(x, rate, training):
    """Zero whole channels of x (B, C, h, w), each with probability `rate` (1 - p in equation 7); divide the rest by p.

    Whole channels, because neighbouring pixels of one channel nearly repeat each other: dropping single pixels would
    hide almost nothing.
    Paper: equation 7 multiplies by the Bernoulli mask alone. We rescale as its released code does, so that the
    expected value is the same with and without dropout and nothing shifts at test time.
    """
    if not training or rate == 0:
        return x
    keep = torch.rand(x.shape[:2], device=x.device) >= rate  # (B, C)
    return x * (keep.to(x.dtype) / (1 - rate))[:, :, None, None]


class ResBlock(nn.Module):
    """Residual block that knows the time: norm, SiLU, conv, norm, scale and shift by time, SiLU, dropout, conv.

    `resample` is None, "down" (average 2x2) or "up" (repeat 2x2), before the first conv and on the other branch too:
    LDM's `resblock_updown`.
    """

    def __init__(self, c_in, c_out, time_dim, groups, dropout, resample=None):
        super().__init__()
        self.resample = resample
        self.norm_in = nn.GroupNorm(groups, c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm_out = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def _resize(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x, time, context, maps):
        """x (B, C, H, W), time (B, T) -> (B, C', H', W'). `context` and `maps` pass by: all blocks are called
        alike (see Blocks)."""
        h = self.conv_in(self._resize(F.silu(self.norm_in(x))))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)  # two of (B, C', 1, 1)
        h = self.norm_out(h) * (1 + scale) + shift
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.shortcut(self._resize(x)) + h


class Attention(nn.Module):
    """Multi-head attention of x (B, L, C) to itself, or to a context (B, N, D): there the N latent units come in."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be split over {heads} attention heads")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)  # keys and values as one product
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context=None, maps=None):
        """-> (B, L, C). If `maps` is a list, append the attention (B, L, N), averaged over heads: rows sum to 1."""
        B, L, C = x.shape
        context = x if context is None else context
        N = context.shape[1]
        q = self.to_q(x).view(B, L, self.heads, C // self.heads).transpose(1, 2)  # (B, heads, L, C/heads)
        kv = self.to_kv(context).view(B, N, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # two of (B, heads, N, C/heads)
        if maps is None and (x.is_cuda or N > 64):
            out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, C/heads)
        else:
            # The same, spelled out: the fused kernel never forms the map that one may want to look at, and for as few
            # columns as there are units it is the slower one on a CPU (20 units, forward and backward on one thread:
            # 2.3 ms against 1.9 at the laptop preset's first level, batch 64; 10.7 against 7.4 at the paper's, 16).
            attention = (q @ k.transpose(2, 3) * (C // self.heads) ** -0.5).softmax(dim=-1)  # (B, heads, L, N)
            if maps is not None:
                maps.append(attention.mean(dim=1))  # (B, L, N)
            out = attention @ v  # (B, heads, L, C/heads)
        return self.to_out(out.transpose(1, 2).reshape(B, L, C))  # (B, L, C)


class Transformer(nn.Module):
    """Self-attention among positions, cross-attention to the latent units, then a GEGLU feed-forward; all residual."""

    def __init__(self, dim, context_dim, groups, heads, self_attention=True):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)  # LDM's 1x1 convolution; as a product of tokens twice as fast on a CPU
        if self_attention:
            self.norm_self = nn.LayerNorm(dim)
            self.self_attention = Attention(dim, dim, heads)
        else:
            self.self_attention = None
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, context_dim, heads)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, 8 * dim)  # half of it values, half of it gates
        self.ff_out = nn.Linear(4 * dim, dim)
        self.proj_out = zero(nn.Linear(dim, dim))

    def forward(self, x, time, context, maps):
        """x (B, C, H, W), context c (B, N, D) -> (B, C, H, W). If `maps` is a list, append a map (B, N, H, W).
        `time` passes by."""
        B, C, H, W = x.shape
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, H*W, C): every pixel is a token
        if self.self_attention is not None:
            h = h + self.self_attention(self.norm_self(h))
        found = None if maps is None else []
        h = h + self.cross_attention(self.norm_cross(h), context, found)
        if maps is not None:
            maps.append(found[0].transpose(1, 2).unflatten(2, (H, W)))  # (B, H*W, N) -> (B, N, H, W)
        # Two products with half of ff_in each, not one whose result is cut in two: what follows then works on whole
        # tensors, and the gradient of the cut, a copy of both halves, falls away. With the Linear proj_in and proj_out,
        # 6% of forward and backward of a laptop step.
        weights, biases, tokens = self.ff_in.weight.chunk(2), self.ff_in.bias.chunk(2), self.norm_ff(h)
        value, gate = (F.linear(tokens, w, b) for w, b in zip(weights, biases))  # two of (B, H*W, 4C)
        h = self.proj_out(h + self.ff_out(value * F.gelu(gate)))  # (B, H*W, C)
        return x + h.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W)


class Blocks(nn.ModuleList):
    """A few blocks in a row, each called with the same time, units and list of maps."""

    def forward(self, x, time, context, maps):
        for block in self:
            x = block(x, time, context, maps)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# The U-Net


class UNet(nn.Module):
    """LDM's denoising U-Net. Table 8 with the default arguments.

    Args:
        channels: of the latent (3).
        base: width of the first level.
        multipliers: width of each level as a multiple of `base`; every level but the last halves the size.
        res_blocks: residual blocks per level on the way down; one more on the way up.
        attention_at: downsampling factors (1 = full latent size) whose blocks are followed by a Transformer. The middle
            of the network always has one.
        heads: attention heads.
        groups: of every GroupNorm, LDM's 32; must divide every width.
        context_dim: D, the length of a latent unit.
        dropout: ordinary dropout inside the residual blocks.
        skip_dropout: probability that a channel of a skip connection is dropped (1 - p in equation 7).
        skip_dropout_where: which skips. "text": the paper's words, "resolutions where conditions are not injected
            through cross attention": with Table 8, the skips at 2x2 only. "released": what made the paper's tables.
            Its code asks whether the feature's SIDE in pixels (16, 8, 4, 2) is in the list of FACTORS [1, 2, 4], and
            drops where it is not: at 16x16 and 8x8, where conditions are injected. We follow the tables.
        backbone_dropout: Table 12's control: drop channels of the backbone at those places instead.
        self_attention: False leaves out the self-attention of every Transformer (not the cross-attention).
    """

    def __init__(self, channels=3, base=64, multipliers=(1, 2, 4, 4), res_blocks=2, attention_at=(1, 2, 4), heads=8,
                 groups=32, context_dim=32, dropout=0.1, skip_dropout=0.2, skip_dropout_where="released",
                 backbone_dropout=0.0, self_attention=True):
        super().__init__()
        if skip_dropout_where not in ("released", "text"):
            raise ValueError(f"skip_dropout_where is {skip_dropout_where!r}; it must be 'released' or 'text'")
        if not 0 <= min(skip_dropout, backbone_dropout) <= max(skip_dropout, backbone_dropout) < 1:
            raise ValueError(f"skip_dropout {skip_dropout}, backbone_dropout {backbone_dropout}: must be in [0, 1)")
        self.base, self.attention_at = base, tuple(attention_at)
        self.skip_dropout, self.backbone_dropout = skip_dropout, backbone_dropout
        self.skip_dropout_where = skip_dropout_where
        time_dim = 4 * base
        self.time_mlp = nn.Sequential(nn.Linear(base, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, time_dim, groups, dropout, resample)

        def transformer(width):
            return Transformer(width, context_dim, groups, heads, self_attention)

        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, factor, skip_widths = base, 1, [base]  # the first skip is conv_in's output
        for level, multiplier in enumerate(multipliers):
            for _ in range(res_blocks):
                blocks = [res(width, base * multiplier)]
                width = base * multiplier
                if factor in attention_at:
                    blocks.append(transformer(width))
                self.down.append(Blocks(blocks))
                skip_widths.append(width)
            if level < len(multipliers) - 1:
                self.down.append(Blocks([res(width, width, "down")]))
                skip_widths.append(width)
                factor *= 2
        self.middle = Blocks([res(width, width), transformer(width), res(width, width)])
        self.up_factors = []  # the downsampling factor at which each up stage takes its skip
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(res_blocks + 1):
                blocks = [res(width + skip_widths.pop(), base * multiplier)]
                width = base * multiplier
                if factor in attention_at:
                    blocks.append(transformer(width))
                self.up_factors.append(factor)
                if level > 0 and i == res_blocks:
                    blocks.append(res(width, width, "up"))
                    factor //= 2
                self.up.append(Blocks(blocks))
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = zero(nn.Conv2d(width, channels, 3, padding=1))

    def drops_skips(self, factor, side):
        """Does skip dropout act where the features are side x side pixels, `factor` times downsampled?"""
        return (factor if self.skip_dropout_where == "text" else side) not in self.attention_at

    def forward(self, z_t, t, context, maps=None):
        """Noisy latents z_t (B, Z, h, w), times t int64 (B,), latent units c~ (B, N, D) -> noise eps^ (B, Z, h, w).

        `maps`: pass an empty list to receive the cross-attention of every Transformer, each (B, N, h, w),
        averaged over heads, summing to 1 over N. That is the slow path; leave it None to train and sample.
        """
        time = self.time_mlp(time_embedding(t, self.base).to(z_t.dtype))  # (B, 4*base)
        h = self.conv_in(z_t)  # (B, base, h, w)
        skips = [h]
        for stage in self.down:
            h = stage(h, time, context, maps)
            skips.append(h)
        h = self.middle(h, time, context, maps)
        for stage, factor in zip(self.up, self.up_factors):
            skip = skips.pop()
            if self.drops_skips(factor, h.shape[-1]):
                skip = drop_channels(skip, self.skip_dropout, self.training)
                h = drop_channels(h, self.backbone_dropout, self.training)
            h = stage(torch.cat([h, skip], dim=1), time, context, maps)
        return self.conv_out(F.silu(self.norm_out(h)))


# ----------------------------------------------------------------------------------------------------------------------
# Training loss, optimiser, sampling, averaging


def diffusion_loss(unet, z0, context, alpha_bar, kind="l1", t_sampling="uniform"):
    """Equation 2: drown latents z0 (B, Z, h, w) in noise at a random time each, and score the U-Net's guess of it under
    the aligned units c~ (B, N, D), the `context`.

    kind: "l1" or "mse". Paper: equation 2 writes a norm without a square or a name; its released configuration says l1
    (neither says why; in a prototype mse learnt an object's shape and size earlier).
    t_sampling: "uniform", or "logit_normal", which prefers the middle of the schedule: near t = 0 the noisy latent
    shows everything and near T almost nothing can be told, so the units learn most in between.
    """
    B, T = len(z0), len(alpha_bar)
    if t_sampling == "uniform":
        t = torch.randint(T, (B,), device=z0.device)
    else:
        t = (torch.randn(B, device=z0.device).sigmoid() * T).long().clamp(max=T - 1)
    eps = torch.randn_like(z0)
    eps_hat = unet(add_noise(z0, eps, t, alpha_bar), t, context)
    return F.l1_loss(eps_hat, eps) if kind == "l1" else F.mse_loss(eps_hat, eps)


def orthogonalise(x, steps=5):
    """Matrices x (B, m, n) -> nearly orthogonal ones with the same singular vectors: all singular values near 1.

    An odd polynomial of a matrix acts on its singular values s alone: P X with P = a + b XX' + c (XX')^2 turns each
    into a s + b s^3 + c s^5. With these coefficients five rounds lift all but the tiniest into 0.7 to 1.2. That takes
    matrix products only, all matrices of a shape as one batch; a singular value decomposition would take far longer.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, steps).mT  # XX' is then the smaller product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    # A round needs XX' alone, (B, m, m), and turns it into P XX' P: so the rounds' product is made of small matrices,
    # and X, often many times as wide as high, is multiplied once, at the end.
    for step in range(steps):
        gram = p @ gram @ p if step else x @ x.mT  # (B, m, m)
        p = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        p.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = p @ product if step else p
    return product @ x


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for weight matrices, and its base class AdamW for biases and norms.

    Muon averages gradients, as momentum does, then makes the average orthogonal: every direction in which a layer can
    learn gets a step of the same size, while AdamW's steps follow the few directions of large gradients. Small but
    telling ones, such as those of an object's shape beside the hues', are learnt early that way. A convolution (out,
    in, k, k) is a matrix (out, in*k*k); UnitLinear's (N, in, out) are N matrices, and so are its biases. Steps are
    scaled to the usual size of AdamW's (Liu et al. 2025), so that one `lr` serves both. A group of parameters with
    orthogonalise=False is AdamW's too. Weight decay is for AdamW's parameters only: a step of Muon has a size of its
    own.

    Paper: does not name its optimiser; the code that it builds on has AdamW, and so has the paper preset here.
    """

    @torch.no_grad()
    def step(self):
        same_shape = {}  # (m, n) -> list of (parameter, its gradient, lr, its update as matrices)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2 or p.grad is None or not group.get("orthogonalise", True):
                    continue  # AdamW's
                state = self.state[p]
                if not state:  # AdamW's names: it reads them when a checkpoint is loaded
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
                momentum = state["exp_avg"].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)  # Nesterov's form of momentum
                update = update if p.ndim == 3 else update.flatten(1)[None]  # (B, m, n)
                same_shape.setdefault(update.shape[1:], []).append((p, p.grad, group["lr"], update))
                p.grad = None  # AdamW passes over what has no gradient
        super().step()
        for (m, n), found in same_shape.items():
            updates = orthogonalise(torch.cat([update for *_, update in found]))  # (sum of the B, m, n)
            for (p, gradient, lr, _), update in zip(found, updates.split([len(update) for *_, update in found])):
                p.sub_(update.reshape(p.shape), alpha=0.2 * lr * max(m, n) ** 0.5)
                p.grad = gradient


@torch.no_grad()
def ddim(unet, noise, context, alpha_bar, steps=100, attention=False):
    """Deterministic DDIM sampling (eta = 0) of latents from noise (B, Z, h, w) under units c~ (B, N, D).

    Each step asks the U-Net for the noise, computes the clean latent that this implies, and goes to an earlier time
    with the same noise: the same `noise` and units always give the same latent.
    Returns latents (B, Z, h, w). With attention=True: (latents, maps (B, N, h, w)), the cross-attention averaged over
    heads, layers and steps after resizing each map to the latent's size (the way of DAAM, reference 60).
    Raises ValueError if steps is not between 1 and the schedule's length.
    """
    if not 1 <= steps <= len(alpha_bar):
        raise ValueError(f"{steps} DDIM steps: there must be at least 1 and at most {len(alpha_bar)}")
    times = torch.linspace(len(alpha_bar) - 1, 0, steps).round().long().tolist()  # evenly spaced, noisiest first
    ones = torch.ones(len(noise), dtype=torch.long, device=noise.device)
    z_t, total, layers = noise, 0.0, 0
    for t, t_next in zip(times, times[1:] + [None]):
        maps = [] if attention else None
        eps_hat = unet(z_t, ones * t, context, maps)
        a = alpha_bar[t]
        a_next = torch.ones_like(a) if t_next is None else alpha_bar[t_next]
        z0_hat = (z_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
        z_t = a_next.sqrt() * z0_hat + (1 - a_next).sqrt() * eps_hat
        for m in maps or []:
            total = total + F.interpolate(m, size=z_t.shape[-2:], mode="bilinear")
            layers += 1
    return (z_t, total / layers) if attention else z_t


@torch.no_grad()
def ema_update(average, module, half_life, batch, images_seen):
    """Move `average`, a copy of `module`, towards it: one step of an exponential moving average counted in images.

    `half_life` is the number of training images after which a weight's influence has halved. Counted so, the batch
    size may change without changing what is averaged. The paper's 0.9999 per step of 512 images is a half-life of
    512 ln 2 / 0.0001 = 3.55 million images. Early on the half-life is at most 8% of the images seen so far, or the
    random start would stay in the average for long (LDM's warm-up (1 + n)/(10 + n) comes to about the same).
    """
    weight = 1 - 0.5 ** (batch / min(half_life, 0.08 * images_seen))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), weight)
    for mean, new in zip(average.buffers(), module.buffers()):
        if mean.is_floating_point():
            mean.lerp_(new, weight)  # BatchNorm's running statistics: averaged like the weights that they belong to
        else:
            mean.copy_(new)  # counters


def main():
    """Build the paper-size U-Net, run one batch and print what happens at every level."""
    net = UNet()
    z_t, context = torch.randn(2, 3, 16, 16), torch.randn(2, 20, 32)
    print(f"parameters {sum(p.numel() for p in net.parameters()) / 1e6:.3f}M (Table 8: 37.550M)")
    print("  skips enter at    " + ", ".join(f"{16 // f}x{16 // f}" for f in net.up_factors))
    for where in ("released", "text"):
        net.skip_dropout_where = where
        dropped = sorted({16 // f for f in net.up_factors if net.drops_skips(f, 16 // f)}, reverse=True)
        print(f"  dropped, {where:8}: where the features are {dropped} pixels wide")
    maps = []
    eps_hat = net(z_t, torch.tensor([10, 900]), context, maps)
    print(f"z_t {tuple(z_t.shape)}, context {tuple(context.shape)} -> eps^ {tuple(eps_hat.shape)}")
    print("  cross-attention   " + ", ".join(f"{m.shape[-1]}x{m.shape[-1]}" for m in maps))


if __name__ == "__main__":
    main()
