"""What became of a run's folder: which checkpoints are whole, whether it is free, what it has recorded."""

from __future__ import annotations

import fcntl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaplug.runs.checkpoints import SAVING, SET_ASIDE, TRACKER, faults_of, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.metrics import read_metrics

# Those of a line of metrics.jsonl that are the same in every run; the others are times.
EXACT = ("loss", "grad_norm", "lr", "tokens", "valid_loss")


def only_run(runs_dir: Path) -> RunFolder | None:
    """The one folder of these runs; None where there is none yet."""
    found = sorted(runs_dir.iterdir()) if runs_dir.is_dir() else []
    assert len(found) <= 1, f"more than one run in {runs_dir}"
    return RunFolder(found[0]) if found else None


def tracked(folder: RunFolder) -> int:
    """The step that the tracker names, as Megatron would read it; 0 where there is none."""
    try:
        return int((folder.checkpoints / TRACKER).read_text())
    except FileNotFoundError:
        return 0


def being_saved(folder: RunFolder) -> list[int]:
    """The steps whose checkpoints are being written and have no name yet."""
    return [found.iteration for found in list_checkpoints(folder.checkpoints / SAVING)]


def newest_whole(folder: RunFolder) -> int:
    """The step of the newest checkpoint that its manifest confirms; 0 where there is none.

    Raises:
        AssertionError: What has the name of a checkpoint is not whole.
    """
    named = list_checkpoints(folder.checkpoints)
    for found in named:
        assert not (faults := faults_of(found.path)), f"{found.path}: {faults}"
    return named[-1].iteration if named else 0


def lock_is_free(folder: RunFolder, within_s: float = 0.0) -> bool:
    """Whether another job could start there, now or soon.

    Args:
        folder: The run.
        within_s: A process that ends has let go of what it is known by before it lets go of its files.
    """
    if not folder.lock_file.exists():
        return True
    began = time.monotonic()
    with folder.lock_file.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() - began >= within_s:
                    return False
            # flock waits for ever or not at all.
            time.sleep(0.01)


@dataclass(frozen=True)
class Figures:
    """What a finished run has recorded.

    Attributes:
        lines: Of ``metrics.jsonl`` without their times: what each is of, and its figures.
        events: TensorBoard's scalars as (name, step), in order.
    """

    lines: list[tuple[tuple[Any, ...], dict[str, float]]]
    events: list[tuple[str, int]]

    @classmethod
    def of(cls, folder: RunFolder) -> Figures:
        """Read both."""
        lines = [
            (
                (line["iteration"], line.get("split"), line.get("source")),
                {name: line[name] for name in EXACT if line.get(name) is not None},
            )
            for line in read_metrics(folder.metrics_file)
        ]
        return cls(lines, _tensorboard(folder))

    def difference(self, other: Figures) -> float:
        """The largest of any figure.

        Raises:
            AssertionError: They do not record the same steps, validations and names, each once.
        """
        of, others = [key for key, _ in self.lines], [key for key, _ in other.lines]
        assert of == others, f"recorded {_unlike(of, others)}"
        assert len(set(of)) == len(of), "a line is there twice"
        assert sorted(self.events) == sorted(other.events), (
            f"TensorBoard: {_unlike(self.events, other.events)}"
        )
        largest = 0.0
        for (key, found), (_, wanted) in zip(self.lines, other.lines, strict=True):
            assert found.keys() == wanted.keys(), f"{key}: {found} and {wanted}"
            largest = max([largest, *(abs(found[name] - wanted[name]) for name in found)])
        return largest


def _unlike(found: list[Any], wanted: list[Any]) -> str:
    more = [entry for entry in found if found.count(entry) > wanted.count(entry)]
    less = [entry for entry in wanted if wanted.count(entry) > found.count(entry)]
    return f"too often {more[:5]}, too rarely {less[:5]}" if more or less else "in another order"


def _tensorboard(folder: RunFolder) -> list[tuple[str, int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = []
    for file in sorted(folder.tensorboard.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), {"scalars": 0}, purge_orphaned_data=False).Reload()
        told += [(name, event.step) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    return told


def leftovers(folder: RunFolder) -> list[str]:
    """What is there only while something is written, or because something was broken."""
    names = {SAVING, SET_ASIDE}
    found = [path for path in folder.path.rglob("*") if path.name in names or path.suffix == ".tmp"]
    return sorted(str(path.relative_to(folder.path)) for path in found)
