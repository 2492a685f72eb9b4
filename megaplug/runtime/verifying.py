"""A checkpoint is verified before it is loaded, by whoever starts the ranks; where nobody does, by rank 0."""

from __future__ import annotations

from pathlib import Path

from megaplug.errors import UserError
from megaplug.runs.checkpoints import faults_of, tracked_step


def verify_what_is_loaded(load: str | None) -> None:
    """Read the checkpoint that Megatron is about to load, all of it.

    Args:
        load: Megatron's ``--load``; nothing is loaded where its tracker names no step.

    Raises:
        UserError: It is not whole, or would run a program.
    """
    step = None if load is None else tracked_step(Path(load))
    if load is None or step is None:
        return
    # What is taken over from another run is a link to it.
    checkpoint = (Path(load) / f"iter_{step:07d}").resolve()
    if faults := faults_of(checkpoint):
        raise UserError(
            f"{checkpoint} must not be loaded: {faults[0]}",
            hint="launch/train.py sets it aside and goes on from the one before",
            exit_code=1,
        )
