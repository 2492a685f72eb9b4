"""Which checkpoints a job keeps, and whether they can come into being."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megaplug.errors import Problem
from megaplug.job.schema import Job
from megaplug.runs.retention import Retention

if TYPE_CHECKING:
    from megaplug.job.derive import Derived


def retention(job: Job) -> Retention:
    """What a job that passed its checks keeps."""
    wishes = job.checkpoint
    return Retention(wishes.keep, wishes.keep_every, wishes.keep_best)


def retention_problems(job: Job, derived: Derived) -> Iterator[Problem]:
    """Wishes that nothing could ever fulfil, once lengths and intervals are known.

    Args:
        job: A job that passed the checks of its values.
        derived: Its steps and intervals.
    """
    saves, iters = derived.save_interval, derived.iters
    every = job.checkpoint.keep_every
    if every is not None and math.lcm(saves, every) > iters:
        message = f"no step of {iters} is a multiple of {every} and is saved: saved is every {saves} steps"
        yield Problem("checkpoint.keep_every", message, f"use a multiple of {saves}")
    if not job.checkpoint.keep_best:
        return
    if not derived.eval_iters:
        missing = "data.split leaves no text for it" if job.train.eval_iters else "train.eval_iters is 0"
        message = f"the best are told by their validation loss, and there is no validation: {missing}"
        yield Problem("checkpoint.keep_best", message, "use checkpoint.keep_best=0, or validate")
    elif math.lcm(saves, derived.eval_interval) > iters:
        message = (
            f"no checkpoint before the last has a validation loss: saved is every {saves} steps, "
            f"validated every {derived.eval_interval}, of {iters}"
        )
        yield Problem("checkpoint.keep_best", message, f"use train.eval_interval={saves}")
