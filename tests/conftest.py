"""What tests share: the repository's root on the import path, and a script's main as a call."""
import os
import shlex
import sys
from pathlib import Path

import pytest

# One thread, also in commands that a test starts: sums in another order differ in their last digit.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it once
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Both stages and anchors in seconds, the discriminator too; nothing is learnt.
TINY = shlex.split("""--preset paper
    --vqgan.patch 4 --vqgan.channels 16 --vqgan.multipliers 1 2 --vqgan.res_blocks 1
    --vqgan.codebook_size 64 --stage1.lr 2e-3 --stage1.restart_images 160
    --stage1.batch 16 --stage1.images 640 --extractor.n_units 6 --extractor.shrink 4
    --extractor.channels 8 16 16 --extractor.hidden 32 32 --extractor.unit_hidden 16 16
    --unet.base 16 --unet.multipliers 1 2 --unet.res_blocks 1 --unet.attention_at 1 2
    --unet.heads 2 --unet.groups 4 --lr 1e-3 --batch 32 --images 1280 --pool_images 640
    --ema_half_life 1000 --fit_images 320 --ddim_steps 10""")

@pytest.fixture
def main(monkeypatch):
    """main(train, "--lr", 1) does in this process what the command line would -> exit code."""
    import data
    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            return data.run(module.main) or 0
        except SystemExit as stop:
            return stop.code
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own handlers
    return call
