"""The checkpoints of a run: only a whole one is ever loaded, and what is not whole is set aside.

A checkpoint has its name only when it is whole (`megaplug.runs.saving`). What happens to it afterwards, a
flipped bit or a missing file, is found by `repair`, which runs before a start, names it and goes back one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from megaplug.runs.atomic import disk_errors, fsync_folder, remove_unfinished, write_text_atomic
from megaplug.runs.manifest import verify_manifest
from megaplug.runs.metadata_scan import scan_metadata
from megaplug.runs.object_scan import scan_objects
from megaplug.runs.stored import METADATA

TRACKER = "latest_checkpointed_iteration.txt"
SET_ASIDE = "set_aside"
SAVING = "saving"
_KEEP_SET_ASIDE = 2


@dataclass(frozen=True)
class Checkpoint:
    """One ``iter_*`` folder.

    Attributes:
        path: The folder.
        iteration: The training step after which it was saved.
    """

    path: Path
    iteration: int


@dataclass(frozen=True)
class SetAside:
    """A checkpoint that is not whole and was moved away.

    Attributes:
        path: Where it is now, at least until another start sets some aside.
        iteration: The step it was meant to hold.
        faults: What is wrong with it.
    """

    path: Path
    iteration: int
    faults: list[str]


@dataclass(frozen=True)
class RepairReport:
    """What `repair` found.

    Attributes:
        newest: The newest whole checkpoint, the one that Megatron will load; None to begin at step 0.
        set_aside: What was moved away, newest first.
        tracker_rewritten: True if the tracker pointed elsewhere.
        unfinished: The steps whose save was never completed; what there was of them is removed.
        forgotten: What an earlier start had set aside and is deleted.
    """

    newest: Checkpoint | None
    set_aside: list[SetAside]
    tracker_rewritten: bool
    unfinished: list[int]
    forgotten: list[Path]


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Every ``iter_*`` entry of a folder, whole or not, oldest first."""
    if not directory.is_dir():
        return []
    with disk_errors(directory, "list"):
        matches = [(entry, re.fullmatch(r"iter_([0-9]+)", entry.name)) for entry in directory.iterdir()]
    return sorted(
        (Checkpoint(entry, int(match[1])) for entry, match in matches if match),
        key=lambda found: (found.iteration, found.path.name),
    )


def tracked_step(directory: Path) -> int | None:
    """The step that Megatron's tracker names, which is the one that it loads; None where it names none."""
    path = directory / TRACKER
    with disk_errors(path, "read"):
        text = path.read_bytes().strip() if path.is_file() else b""
    return int(text) if text.isdigit() else None


def tracker_fault(directory: Path) -> str | None:
    """Why the tracker of a run names none of its checkpoints; None where it does, or there are none."""
    present = [found.iteration for found in list_checkpoints(directory)]
    step = tracked_step(directory)
    if step in present or not present:
        return None
    if step is not None:
        return f"{TRACKER} names step {step:,}, which has no checkpoint"
    is_there = os.path.lexists(directory / TRACKER)
    return f"{TRACKER} names no step" if is_there else f"{TRACKER} is not there"


def has_set_aside(directory: Path) -> bool:
    """Whether something that was saved lies there, set aside."""
    with disk_errors(directory, "list"):
        place = directory / SET_ASIDE
        return place.is_dir() and bool(_numbered(place))


def stored_bytes(directory: Path) -> int:
    """What the checkpoints of a folder take on the disk, in bytes, without those that were set aside."""
    with disk_errors(directory, "list"):
        return sum(
            file.lstat().st_size
            for found in list_checkpoints(directory)
            for file in found.path.rglob("*")
            if file.is_file()
        )


def faults_of(checkpoint: Path, tell: Callable[[int], None] | None = None) -> list[str]:
    """Why a checkpoint must not be loaded; empty when it is whole and harmless.

    Args:
        checkpoint: Its folder.
        tell: Called, on several threads, with how many bytes more have been read.

    Raises:
        UserError: If the disk refuses to be read.
    """
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return ["it is not a folder"]
    if faults := verify_manifest(checkpoint, tell):
        return faults
    # Where .metadata is no good, torch reads those of single ranks.
    pickles = sorted(checkpoint.glob(f"*{METADATA}"))
    faults = [fault for path in pickles for fault in scan_metadata(path)]
    return faults or scan_objects(checkpoint)


def repair(directory: Path, tell: Callable[[Path, int], None] | None = None) -> RepairReport:
    """Find the newest whole checkpoint, set aside whatever is newer, and make the tracker say so.

    Older checkpoints are not read: they are looked at when they become the newest. What was never completed
    is removed.

    Args:
        directory: The run's checkpoint folder; it need not exist.
        tell: Called, on several threads, with the checkpoint that is read and how many bytes more of it were.

    Raises:
        UserError: If the disk is full or may not be read or written. Nothing is lost then.
    """
    unfinished = discard_unfinished(directory)
    remove_unfinished(directory)
    aside: list[SetAside] = []
    newest: Checkpoint | None = None
    for found in reversed(list_checkpoints(directory)):
        faults = faults_of(found.path, tell and functools.partial(tell, found.path))
        if not faults:
            newest = found
            break
        aside.append(SetAside(set_aside(directory, found.path), found.iteration, faults))
    tracker_rewritten = _rewrite_tracker(directory, newest)
    forgotten = _forget_old(directory / SET_ASIDE, {one.path for one in aside}) if aside else []
    return RepairReport(newest, aside, tracker_rewritten, unfinished, forgotten)


def discard_unfinished(directory: Path) -> list[int]:
    """Remove what was never completed, and return the steps that were being saved.

    Nobody may be saving there: the run's lock is held, and every process of its last job has ended.
    """
    place = directory / SAVING
    if not os.path.lexists(place):
        return []
    with disk_errors(place, "remove the leftovers in"):
        if place.is_symlink() or not place.is_dir():
            place.unlink()
            return []
        unfinished = [found.iteration for found in list_checkpoints(place)]
        shutil.rmtree(place)
        fsync_folder(directory)
    return unfinished


def delete(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, its name first.

    Raises:
        UserError: If the disk refuses.
    """
    place = checkpoint.path.parent / SAVING
    going = place / f"old_{checkpoint.path.name}"
    with disk_errors(checkpoint.path, "delete the checkpoint"):
        place.mkdir(exist_ok=True)
        checkpoint.path.rename(going)
        if going.is_dir() and not going.is_symlink():
            shutil.rmtree(going)
        else:
            going.unlink()


def tidy(directory: Path) -> None:
    """Remove the folder of what comes and goes, if there is nothing in it."""
    with contextlib.suppress(OSError):
        (directory / SAVING).rmdir()


def set_aside(directory: Path, path: Path) -> Path:
    """Move a checkpoint to ``set_aside/<number>-<name>``; the numbers only ever grow."""
    place = directory / SET_ASIDE
    with disk_errors(directory, "set a broken checkpoint aside in"):
        place.mkdir(exist_ok=True)
        target = place / f"{max((number for number, _ in _numbered(place)), default=0) + 1:04d}-{path.name}"
        path.rename(target)
        fsync_folder(place)
        fsync_folder(directory)
    return target


def _forget_old(place: Path, new: Set[Path]) -> list[Path]:
    """Delete what was set aside before, but for the highest steps of all; return what is gone."""
    with disk_errors(place, "delete old leftovers in"):
        by_step = sorted(_numbered(place), key=lambda one: (int(one[1].name.rpartition("_")[2]), one[0]))
        going = [path for _, path in by_step[:-_KEEP_SET_ASIDE] if path not in new]
        for path in going:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return going


def _numbered(place: Path) -> list[tuple[int, Path]]:
    matches = [(re.fullmatch(r"([0-9]+)-iter_[0-9]+", entry.name), entry) for entry in place.iterdir()]
    return [(int(match[1]), entry) for match, entry in matches if match]


def _rewrite_tracker(directory: Path, newest: Checkpoint | None) -> bool:
    tracker = directory / TRACKER
    if not directory.is_dir():
        return False
    with disk_errors(tracker, "read"):
        said = tracker.read_bytes() if tracker.exists() else None
    if newest is None:
        with disk_errors(tracker, "remove"):
            tracker.unlink(missing_ok=True)
        return said is not None
    right = str(newest.iteration)
    if said is not None and said.strip() == right.encode():
        return False
    write_text_atomic(tracker, right)
    return True
