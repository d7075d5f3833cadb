"""Put the repository's root on the import path: a test says `import dyga` wherever pytest runs."""

import os
import sys
from pathlib import Path

# One thread, here and in every command that a test starts: sums in another order differ in their
# last digit. Before torch is imported, which reads this once.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
