"""``logging.level``: how much a rank writes into its log."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path


def set_level(level: str) -> None:
    """Let through what is at least so serious; for the whole process.

    Megatron prints what it has to report, a line for every step among it, and logs only warnings and a few
    notes: its prints, and ours, count as ``info``. Tracebacks and messages on stderr are always written.

    Args:
        level: ``debug``, ``info``, ``warning`` (no reports) or ``error`` (no warnings of libraries either).
    """
    number = getattr(logging, level.upper())
    logging.getLogger().setLevel(number)
    if number > logging.INFO:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  for the rest of the process
    if number > logging.WARNING:
        warnings.simplefilter("ignore")
