"""What tests share: the repository's root on the import path, and a script's main as a call."""
import os
import sys
from pathlib import Path

import pytest

# One thread, also in commands that a test starts: sums in another order differ in their last digit.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it once
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


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
