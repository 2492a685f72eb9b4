"""``action=list``: every run with how it stands, what it has come to, and what sets it apart."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from megaplug.commands.actions import Answer, columns
from megaplug.commands.runs_queue import queues_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.job.differences import differing, read_keys, shown
from megaplug.launchers.screen import count
from megaplug.runs.figures import Figures, figures_of
from megaplug.runs.folder import RunFolder
from megaplug.runs.standing import Standing, standing

HEADER = ("run", "state", "step", "loss", "validation", "tokens/s", "last seen")
# Of a line below a run.
_WIDTH = 106
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        folder: It.
        stands: How.
        figures: What it has recorded.
        keys: Those of its job; None where that cannot be read.
        fault: Why not, or what else cannot be read.
        queue: The jobs of SLURM's that are its own and have not ended, each with its state.
    """

    folder: RunFolder
    stands: Standing
    figures: Figures
    keys: dict[str, Any] | None
    fault: str = ""
    queue: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """How it stands; ``queued`` where none of its processes lives, and SLURM will start one."""
        return "queued" if self.queue and not self.stands.is_alive else self.stands.status

    @property
    def iteration(self) -> int:
        """The last step that is known of."""
        said = self.stands.state.iteration if self.stands.state is not None else 0
        return max(said, self.figures.iteration or 0)

    def as_json(self, names: list[str]) -> dict[str, Any]:
        """As plain values.

        Args:
            names: The keys that differ between the runs.
        """
        state, holder = self.stands.state, self.stands.holder
        return {
            "run": self.folder.name,
            "folder": str(self.folder.path),
            "status": self.status,
            "reason": "" if state is None else state.reason,
            "iteration": self.iteration,
            "saved_iteration": 0 if state is None else state.saved_iteration,
            "iters": None if state is None or not state.iters else state.iters,
            "num_restarts": 0 if state is None else state.num_restarts,
            "updated": None if state is None else state.updated,
            "process": None if holder is None else {"pid": holder.pid, "host": holder.host},
            "jobs": dict(self.queue),
            "figures": self.figures.as_json(),
            "differs": None if self.keys is None else {name: self.keys.get(name) for name in names},
            "fault": self.fault,
        }


def answer(asked: Asked) -> Answer:
    """All runs that are named."""
    if asked.has_none:
        return Answer({"runs": [], "differing": []}, "no run in runs yet: python launch/train.py makes one")
    folders = asked.runs()
    faults: list[str] = []
    try:
        queues = queues_of(folders, faults)
    except UserError as error:
        queues = [{} for _ in folders]
        faults.append(error.message)
    note = f"what is queued is not known: {'; '.join(faults)}" if faults else ""
    rows = [replace(row_of(folder), queue=queue) for folder, queue in zip(folders, queues, strict=True)]
    names = differing([row.keys for row in rows])
    lines = columns([HEADER, *(cells(row) for row in rows)], left=(0, 1, 6))
    text = [lines[0]]
    for row, line in zip(rows, lines[1:], strict=True):
        text.append(line)
        text += [f"    {said}" for said in _below(row, names)]
    text += [note] if note else []
    report = {"runs": [row.as_json(names) for row in rows], "differing": names, "note": note}
    return Answer(report, "\n".join(text))


def row_of(folder: RunFolder) -> Row:
    """What is known of one run; a file that cannot be read is a fault of that run alone."""
    stands = standing(folder)
    figures, keys, fault = Figures(), None, stands.fault
    try:
        figures = figures_of(folder.metrics_file)
        keys = read_keys(folder.job_file)
    except UserError as error:
        fault = fault or error.message
    return Row(folder, stands, figures, keys, fault)


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    state, found = row.stands.state, row.figures
    end = f"/{state.iters:,}" if state is not None and state.iters else ""
    rate = found.tokens_per_second
    return (
        row.folder.name,
        row.status,
        f"{row.iteration:,}{end}",
        _loss(found.loss),
        _loss(found.valid_loss),
        "-" if rate is None else count(rate),
        "-" if state is None else _ago(state.updated),
    )


def _below(row: Row, names: list[str]) -> list[str]:
    """What does not fit into a column."""
    said = []
    if row.keys is not None and names:
        set_here = {name: row.keys[name] for name in names if row.keys.get(name) is not None}
        said += textwrap.wrap("  ".join(f"{name}={shown(value)}" for name, value in set_here.items()), _WIDTH)
    state = row.stands.state
    said += [f"job {job} {state}" for job, state in row.queue.items()]
    if row.status == "killed" and state is not None:
        said.append(f"its launcher was killed; the same command goes on from step {state.saved_iteration:,}")
    elif state is not None and state.reason and row.status in ("failed", "stopped"):
        said.append(state.reason)
    if row.stands.holder is not None:
        said.append(f"process {row.stands.holder.pid} on {row.stands.holder.host}")
    return [*said, *([row.fault] if row.fault else [])]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _ago(stamp: str) -> str:
    """How long ago, in one unit."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
    except (TypeError, ValueError):
        return "-"
    for size, name in ((_DAY_S, "d"), (_HOUR_S, "h"), (_MINUTE_S, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} ago"
    return f"{max(0, int(seconds))} s ago"
