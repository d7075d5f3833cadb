"""The feature extractor: image -> N latent units of D numbers each (paper section 3.1, Table 9).

Where it sits: this is the network whose output we want to be disentangled. A small CNN squeezes the image into N
scalars, one per unit; then each unit's scalar goes through a small MLP of the unit's own and becomes a vector of
D = 32 numbers. The N vectors are the set that the denoiser (unet.py) cross-attends to. Nothing here is told what a
factor is: the only training signal is that the denoiser predicts noise better when the units say something useful.

Two bottlenecks do the disentangling work. One scalar per unit: a unit is a curve in R^D, with one degree of freedom,
so it pays to put one thing on it. And the MLPs are private: no unit can see another's scalar, so what a unit's vector
says can only come from its own scalar.

    python extractor.py     # prints every layer's output shape and the paper-size parameter count (23.570M at N = 20)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class UnitLinear(nn.Module):
    """N linear layers side by side, one per unit: (N, B, d_in) -> (N, B, d_out), as one batched matrix product.

    It computes exactly what a Python list of N `nn.Linear` would, each on its own unit, in one kernel in place of N.
    """

    def __init__(self, n_units, d_in, d_out):
        super().__init__()
        # nn.Linear's own default: uniform within 1/sqrt(fan_in), for weights and biases alike.
        bound = d_in ** -0.5
        self.weight = nn.Parameter(torch.empty(n_units, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_units, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (N, 1, out) + (N, B, in) @ (N, in, out) -> (N, B, out)


class FSQ(nn.Module):
    """Not part of the method: finite scalar quantisation (Mentzer et al. 2023), Table 11's rival of DyGA (dyga.py).
    c (B, N, D) -> (B, N, D).

    A unit is mapped linearly to a few numbers, each of these is rounded to one of `levels` evenly spaced values, and
    the result is mapped back. With the paper's levels (8, 5, 5) a unit can take 200 values: as many as DyGA's anchors
    or more, but where they lie is fixed beforehand, whatever the attributes are.
    Paper: does not say whether all units share the two maps; here they do, as in common implementations.
    """

    def __init__(self, dim, levels):
        super().__init__()
        self.down, self.up = nn.Linear(dim, len(levels)), nn.Linear(len(levels), dim)
        self.register_buffer("steps", torch.tensor(levels) - 1.0, persistent=False)  # (L,) from lowest to highest value

    def forward(self, c):
        z = self.down(c).sigmoid() * self.steps  # (B, N, L), each between 0 and its number of steps
        z = z + (z.round() - z).detach()  # rounded, but with the gradient of what was not (straight through)
        return self.up(2 * z / self.steps - 1)  # (B, N, D), from values in [-1, 1]


class Extractor(nn.Module):
    """Image -> latent units c. Table 9 with the default arguments.

    Args:
        n_units: N. The paper does not say; its released configuration uses 20.
        unit_dim: D, the length of one unit's vector (section 3.1: 32).
        channels: output channels of the five convolutions. The first keeps the size, each other one halves it.
        hidden: widths of the two fully connected layers between the CNN and the N scalars.
        unit_hidden: widths of the two hidden layers of each unit's private MLP.
        image_size: height and width of the input image.
        shrink: average the image over shrink x shrink pixels first. 1 in the paper; on a CPU, 2 saves most of the
            CNN's time.
        unit_relu: end every unit in a ReLU, as Table 9 does. Half of a unit's numbers can then be exactly 0.
        fsq_levels: quantise the units with FSQ of these levels; () does not.
    """

    def __init__(self, n_units=20, unit_dim=32, channels=(64, 128, 256, 256, 256), hidden=(4096, 256),
                 unit_hidden=(256, 512), image_size=64, shrink=1, unit_relu=True, fsq_levels=()):
        super().__init__()
        self.shrink, self.unit_relu = shrink, unit_relu
        # Paper: Table 9 gives its second convolution stride 1 and padding 3. That cannot be: its first fully connected
        # layer takes 4096 = 256 channels x 4 x 4 numbers, so 64 pixels are halved four times: kernel 4, stride 2,
        # padding 1. The parameter count agrees (23.570M).
        layers = [nn.Conv2d(3, channels[0], 7, stride=1, padding=3), nn.BatchNorm2d(channels[0]), nn.ReLU()]
        for c_in, c_out in zip(channels[:-1], channels[1:]):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        # Channels last in memory: a tenth of this CNN's time on an AMD EPYC, nothing on an Intel Xeon, measured.
        self.cnn = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        side = image_size // shrink // 2 ** (len(channels) - 1)
        if side < 1:
            raise ValueError(f"{len(channels) - 1} halvings leave nothing of a {image_size // shrink}-pixel image: "
                             "use fewer channels entries or a smaller shrink")
        widths = [channels[-1] * side * side, *hidden]
        dense = []
        for d_in, d_out in zip(widths[:-1], widths[1:]):
            dense += [nn.Linear(d_in, d_out), nn.ReLU()]
        dense += [nn.Linear(widths[-1], n_units)]
        self.to_scalars = nn.Sequential(*dense)
        unit_widths = [1, *unit_hidden, unit_dim]
        self.unit_mlp = nn.ModuleList(UnitLinear(n_units, a, b) for a, b in zip(unit_widths[:-1], unit_widths[1:]))
        self.fsq = FSQ(unit_dim, fsq_levels) if fsq_levels else nn.Identity()

    def scalars(self, x):
        """Images float (B, 3, H, W) in [-1, 1] -> one scalar per unit (B, N): all that a unit knows of the image."""
        if self.shrink > 1:
            x = F.avg_pool2d(x, self.shrink)  # (B, 3, H/shrink, W/shrink)
        return self.to_scalars(self.cnn(x).flatten(1))  # (B, C, h, w) -> (B, C*h*w) -> (B, N)

    def expand(self, s):
        """One scalar per unit (B, N) -> latent units c (B, N, D), each through its unit's private MLP."""
        h = s.t().unsqueeze(-1)  # (N, B, 1)
        for layer in self.unit_mlp[:-1]:
            h = F.relu(layer(h))  # (N, B, width)
        h = self.unit_mlp[-1](h)  # (N, B, D)
        if self.unit_relu:
            h = F.relu(h)
        return self.fsq(h.transpose(0, 1))  # (B, N, D)

    def forward(self, x):
        """Images float (B, 3, H, W) in [-1, 1] -> latent units c (B, N, D)."""
        return self.expand(self.scalars(x))


def main():
    """Walk one image through the paper-size extractor and print what each step makes of it."""
    net = Extractor()
    x = torch.randn(2, 3, 64, 64)
    print(f"images       {tuple(x.shape)}")
    for layer in net.cnn:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            print(f"convolution  {tuple(x.shape)}")
    s = net.to_scalars(x.flatten(1))
    print(f"scalars      {tuple(s.shape)}   one number per unit")
    print(f"units c      {tuple(net.expand(s).shape)}   the set that the U-Net cross-attends to")
    print(f"parameters   {sum(p.numel() for p in net.parameters()) / 1e6:.3f}M   (paper size: 23.570M at N = 20)")


if __name__ == "__main__":
    main()
