"""Rules that tie several training keys together: length, schedule, loading."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job


def training_problems(job: Job) -> list[Problem]:
    """Everything that is wrong with length, schedule and loading."""
    return [*_length(job), *_schedule(job), *_loading(job), *_early_stop(job)]


def _length(job: Job) -> Iterator[Problem]:
    given = [key for key in ("iters", "tokens", "epochs") if getattr(job.train, key) is not None]
    if len(given) == 1:
        return
    if not given:
        yield Problem(
            "train.iters",
            "the length of the run is not given",
            "set train.iters, train.tokens or train.epochs",
        )
        return
    values = ", ".join(f"{key}={getattr(job.train, key)}" for key in given)
    # Usually one was typed and the other is a default.
    drop = " ".join(f"train.{key}=null" for key in given if key != given[-1])
    yield Problem("train", f"the length is given {len(given)} times: {values}", f"keep one: {drop}")


def _schedule(job: Job) -> Iterator[Problem]:
    lr, iters = job.lr, job.train.iters
    if lr.min_lr > lr.lr > 0:
        yield Problem("lr.min_lr", f"{lr.min_lr} is above lr.lr = {lr.lr}", f"use at most {lr.lr}")
    if lr.lr_warmup_fraction is not None:
        if lr.lr_warmup_iters:
            message = f"given beside lr_warmup_fraction={lr.lr_warmup_fraction}"
            yield Problem(
                "lr.lr_warmup_iters", message, "keep one: lr.lr_warmup_fraction=null or lr.lr_warmup_iters=0"
            )
        if lr.lr_warmup_fraction >= 1:
            yield Problem("lr.lr_warmup_fraction", f"must be below 1, but is {lr.lr_warmup_fraction}")
    if lr.lr_decay_style == "WSD" and lr.lr_wsd_decay_iters is None:
        hint = "for example a tenth of train.iters"
        yield Problem("lr.lr_wsd_decay_iters", "WSD needs the steps of its last decay", hint)
    if iters is not None and iters > 0:
        yield from end_problems(job, iters)


def end_problems(job: Job, iters: int) -> Iterator[Problem]:
    """What does not fit into a run of so many steps, once that number is known."""
    lr = job.lr
    end = lr.lr_decay_iters or iters
    if end <= lr.lr_warmup_iters:
        message = (
            f"{lr.lr_warmup_iters} steps of warm-up do not end before step {end}, the last of the schedule"
        )
        yield Problem("lr.lr_warmup_iters", message, f"use fewer than {end}")
    if lr.lr_decay_style == "WSD" and (lr.lr_wsd_decay_iters or 0) >= end:
        message = f"the last decay takes {lr.lr_wsd_decay_iters} of {end} steps"
        yield Problem("lr.lr_wsd_decay_iters", message, f"use fewer than {end}")
    if job.train.stop_at is not None and job.train.stop_at > iters:
        message = f"{job.train.stop_at} is beyond the last step, {iters}"
        yield Problem("train.stop_at", message, "leave it out")


def _early_stop(job: Job) -> Iterator[Problem]:
    if job.train.early_stop_patience is not None and not job.train.eval_iters:
        message = "waits for better validations, and train.eval_iters=0 means that there are none"
        yield Problem("train.early_stop_patience", message, "for example train.eval_iters=10")


def _loading(job: Job) -> Iterator[Problem]:
    if job.load is None and job.load_state != "weights":
        message = f"{job.load_state} says what to take over, but nothing is loaded"
        yield Problem("load_state", message, "give load=<run or checkpoint>")
