"""``action=doctor``: what this machine has, what is wrong with it and the cure."""

from __future__ import annotations

from pathlib import Path

from megaplug.commands.plan_words import Asked
from megaplug.data.cache import cache_root
from megaplug.plan import doctor
from megaplug.plan.doctor.report import as_json, print_table


def answer(asked: Asked) -> int:
    """Examine this machine; 1 if it cannot train."""
    findings = doctor.examine(Path(asked.job.runs_dir), cache_root(asked.job.data.cache_dir))
    if asked.as_json:
        print(as_json(findings))
    else:
        print_table(findings)
    return 0 if doctor.can_train(findings) else 1
