"""Runs the cases of ``parity_cases.py``, several at once, each against the plain run that it names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs import Jobs, curve, kernels, largest_difference
from parity_cases import CASES, Case
from setting import Setting, ended, read_setting, skipped

STEPS = 5
# A job is a launcher and a rank; most of its time is spent on imports.
AT_ONCE = min(8, max(2, (os.cpu_count() or 1) // 2))


def why_not(case: Case, setting: Setting) -> str:
    """Why a case cannot be run here; empty if it can."""
    if missing := [module for module in case.needs if find_spec(module) is None]:
        return f"{', '.join(missing)} is not installed"
    if setting.rehearse and not case.on_cpu:
        return "the CPU cannot stand in for it"
    return ""


def overrides(case: Case, words: Sequence[str]) -> list[str]:
    """``like`` first, so that the case's own words may change a key of it."""
    keys = {word.split("=", 1)[0] for word in words}
    return [*(word for word in case.like if word.split("=", 1)[0] not in keys), *words]


def judge(case: Case, folder: Path, plain: Path) -> dict[str, Any]:
    """How far a case is from its plain run."""
    return {
        "largest_relative_difference": largest_difference(curve(folder), curve(plain)),
        "tolerance": case.tolerance,
        "why": case.why,
        "overrides": list(case.words),
        "like": list(case.like),
        "kernels": kernels(folder),
    }


def main() -> int:
    """Run, compare, store."""
    setting = read_setting(__doc__)
    jobs = Jobs(setting)
    chosen = []
    for case in CASES:
        if reason := why_not(case, setting):
            skipped(case.name, reason)
        else:
            chosen.append(case)
    first = jobs.run("first_of_cases", "train.iters=2", device="cpu")

    def words(loads: bool) -> list[str]:
        return [f"train.iters={STEPS}", *([f"load={first}"] if loads else [])]

    plain = {(case.like, case.loads): f"plain{number}" for number, case in enumerate(chosen)}
    tasks: dict[str, Callable[[], Path]] = {}
    for (like, loads), name in plain.items():
        tasks[name] = partial(jobs.run, name, *words(loads), *like)
    for case in chosen:
        tasks[case.name] = partial(jobs.run, case.name, *words(case.loads), *overrides(case, case.words))
    rows: dict[str, Any] = {}
    failures = []

    def keep(name: str, row: dict[str, Any]) -> None:
        # After each, for the case that the time is up before the last.
        rows[name] = row
        setting.write("parity_cases", {"what": "one GPU, five steps from one checkpoint", "results": rows})

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {name: pool.submit(task) for name, task in tasks.items()}
        for case in chosen:
            try:
                folder = running[case.name].result()
                row = judge(case, folder, running[plain[case.like, case.loads]].result())
            except RuntimeError as error:
                failures.append(f"{case.name}: {error}")
                keep(case.name, {"failed": str(error)})
                print(f"{case.name}: {error}", flush=True)
                continue
            difference = row["largest_relative_difference"]
            keep(case.name, row)
            print(
                f"{case.name}: largest relative difference {difference:.1e}, tolerance {case.tolerance:.0e}",
                flush=True,
            )
            if not difference < case.tolerance:
                failures.append(f"{case.name} differs by {difference:.1e}, tolerance {case.tolerance:.0e}")
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
