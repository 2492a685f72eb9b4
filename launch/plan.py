"""Ask before a start: ``python launch/plan.py action=doctor`` says what this machine has and lacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("megaplug") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaplug.entry import plan

if __name__ == "__main__":
    sys.exit(plan())
