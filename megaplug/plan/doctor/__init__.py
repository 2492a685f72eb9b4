"""What this machine has, what is wrong with it for training, and the cure.

Nothing here imports torch: what only torch can tell is asked of a process of its own with a time limit
(``probe.py``), because a broken installation or a hung driver must not take the doctor with it.
"""

from __future__ import annotations

from pathlib import Path

from megaplug.plan.doctor.finding import Finding, can_train
from megaplug.plan.doctor.machine import machine_findings
from megaplug.plan.doctor.probe import PROBE_LIMIT_S, ask_torch
from megaplug.plan.doctor.software import software_findings
from megaplug.plan.doctor.torch_answers import torch_findings

__all__ = ["Finding", "can_train", "examine"]


def examine(runs_dir: Path, cache_dir: Path, limit_s: float = PROBE_LIMIT_S) -> list[Finding]:
    """Looks at everything a run needs.

    Args:
        runs_dir: Where runs are written; need not exist.
        cache_dir: Where tokenized text is kept; need not exist.
        limit_s: Seconds that the process with torch may take.

    Returns:
        The findings in the order in which they are shown.
    """
    return [
        *software_findings(),
        *torch_findings(ask_torch(limit_s)),
        *machine_findings(runs_dir, cache_dir),
    ]
