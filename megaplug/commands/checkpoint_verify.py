"""``action=verify``: every byte of checkpoints is read and compared with what was saved."""

from __future__ import annotations

import functools
import time
from typing import Any

from megaplug.commands.actions import Answer, columns
from megaplug.commands.checkpoint_words import Asked, Place
from megaplug.commands.reading import bytes_of, reading
from megaplug.errors import UserError
from megaplug.runs.atomic import size_text
from megaplug.runs.checkpoints import Checkpoint, faults_of, list_checkpoints


def answer(asked: Asked) -> Answer:
    """What is wrong with each checkpoint that is named."""
    begun = time.monotonic()
    found = []
    with reading(not asked.as_json) as shown:
        for checkpoint, place in _asked(asked):
            faults = faults_of(checkpoint.path, functools.partial(shown.tell, checkpoint.path))
            found.append((checkpoint, place, bytes_of(checkpoint.path), faults))
    seconds = time.monotonic() - begun
    reports: list[dict[str, Any]] = [
        {
            "run": str(place.given),
            "iteration": checkpoint.iteration,
            "path": str(checkpoint.path),
            "num_bytes": size,
            "whole": not faults,
            "faults": faults,
        }
        for checkpoint, place, size, faults in found
    ]
    damaged = sum(not report["whole"] for report in reports)
    total = sum(report["num_bytes"] for report in reports)
    lines = []
    rows = [
        (one["path"], size_text(one["num_bytes"]), "whole" if one["whole"] else "DAMAGED") for one in reports
    ]
    for line, one in zip(columns(rows, left=(0, 2)), reports, strict=True):
        lines += [line, *(f"  {fault}" for fault in one["faults"])]
    several = "1 checkpoint" if len(reports) == 1 else f"{len(reports)} checkpoints"
    said = f"{damaged} of {several} damaged" if damaged else f"{several} whole"
    rate = f", {size_text(total / seconds)}/s" if seconds > 0 and not damaged else ""
    lines.append(f"{said}: {size_text(total)} in {seconds:.1f} s{rate}")
    runs = [place.run for _, place, _, faults in found if faults and place.run is not None]
    if any(run.job_file.is_file() for run in runs):
        lines.append("a run goes on from its newest whole one, and sets aside what is damaged and newer")
    report = {"checkpoints": reports, "num_damaged": damaged, "num_bytes": total, "seconds": seconds}
    return Answer(report, "\n".join(lines), 1 if damaged else 0)


def _asked(asked: Asked) -> list[tuple[Checkpoint, Place]]:
    """Those that are named; all of a run where no step is."""
    if "path" in asked.typed or "iteration" in asked.typed:
        return [asked.checkpoint()]
    found = [(one, place) for place in asked.places() for one in list_checkpoints(place.directory)]
    if not found:
        given = asked.typed.get("run", "runs")
        raise UserError(f"{given} has no checkpoint", hint="it was stopped before its first one was saved")
    return found
