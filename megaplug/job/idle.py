"""Keys that were set and do nothing in this job, or less than they seem to."""

from __future__ import annotations

import dataclasses
import math

from megaplug.job.attention_notes import attention_notes
from megaplug.job.derive import save_interval_of
from megaplug.job.schema import Job, MoeConfig

_SHOWN = 3


def idle_keys(job: Job) -> list[str]:
    """Keys for experts that a model without experts does not read, in dotted form.

    Megatron takes them in silence.

    A key counts where it differs from its default: whoever leaves it has asked for nothing.
    """
    if job.moe.num_experts:
        return []
    default = MoeConfig()
    idle = [
        f"moe.{field.name}"
        for field in dataclasses.fields(MoeConfig)
        if field.name != "num_experts" and getattr(job.moe, field.name) != getattr(default, field.name)
    ]
    # Megatron makes a grid of it all the same, in which nobody stands.
    return ["topology.etp", *idle] if job.topology.etp not in (None, job.topology.tp) else idle


def idle_notes(job: Job) -> list[str]:
    """A line for each; none where every key does what it seems to."""
    return [
        *_expert_notes(job),
        *_early_stop_notes(job),
        *_retention_notes(job),
        *_alert_notes(job),
        *attention_notes(job),
    ]


def _expert_notes(job: Job) -> list[str]:
    idle = idle_keys(job)
    if not idle:
        return []
    more = f" and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
    do = "does" if len(idle) == 1 else "do"
    return [f"{', '.join(idle[:_SHOWN])}{more} {do} nothing: {job.model.name} has no experts"]


def _early_stop_notes(job: Job) -> list[str]:
    train = job.train
    patience, iters = train.early_stop_patience, train.iters
    if patience is None:
        idle = "train.early_stop_min_delta does nothing: train.early_stop_patience is null"
        return [idle] if train.early_stop_min_delta else []
    if iters is None or train.eval_interval <= 0:
        return []
    # The first is better than none, and nothing is cut short at the last step.
    earliest = (patience + 1) * train.eval_interval
    if earliest < iters:
        return []
    return [
        f"train.early_stop_patience={patience} does nothing: with train.eval_interval={train.eval_interval} "
        f"it can end the run at step {earliest:,} at the earliest, and the last is {iters:,}"
    ]


def _retention_notes(job: Job) -> list[str]:
    every, iters = job.checkpoint.keep_every, job.train.iters
    if not every or not iters:
        return []
    saves = save_interval_of(job, iters)
    hit = math.lcm(saves, every)
    # Where none is hit, the job is refused; where all are, that is what was asked for.
    if every % saves == 0 or saves % every == 0 or hit > iters:
        return []
    steps = [f"{step:,}" for step in range(hit, iters + 1, hit)]
    more = ", ..." if len(steps) > _SHOWN else ""
    which = f"step{'s' if len(steps) > 1 else ''} {', '.join(steps[:_SHOWN])}{more}"
    return [
        f"checkpoint.keep_every={every} keeps no more than {which} for good: saved is every {saves} steps"
    ]


def _alert_notes(job: Job) -> list[str]:
    alerts = job.alerts
    told = [f"alerts.{key}" for key in ("command", "webhook") if getattr(alerts, key) is not None]
    if alerts.events or not told:
        return []
    return [f"{' and '.join(told)} {'does' if len(told) == 1 else 'do'} nothing: alerts.events names none"]
