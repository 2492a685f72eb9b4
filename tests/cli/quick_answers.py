"""Commands that answer from files alone, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def assert_quick(tool: str, words: Sequence[str], cwd: Path) -> None:
    """It ends with 0 within a second of the CPU, and has imported no torch.

    Args:
        tool: A module of ``megaplug.commands``.
        words: What is typed after it.
        cwd: Where.
    """
    code = (
        f"import sys; from megaplug.commands import {tool}; {tool}.main(sys.argv[1:]);"
        "sys.exit(9 if {'torch', 'megatron', 'numpy', 'hydra'} & set(sys.modules) else 0)"
    )
    begun = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - begun < 1.0
