"""A checkpoint's averaged model alone, in half precision: how assets/laptop.pt was made.

    python tests/half.py out/shapes3d-laptop/ckpt.pt assets/laptop.pt    # evaluate.py reads it
"""
import io
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402

def main():
    ckpt, file = train.read_checkpoint(sys.argv[1]), io.BytesIO()
    kept = {name: ckpt[name] for name in ("format", "config", *train.PLACE)}
    kept["average"] = {name: x.half() if x.is_floating_point() else x
                       for name, x in ckpt["average"].items()}
    torch.save(kept, file)
    with data.replacing(sys.argv[2]) as temporary, ZipFile(temporary, "w", ZIP_DEFLATED) as small:
        for name in ZipFile(file).namelist():  # the same zip archive, compressed
            small.writestr(name, ZipFile(file).read(name))

if __name__ == "__main__":
    data.run(main)
