"""``action=copy``: a checkpoint to another folder or disk, verified on the way."""

from __future__ import annotations

import functools
import time
from pathlib import Path

from megaplug.commands.actions import Answer
from megaplug.commands.checkpoint_words import Asked
from megaplug.commands.cli import sibling
from megaplug.commands.reading import bytes_of, reading
from megaplug.errors import UserError
from megaplug.runs.atomic import size_text
from megaplug.runs.copying import copy_checkpoint


def answer(asked: Asked) -> Answer:
    """Copy the one that is named, or the newest of a run."""
    if "to" not in asked.typed:
        raise UserError("to= is not given", hint="name the folder that receives the checkpoint: to=FOLDER")
    checkpoint, _ = asked.checkpoint()
    size, begun = bytes_of(checkpoint.path), time.monotonic()
    with reading(not asked.as_json) as shown:
        # Read and written, then read where it was written.
        shown.begin(checkpoint.path, " and copying it", times=2)
        tell = functools.partial(shown.tell, checkpoint.path)
        copied = copy_checkpoint(checkpoint.path, Path(asked.typed["to"]).expanduser(), tell)
    seconds = time.monotonic() - begun
    report = {
        "from": str(checkpoint.path),
        "to": str(copied.path),
        "iteration": checkpoint.iteration,
        "num_bytes": size,
        "num_bytes_found": copied.num_bytes_found,
        "seconds": seconds,
    }
    lines = [
        f"copied  {checkpoint.path}",
        f"to      {copied.path}: {size_text(size)} in {seconds:.1f} s, every file's SHA-256 as it was saved",
    ]
    if copied.num_bytes_found:
        lines.append(
            f"        {size_text(copied.num_bytes_found)} of it were there from a copy that was broken off"
        )
    program = sibling(asked.command.program, "train")
    lines.append(f"next    {program} ... load={copied.path}   # trains on from its weights")
    return Answer(report, "\n".join(lines))
