"""A checkpoint's averaged model alone, in half precision: how assets/laptop.pt was made.

    python tests/half.py out/shapes3d-laptop/ckpt.pt assets/laptop.pt    # evaluate.py reads it
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402


def main():
    source, target = sys.argv[1:]
    ckpt = train.read_checkpoint(source)
    kept = {name: ckpt[name] for name in ("format", "config", *train.PLACE)}
    # The average's encoder of stage 1, too: evaluate.py measures reconstructions with it.
    kept["average"] = {name: x.half() if x.is_floating_point() else x
                       for name, x in ckpt["average"].items()}
    with data.replacing(target) as temporary:
        torch.save(kept, temporary)


if __name__ == "__main__":
    data.run(main)
