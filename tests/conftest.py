"""Put the repository's root on the import path, so that a test says `import dyga` wherever pytest was started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
