"""Runs and what has become of them: ``python launch/runs.py``; ``--help`` says more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megaplug") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaplug.entry import runs

if __name__ == "__main__":
    sys.exit(runs())
