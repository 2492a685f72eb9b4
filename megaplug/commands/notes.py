"""What a person should know of a job that is not wrong: words that do nothing, defaults that surprise."""

from __future__ import annotations

from collections.abc import Sequence

from megaplug.commands.hints import key_of
from megaplug.job.idle import idle_notes
from megaplug.job.schema import Job, TrainConfig
from megaplug.plan.cluster import Cluster
from megaplug.plan.plan import Plan
from megaplug.plan.step_time import constants_of

# Sequences from this length on are said to be long; what is proposed in their place.
_LONG, _SHORT = 32_768, 8_192


def job_notes(job: Job, words: Sequence[str]) -> list[str]:
    """What is true of a job wherever it runs, a line each.

    Args:
        job: As composed.
        words: As they were typed.
    """
    return [*repeated(words), *idle_notes(job)]


def plan_notes(job: Job, words: Sequence[str], cluster: Cluster, *, works: bool = True) -> list[str]:
    """The same, and what a reader of a plan for GPUs may not have meant.

    Args:
        job: As composed.
        words: As they were typed.
        cluster: The machines.
        works: Whether the plan does: what does not fit is not asked for a larger batch.
    """
    found = job_notes(job, words)
    typed = {key_of(word) for word in words}
    sections = {key.partition(".")[0] for key in typed}
    if (
        cluster.device == "cuda"
        and not sections & {"precision", "experiment"}
        and job.precision.dtype == "fp32"
    ):
        found.append("fp32 is what no precision means: GPUs train in bf16, precision=bf16")
    size = job.train.global_batch_size
    small = size == TrainConfig().global_batch_size
    said = typed & {"train", "train.global_batch_size", "experiment"}
    if works and cluster.device == "cuda" and small and not said:
        found.append(f"{size} sequences a step are for trying things out: train=pretrain has 1,024")
    length = job.model.seq_length
    if length >= _LONG and "model.seq_length" not in typed:
        found.append(
            f"sequences of {length:,} tokens are this model's own: model.seq_length={_SHORT} is usual"
        )
    return found


def time_notes(plan: Plan) -> list[str]:
    """That a step time is modelled with another GPU's, format's or attention's constants, where it is."""
    if plan.time is None:
        return []
    note = constants_of(plan.workload, plan.cluster).note
    return [note] if note else []


def repeated(words: Sequence[str]) -> list[str]:
    """Keys that were typed more than once: the last holds, as with Hydra."""
    last: dict[str, list[str]] = {}
    for word in words:
        key, is_pair, value = word.partition("=")
        if is_pair:
            last.setdefault(key.lstrip("+"), []).append(value)
    return [
        f"{key} is given {len(values)} times ({', '.join(values)}): the last holds, {key}={values[-1]}"
        for key, values in last.items()
        if len(set(values)) > 1
    ]
