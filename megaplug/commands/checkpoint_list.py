"""``action=list``: every checkpoint of a run, which it goes on from, and which it would not keep."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from megaplug.commands.actions import Answer, columns
from megaplug.commands.checkpoint_words import Asked, Place
from megaplug.errors import UserError
from megaplug.job.freeze import read_frozen
from megaplug.job.retention import retention
from megaplug.runs.atomic import disk_errors, size_text
from megaplug.runs.checkpoints import (
    SAVING,
    SET_ASIDE,
    Checkpoint,
    list_checkpoints,
    tracked_step,
    tracker_fault,
)
from megaplug.runs.manifest import MANIFEST, verify_manifest
from megaplug.runs.retention import Retention, kept, validation_losses

_HEADER = ("step", "saved", "size", "validation loss", "files", "")


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Attributes:
        found: It.
        saved: When it was complete; None where no manifest says so.
        num_bytes: Of its files.
        faults: What its names and sizes say against it; its bytes were not read.
        valid_loss: At its step; None where it was not validated.
        is_tracked: Whether Megatron's tracker names it.
        stays: Whether the run's own policy keeps it; None where that is not known.
    """

    found: Checkpoint
    saved: datetime | None
    num_bytes: int
    faults: list[str]
    valid_loss: float | None
    is_tracked: bool
    stays: bool | None

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "iteration": self.found.iteration,
            "path": str(self.found.path),
            "saved": None if self.saved is None else self.saved.isoformat(timespec="seconds"),
            "num_bytes": self.num_bytes,
            "complete": not self.faults,
            "faults": self.faults,
            "valid_loss": self.valid_loss,
            "tracked": self.is_tracked,
            "stays": self.stays,
        }


def answer(asked: Asked) -> Answer:
    """All checkpoints of the runs that are named."""
    runs, blocks, damaged = [], [], False
    for place in asked.places():
        policy = policy_of(place)
        rows, aside, unfinished = rows_of(place, policy), _aside(place), _unfinished(place)
        astray = None if place.run is None else tracker_fault(place.directory)
        damaged = damaged or any(row.faults for row in rows)
        runs.append(
            {
                "run": str(place.given),
                "checkpoints": [row.as_json() for row in rows],
                "policy": None if policy is None else vars(policy),
                "set_aside": aside,
                "unfinished": unfinished,
                "tracker_fault": astray,
            }
        )
        blocks.append(_text(place, policy, rows, aside, unfinished))
        if astray is not None:
            blocks[-1] += f"\n  {astray}; the next start rewrites it"
    return Answer({"runs": runs}, "\n\n".join(blocks), 1 if damaged else 0)


def policy_of(place: Place) -> Retention | None:
    """What the job of a run keeps; None where there is no job, or it cannot be read any more."""
    if place.run is None or not place.run.job_file.is_file():
        return None
    try:
        return retention(read_frozen(place.run.job_file).job)
    except UserError:
        return None  # of another version; what there is can be listed in any case


def rows_of(place: Place, policy: Retention | None) -> list[Row]:
    """Every checkpoint of a folder, oldest first."""
    present = list_checkpoints(place.directory)
    losses = {} if place.run is None else validation_losses(place.run.metrics_file)
    staying = None if policy is None else set(kept(present, losses, policy))
    tracked = tracked_step(place.directory)
    rows = []
    for found in present:
        with disk_errors(found.path, "read"):
            faults = (
                verify_manifest(found.path, read=False) if found.path.is_dir() else ["it is not a folder"]
            )
            manifest = found.path / MANIFEST
            stamp = manifest.stat().st_mtime if manifest.is_file() else None
            files = [file for file in found.path.rglob("*") if file.is_file() and not file.is_symlink()]
            num_bytes = sum(file.stat().st_size for file in files)
        saved = None if stamp is None else datetime.fromtimestamp(stamp, UTC)
        loss, is_tracked = losses.get(found.iteration), tracked == found.iteration
        stays = None if staying is None else found in staying
        rows.append(Row(found, saved, num_bytes, faults, loss, is_tracked, stays))
    return rows


def _aside(place: Place) -> list[str]:
    folder = place.directory / SET_ASIDE
    return sorted(str(path) for path in folder.iterdir()) if folder.is_dir() else []


def _unfinished(place: Place) -> list[int]:
    return [found.iteration for found in list_checkpoints(place.directory / SAVING)]


def _text(
    place: Place, policy: Retention | None, rows: list[Row], aside: list[str], unfinished: list[int]
) -> str:
    lines = [str(place.given)]
    if rows:
        cells = [_cells(row, rows) for row in rows]
        lines += [f"  {line}" for line in columns([_HEADER, *cells], left=(1, 4, 5))]
    else:
        lines.append("  no checkpoint")
    if policy is not None:
        lines.append(f"  the run keeps {policy_text(policy)}")
    lines += [f"  set aside, being damaged: {path}" for path in aside]
    lines += [f"  being saved, or broken off: step {step:,}" for step in unfinished]
    return "\n".join(lines)


def _cells(row: Row, rows: list[Row]) -> tuple[str, ...]:
    losses = [one.valid_loss for one in rows if one.valid_loss is not None]
    notes = ["the run goes on from it"] if row.is_tracked else []
    notes += ["lowest loss"] if row.valid_loss is not None and row.valid_loss == min(losses) else []
    notes += ["not kept"] if row.stays is False else []
    return (
        f"{row.found.iteration:,}",
        "not known" if row.saved is None else row.saved.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        size_text(row.num_bytes),
        "-" if row.valid_loss is None else f"{row.valid_loss:.4f}",
        row.faults[0] if row.faults else "complete",
        ", ".join(notes),
    )


def policy_text(policy: Retention) -> str:
    """A policy in words."""
    parts = ["the newest" if policy.keep == 1 else f"the newest {policy.keep:,}"]
    if policy.keep_every is not None:
        parts.append(f"every {policy.keep_every:,} steps one")
    if policy.keep_best:
        parts.append("the one of the lowest validation loss" if policy.keep_best == 1 else
                     f"the {policy.keep_best:,} of the lowest validation loss")  # fmt: skip
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
