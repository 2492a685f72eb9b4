"""The checkpoints of a run: ``python launch/checkpoint.py run=runs/tiny-...``; ``--help`` says more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megaplug") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaplug.entry import checkpoint

if __name__ == "__main__":
    sys.exit(checkpoint())
