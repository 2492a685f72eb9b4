"""A checkpoint comes into being beside the others, and has its name only when it is whole.

Megatron writes ``iter_*`` folders in place and replaces its tracker with a plain ``open``. So it is given the
folder ``saving`` below the checkpoints; what is complete there is listed, made durable and renamed. Whatever
a killed job leaves behind lies in ``saving``, where nobody looks for checkpoints.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaplug.runs.atomic import disk_errors, fsync_folder, write_text_atomic
from megaplug.runs.checkpoints import SAVING, TRACKER, set_aside
from megaplug.runs.hashed import notes_folder, read_notes
from megaplug.runs.manifest import write_manifest


def beside(directory: Path) -> Path:
    """Where Megatron saves: below the folder of checkpoints, and so on the same disk."""
    return directory / SAVING


def complete(directory: Path, iteration: int, extra: Mapping[str, Any] | None = None) -> Path:
    """Give a checkpoint that is written its manifest, its name and the tracker, each of them durable.

    Args:
        directory: The run's folder of checkpoints.
        iteration: The step whose checkpoint lies whole in `beside`.
        extra: For the manifest.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: If the disk refuses; the checkpoint has no name then.
    """
    place = beside(directory)
    name = f"iter_{iteration:07d}"
    folder, target = place / name, directory / name
    with disk_errors(folder, "complete the checkpoint"):
        written = read_notes(folder)
    write_manifest(folder, extra, written)
    if os.path.lexists(target):  # of a time before the run went back to an older one
        set_aside(directory, target)
    with disk_errors(target, "give the checkpoint its name"):
        folder.rename(target)
        fsync_folder(place)
        fsync_folder(directory)
    write_text_atomic(directory / TRACKER, str(iteration))
    with disk_errors(place, "tidy up"):
        shutil.rmtree(notes_folder(folder), ignore_errors=True)
        (place / TRACKER).unlink(missing_ok=True)
    return target
