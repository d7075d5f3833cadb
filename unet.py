"""The denoiser and its diffusion: U-Net with cross-attention to the units, skip dropout, DDIM, EMA.

Where it sits: stage 1 (vqgan.py) turned an image into a small latent z0. The extractor turned the
same image into N latent units c, which alignment (dyga.py) turns into c~ (c_tilde). Diffusion
drowns z0 in noise, and this network must say what the noise was, given the units:

    z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) eps          (all steps of equation 1)
    eps^ = UNet(z_t, t, c~)                          (its distance from eps: equation 2)

Table 8's U-Net on a latent of 16x16. () is a ResBlock, (+) one with a Transformer, where each pixel
looks up the units. Not drawn: ResBlocks that halve or double the size. Each block on the way up
takes a skip, the last one first: a level's input on the way down, or the output of its blocks.

    z_t -> conv -> 16x16 (+)(+) --.                              .-> 16x16 (+)(+)(+) -> conv -> eps^
                       8x8 (+)(+) --.        skips             .-> 8x8 (+)(+)(+)
                         4x4 (+)(+) --. ---------------------> 4x4 (+)(+)(+)
                            2x2 ()() --> middle (+) () -----> 2x2 ()()()

The units enter by cross-attention only. But what the noisy latent already shows, the network can
copy through its skips without asking the units. *Skip dropout* (section 3.3, equation 7) blinds
part of the skips while training, so that the units have to carry the image, and learn to.

    python unet.py     # builds the paper-size network (37.550M parameters), prints what is where
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- The noise schedule, and time ----------------------------------------------------------------
def alpha_bar_schedule(timesteps=1000, beta_start=0.0015, beta_end=0.0155):
    """alpha_bar_t = prod_{s<=t} (1 - beta_s), float32 (timesteps,), falling from 0.9985 to 0.0007.
    Paper: Table 8 says "Linear". In the latent diffusion code that it builds on, that name means
    linear in sqrt(beta), which adds noise more gently at first; the end points are that code's."""
    betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()  # float64 until here: else 1,000 roundings

def add_noise(z0, eps, t, alpha_bar):
    """All steps of equation 1: z0 and eps (B, Z, h, w), times t int64 (B,) -> z_t (B, Z, h, w)."""
    a = alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * eps

def time_embedding(t, dim):
    """Cosines and sines of t at dim/2 frequencies from 1 to almost 1/10000: (B,) -> (B, dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)

# ---- Building blocks, smallest first -------------------------------------------------------------
def zero(module):
    """Start a layer at 0: a residual branch adds nothing at first, which steadies training."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module

def drop_channels(x, rate, training):
    """Zero whole channels of x (B, C, h, w), each with probability `rate` (1 - p in equation 7).
    Dropping single pixels would hide almost nothing: their neighbours nearly repeat them.
    Paper: equation 7 multiplies by the Bernoulli mask alone. We also divide by p, as the released
    code does, so that the expected value is the same in training and at test time."""
    if not training or rate == 0:
        return x
    keep = torch.rand(x.shape[:2], device=x.device) >= rate  # (B, C)
    return x * keep[:, :, None, None] / (1 - rate)

class ResBlock(nn.Module):
    """Norm, SiLU, resize, conv, then norm, scale and shift by time, SiLU, dropout, conv; residual.
    resize: a module that halves or doubles the size, on both branches (LDM's `resblock_updown`)."""
    def __init__(self, c_in, c_out, time_dim, groups, dropout, resize=None):
        super().__init__()
        self.resize = resize or nn.Identity()
        self.norm_in = nn.GroupNorm(groups, c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm_out = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time, c_tilde, maps):
        """x (B, C, H, W), time (B, 4*base) -> (B, C', H', W'); c_tilde, maps: unused (Blocks)."""
        h = self.conv_in(self.resize(F.silu(self.norm_in(x))))  # (B, C', H', W')
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)  # (B, C', 1, 1)
        h = self.norm_out(h) * (1 + scale) + shift
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.shortcut(self.resize(x)) + h

class Attention(nn.Module):
    """Multi-head attention of tokens x (B, L, C) to a context (B, N, D): x itself, or the units."""
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim, bias=False)  # keys, then values
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context, maps=None):
        """-> (B, L, C). maps: a list receives the attention (B, L, N), averaged over heads."""
        q = self.to_q(x)  # (B, L, C)
        k, v = self.to_kv(context).chunk(2, dim=-1)  # (B, N, C) each
        split = [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v)]
        q, k, v = split  # (B, heads, L, C/heads), and N in place of L for k and v
        if maps is None:
            out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, C/heads)
        else:  # the same spelled out, because the fused kernel never forms the map
            attention = q @ k.mT / math.sqrt(q.shape[-1])  # (B, heads, L, N)
            attention = attention.softmax(dim=-1)
            maps.append(attention.mean(dim=1))  # (B, L, N), each row sums to 1
            out = attention @ v  # (B, heads, L, C/heads)
        out = out.transpose(1, 2).flatten(2)  # (B, L, C)
        return self.to_out(out)

class Transformer(nn.Module):
    """Self-attention of pixels, cross-attention to the units, GEGLU feed-forward; all residual."""
    def __init__(self, dim, context_dim, groups, heads, self_attention=True):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.self_attention = None
        if self_attention:
            self.norm_self = nn.LayerNorm(dim)
            self.self_attention = Attention(dim, dim, heads)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, context_dim, heads)
        self.norm_ff = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, 8 * dim)  # values, then gates
        self.ff_out = nn.Linear(4 * dim, dim)
        self.proj_out = zero(nn.Linear(dim, dim))

    def forward(self, x, time, c_tilde, maps):
        """x (B, C, H, W), units c_tilde (B, N, D) -> (B, C, H, W); time: unused (see Blocks)."""
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).mT  # (B, H*W, C): every pixel is a token
        h = self.proj_in(h)
        if self.self_attention:
            tokens = self.norm_self(h)
            h = h + self.self_attention(tokens, tokens)
        h = h + self.cross_attention(self.norm_cross(h), c_tilde, maps)
        value, gate = self.ff_in(self.norm_ff(h)).chunk(2, dim=-1)  # (B, H*W, 4C) each
        h = self.proj_out(h + self.ff_out(value * F.gelu(gate)))  # (B, H*W, C)
        return x + h.mT.view(B, C, H, W)

class Blocks(nn.ModuleList):
    """Blocks in a row. All are called alike, and each takes what it needs of time and units."""
    def forward(self, x, time, c_tilde, maps):
        for block in self:
            x = block(x, time, c_tilde, maps)
        return x

# ---- The U-Net -----------------------------------------------------------------------------------
class UNet(nn.Module):
    """LDM's denoising U-Net. Table 8 with the default arguments.
    channels: Z, of the latent. context_dim: D, of a unit.
    base: width of the first level; a multiple of `groups` and of `heads`.
    multipliers: width of each level, in `base`; each level but the last halves the size.
    res_blocks: residual blocks per level on the way down; one more on the way up.
    attention_at: downsampling factors (1: full size) that have Transformers; the middle always.
    heads: attention heads; must divide every width that has a Transformer.
    groups, dropout: of every GroupNorm; inside the residual blocks.
    skip_dropout: probability that a channel of a skip is dropped (1 - p in equation 7).
    skip_dropout_where: which skips. "text": the paper's words, "resolutions where conditions are
        not injected through cross attention": with Table 8, 2x2 (though the middle has one there).
        "released": what made the paper's tables. Its code drops where the feature's SIDE in pixels
        (16, 8, 4, 2) is not in the list of FACTORS [1, 2, 4], likely a slip: at 16x16 and 8x8,
        where conditions ARE injected. We copy it; in the laptop preset it drops at all skips.
    backbone_dropout: Table 12's control: drop channels of the backbone at those places.
    self_attention: False leaves out the Transformers' self-attention."""
    def __init__(self, channels=3, base=64, multipliers=(1, 2, 4, 4), res_blocks=2,
                 attention_at=(1, 2, 4), heads=8, groups=32, context_dim=32, dropout=0.1,
                 skip_dropout=0.2, skip_dropout_where="released", backbone_dropout=0.0,
                 self_attention=True):
        super().__init__()
        self.base = base
        self.attention_at = attention_at
        self.skip_dropout = skip_dropout
        self.skip_dropout_where = skip_dropout_where
        self.backbone_dropout = backbone_dropout
        time_dim = 4 * base
        self.time_mlp = nn.Sequential(
            nn.Linear(base, time_dim),
            nn.SiLU(),
            nn.Linear(time_dim, time_dim),
        )
        def res(c_in, c_out, resize=None):
            return ResBlock(c_in, c_out, time_dim, groups, dropout, resize)
        def stage(c_in, c_out, attention):  # (+) in the drawing above; () without attention
            blocks = Blocks([res(c_in, c_out)])
            if attention:
                blocks.append(Transformer(c_out, context_dim, groups, heads, self_attention))
            return blocks

        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        width = base
        factor = 1
        skip_widths = [base]  # the first skip is conv_in's output
        for level, multiplier in enumerate(multipliers):
            for _ in range(res_blocks):
                self.down.append(stage(width, base * multiplier, factor in attention_at))
                width = base * multiplier
                skip_widths.append(width)
            if level < len(multipliers) - 1:
                self.down.append(Blocks([res(width, width, nn.AvgPool2d(2))]))
                skip_widths.append(width)
                factor *= 2

        self.middle = stage(width, width, attention=True)
        self.middle.append(res(width, width))

        self.up_factors = []  # the downsampling factor at which each up stage takes its skip
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(res_blocks + 1):
                c_in = width + skip_widths.pop()
                width = base * multiplier
                self.up.append(stage(c_in, width, factor in attention_at))
                self.up_factors.append(factor)
                if level > 0 and i == res_blocks:
                    self.up[-1].append(res(width, width, nn.Upsample(scale_factor=2)))
                    factor //= 2
        self.norm_out = nn.GroupNorm(groups, width)
        self.conv_out = zero(nn.Conv2d(width, channels, 3, padding=1))

    def drops_skips(self, factor, side):
        """Does skip dropout act at this level? factor: its downsampling; side: in pixels."""
        if self.skip_dropout_where == "text":
            return factor not in self.attention_at
        return side not in self.attention_at  # compares pixels with factors, as released

    def forward(self, z_t, t, c_tilde, maps=None):
        """z_t (B, Z, h, w), times t int64 (B,), units c_tilde (B, N, D) -> eps_hat (B, Z, h, w).
        maps: an empty list receives the cross-attention of every Transformer, each (B, H*W, N),
        averaged over heads, summing to 1 over N. A slow path: leave it None to train and sample."""
        time = self.time_mlp(time_embedding(t, self.base))  # (B, 4*base)
        h = self.conv_in(z_t)  # (B, base, h, w)
        skips = [h]
        for stage in self.down:
            h = stage(h, time, c_tilde, maps)
            skips.append(h)
        h = self.middle(h, time, c_tilde, maps)
        for stage, factor in zip(self.up, self.up_factors):
            skip = skips.pop()
            if self.drops_skips(factor, h.shape[-1]):
                skip = drop_channels(skip, self.skip_dropout, self.training)
                h = drop_channels(h, self.backbone_dropout, self.training)
            h = stage(torch.cat([h, skip], dim=1), time, c_tilde, maps)
        h = F.silu(self.norm_out(h))
        return self.conv_out(h)  # (B, Z, h, w)

# ---- Training loss, sampling, averaging ----------------------------------------------------------
def diffusion_loss(unet, z0, c_tilde, alpha_bar, kind="l1", t_sampling="uniform", v_weight=0.0):
    """Equation 2: latents z0 (B, Z, h, w), units c_tilde (B, N, D) -> loss of the U-Net's guess.
    kind: "l1" or "mse". Paper: equation 2 names no norm; the released configuration says l1.
    t_sampling: "uniform", or "logit_normal", which prefers the middle of the schedule: near t = 0
    the noisy latent shows everything, near T next to nothing.
    v_weight: the error at time t counts alpha_bar_t ** -v_weight times: equation 2's eta_t, which
    the paper leaves open (0 here: always 1). With 1 and mse it is the error of v = sqrt(alpha_bar)
    eps - sqrt(1 - alpha_bar) z0 (Salimans & Ho 2022), as v_hat - v = (eps_hat - eps) /
    sqrt(alpha_bar). Why: where z_t is mostly noise, only the units can say WHICH hue it is. But
    there eps is easy to guess, its error small, and counts little without such a weight. (train.py
    lets v_weight grow, so its losses early and late are not comparable.)"""
    B, T = len(z0), len(alpha_bar)
    if t_sampling == "uniform":
        t = torch.randint(T, (B,), device=z0.device)
    else:
        t = (torch.randn(B, device=z0.device).sigmoid() * T).long().clamp(max=T - 1)
    eps = torch.randn_like(z0)
    error = unet(add_noise(z0, eps, t, alpha_bar), t, c_tilde) - eps  # (B, Z, h, w)
    error = error.abs() if kind == "l1" else error.square()
    return (alpha_bar[t] ** -v_weight * error.mean((1, 2, 3))).mean()

@torch.no_grad()
def ddim(unet, noise, c_tilde, alpha_bar, steps=100, attention=False):
    """Deterministic DDIM (eta = 0): noise (B, Z, h, w), units c_tilde (B, N, D) -> latents.
    Each step asks the U-Net for the noise, computes the clean latent that this implies, and goes
    to an earlier time with eps_hat: no chance, so one start and one set of units give one latent.
    steps: 1 to the schedule's length. attention=True also returns maps (B, N, h, w): the mean
    cross-attention over heads, Transformers and steps, each resized (DAAM's way, reference 60)."""
    times = torch.linspace(len(alpha_bar) - 1, 0, steps).round().long().tolist()  # noisiest first
    ones = torch.ones(len(noise), dtype=torch.long, device=noise.device)  # (B,)
    now = alpha_bar[times]  # (steps,)
    then = torch.cat([now[1:], torch.ones_like(now[:1])])  # the last step leaves no noise
    z_t = noise
    total = 0.0
    count = 0
    for t, a, b in zip(times, now, then):
        maps = [] if attention else None
        eps_hat = unet(z_t, t * ones, c_tilde, maps)
        z0_hat = (z_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
        z_t = b.sqrt() * z0_hat + (1 - b).sqrt() * eps_hat
        for m in maps or ():  # (B, H*W, N)
            side = math.isqrt(m.shape[1])
            m = m.mT.unflatten(2, (side, side))  # (B, N, H, W)
            total = total + F.interpolate(m, size=z_t.shape[-2:], mode="bilinear")
            count += 1
    if attention:
        return z_t, total / count
    return z_t

@torch.no_grad()
def ema_update(average, module, half_life, batch, images_seen):
    """Move `average`, a copy of `module`, towards it: an exponential moving average over images.
    half_life: training images after which a weight's influence has halved, whatever the batch. The
    paper's 0.9999 per step of 512 images is a half-life of 512 ln 2 / 0.0001 = 3.55 million. It
    is capped at 8% of the images seen, or the random start would linger (like LDM's warm-up)."""
    weight = 1 - 0.5 ** (batch / min(half_life, 0.08 * images_seen))
    for old, new in zip(average.state_dict().values(), module.state_dict().values()):
        if old.is_floating_point():  # weights, and BatchNorm's statistics like them
            old.lerp_(new, weight)

# ---- Muon, the laptop preset's optimiser for weight matrices -------------------------------------
def orthogonalise(x):
    """Newton-Schulz: matrices x (B, m, n) -> nearly orthogonal ones, same singular vectors.
    An odd polynomial of a matrix acts on its singular values alone: a X + b XX'X + c (XX')^2 X
    turns each value v into a v + b v^3 + c v^5. With these coefficients five rounds lift all but
    the tiniest v into 0.7 to 1.2, by matrix products only (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT  # XX' is then the smaller product
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT  # (B, m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x  # (B, m, n)
    return x

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): averages gradients, as momentum does, then orthogonalises.
    Every direction in which a layer can learn gets a step of the same size, while AdamW's steps
    follow the few directions of large gradients. Small but telling ones, such as those of an
    object's shape beside the hues', are learnt early that way. Steps are scaled to the usual size
    of AdamW's (Liu et al. 2025): one learning rate serves both. Weights of one dimension stay with
    AdamW (make_optimizers in train.py); a UnitLinear's biases, N matrices of one row, come here.
    Paper: names no optimiser; the code that it builds on uses AdamW, as the paper preset does."""
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(mean, momentum)  # Nesterov's form
                if p.ndim != 3:  # a UnitLinear's (N, d_in, d_out) are N matrices already
                    update = update.flatten(1)[None]  # (1, out, in*k*k)
                B, m, n = update.shape
                update = orthogonalise(update)
                p.sub_(update.view_as(p), alpha=0.2 * group["lr"] * max(m, n) ** 0.5)

def main():
    """Build the paper-size U-Net, run one batch, print sizes."""
    net = UNet()
    z_t = torch.randn(2, 3, 16, 16)
    eps_hat = net(z_t, torch.tensor([10, 900]), torch.randn(2, 20, 32))
    print(f"parameters {sum(p.numel() for p in net.parameters()) / 1e6:.3f}M (Table 8: 37.550M)")
    print(f"z_t {list(z_t.shape)}, times and units -> eps^ {list(eps_hat.shape)}")

if __name__ == "__main__":
    main()
