"""The feature extractor: image -> N latent units of D numbers each (paper section 3.1, Table 9).

Where it sits: this is the network whose output we want to be disentangled. A small CNN squeezes
the image into N scalars, one per unit. Then each scalar goes through a small MLP of the unit's own
and becomes a vector of D = 32 numbers. The N vectors are the set c that the denoiser (unet.py)
cross-attends to. Nothing here is told what a factor is: the training signal is that the denoiser
predicts noise better when the units say something useful.

Two bottlenecks make disentangling possible. One scalar per unit: a unit is a curve in R^D, with one
degree of freedom, so it pays to put one thing on it. And MLPs are private: each sees one scalar.

    python extractor.py     # prints shapes on the way, and how many parameters (23.570M)
"""

from itertools import pairwise

import torch
import torch.nn as nn

class UnitLinear(nn.Module):
    """N nn.Linear side by side, one per unit, in one product: (N, B, d_in) -> (N, B, d_out)."""
    def __init__(self, n_units, d_in, d_out):
        super().__init__()
        bound = d_in ** -0.5  # as nn.Linear starts: uniform within 1/sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(n_units, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_units, 1, d_out).uniform_(-bound, bound))

    def forward(self, x):
        return self.bias + x @ self.weight  # (N, 1, d_out) + (N, B, d_in) @ (N, d_in, d_out)

class Extractor(nn.Module):
    """Image -> latent units c. Table 9 with the default arguments.
    n_units: N. The paper does not say; its released configuration has 20.
    unit_dim: D, the length of one unit's vector (section 3.1: 32).
    channels: of the convolutions. The first keeps the image's size, each other halves it.
    hidden: widths of the fully connected layers between the CNN and the N scalars.
    unit_hidden: widths of the hidden layers of each unit's private MLP.
    shrink: average the image over shrink x shrink pixels first (paper: 1).
    unit_relu: end every MLP in a ReLU, as Table 9 does. About half of a unit's numbers are then 0.
        Equation 6 divides by them: the unit hardly moves. So the laptop preset leaves it out.
    unit_line: beyond the paper, c = MLP(s) + s w + b. MLPs alone often bent a unit into a V, and
        along its main direction, all that metrics see, one arm is a point. A line stretches it.
    fsq_levels: Table 11's rival of DyGA: round the units with FSQ; () does not."""
    def __init__(self, n_units=20, unit_dim=32, channels=(64, 128, 256, 256, 256),
                 hidden=(4096, 256), unit_hidden=(256, 512), shrink=1, unit_relu=True,
                 unit_line=False, fsq_levels=()):
        super().__init__()
        self.shrink = shrink
        # Paper: Table 9 gives its second convolution stride 1 and padding 3. That cannot be: its
        # first fully connected layer takes 4096 = 256 x 4 x 4 numbers, so 64 pixels are halved
        # four times: kernel 4, stride 2, padding 1.
        layers = [
            nn.Conv2d(3, channels[0], 7, padding=3),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        ]
        for c_in, c_out in pairwise(channels):
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)]
            layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
        self.cnn = nn.Sequential(*layers)

        side = 64 // shrink // 2 ** (len(channels) - 1)  # of the last feature map, in pixels
        widths = [channels[-1] * side * side, *hidden]
        dense = []
        for d_in, d_out in pairwise(widths):
            dense += [nn.Linear(d_in, d_out), nn.ReLU()]
        self.to_scalars = nn.Sequential(*dense, nn.Linear(widths[-1], n_units))

        widths = [1, *unit_hidden, unit_dim]
        layers = []
        for d_in, d_out in pairwise(widths):
            layers += [UnitLinear(n_units, d_in, d_out), nn.ReLU()]
        self.unit_mlp = nn.Sequential(*layers if unit_relu else layers[:-1])
        self.unit_line = UnitLinear(n_units, 1, unit_dim) if unit_line else None
        self.fsq = FSQ(unit_dim, fsq_levels) if fsq_levels else nn.Identity()
        # Beyond the paper: False where a unit is silenced for good (dyga.py, informative_units).
        self.register_buffer("kept", torch.ones(n_units, dtype=torch.bool))

    def scalars(self, x):
        """Images float (B, 3, H, W) in [-1, 1] -> scalars (B, N), all that units learn of them."""
        x = nn.functional.avg_pool2d(x, self.shrink)  # (B, 3, H/shrink, W/shrink)
        s = self.to_scalars(self.cnn(x).flatten(1))  # (B, C, h, w) -> (B, C*h*w) -> (B, N)
        return s * self.kept  # a silenced unit stays in the set, and says the same of all images

    def turn_scalars(self, turn, mean):
        """Beyond the paper: the U kept scalars s become mean + turn (s - mean), by the layer that
        makes them (why: dyga.py, unmixing). turn (U, U), mean (U,). Call it under no_grad."""
        layer = self.to_scalars[-1]
        layer.weight[self.kept] = turn @ layer.weight[self.kept]
        layer.bias[self.kept] = mean + turn @ (layer.bias[self.kept] - mean)

    def expand(self, s):
        """Scalars s (B, N) -> units c (B, N, D), each through its private MLP (and line)."""
        s = s.t().unsqueeze(-1)  # (N, B, 1)
        c = self.unit_mlp(s)  # (N, B, D)
        if self.unit_line:
            c = c + self.unit_line(s)
        return self.fsq(c.transpose(0, 1))  # (B, N, D)

    def forward(self, x):
        """Images float (B, 3, H, W) in [-1, 1] -> units c (B, N, D)."""
        return self.expand(self.scalars(x))

class FSQ(nn.Module):
    """Not part of the method, skip it at first: finite scalar quantisation (Mentzer et al. 2023),
    Table 11's rival of DyGA. A unit of c (B, N, D) is mapped to a few numbers, each is rounded to
    one of `levels` evenly spaced values, and mapped back. The paper's (8, 5, 5) leave 200 values.
    Paper: does not say whether all units share the two maps; here they do, as is common."""
    def __init__(self, dim, levels):
        super().__init__()
        self.down = nn.Linear(dim, len(levels))
        self.up = nn.Linear(len(levels), dim)
        self.register_buffer("steps", torch.tensor(levels) - 1.0, persistent=False)  # (L,)

    def forward(self, c):
        z = self.down(c).sigmoid() * self.steps  # (B, N, L), each from 0 to its number of steps
        z = z + (z.round() - z).detach()  # rounded, with the gradient of what was not
        return self.up(2 * z / self.steps - 1)  # (B, N, D), from values in [-1, 1]

def main():
    """Two images through the paper-size extractor: prints the shapes, and the parameter count."""
    net = Extractor()
    x = torch.randn(2, 3, 64, 64)
    s = net.scalars(x)
    print(f"scalars    {list(s.shape)}, one number per unit")
    print(f"units c    {list(net.expand(s).shape)}, the set that the U-Net cross-attends to")
    print(f"parameters {sum(p.numel() for p in net.parameters()):,}; by hand from Table 9: 23.570M")

if __name__ == "__main__":
    main()
