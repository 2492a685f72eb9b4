"""Train a model: ``python launch/train.py model=tiny topology=tp2``; ``--help`` lists groups and keys."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megaplug") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaplug.entry import train

if __name__ == "__main__":
    sys.exit(train())
