"""A configuration as a job: the keys it sets, as words that can be typed and as the job that they make."""

from __future__ import annotations

import dataclasses
from typing import Any

from megaplug.job.recompute import granularity, method_and_layers
from megaplug.job.schema import Job, TopologyConfig
from megaplug.plan.workload import Recompute, Workload


def changes(workload: Workload, job: Job) -> dict[str, Any]:
    """The keys that make a job this configuration, with their values.

    Sizes that follow from others are left out: ``dp`` from the number of ranks, ``etp`` and sequence
    parallelism from ``tp``. The keys of the topology are those that differ from its default file.
    """
    topology, train = workload.topology, job.train
    values: dict[str, Any] = {"topology.world_size": topology.world_size}
    default = TopologyConfig()
    for field in dataclasses.fields(topology):
        key, value = field.name, getattr(topology, field.name)
        follows = (
            key in ("dp", "world_size")
            or (key == "etp" and value == topology.tp)
            or (key == "sequence_parallel" and value == (topology.tp > 1))
        )
        if not follows and value != getattr(default, key):
            values[f"topology.{key}"] = value
    values["train.micro_batch_size"] = workload.batch.micro_batch_size
    wanted = workload.recompute
    said = Recompute(
        granularity(train), *method_and_layers(train), modules=tuple(train.recompute_modules or ())
    )
    if wanted != said:
        values["train.recompute_granularity"] = wanted.granularity
        if wanted.modules or train.recompute_modules:
            values["train.recompute_modules"] = list(wanted.modules) or None
        if wanted.granularity != "full":
            values |= {
                f"train.recompute_{key}": None
                for key in ("method", "num_layers")
                if getattr(train, f"recompute_{key}") is not None
            }
    return values


def words(workload: Workload, job: Job) -> list[str]:
    """What to type after a command to get this configuration, such as ``["topology.tp=8", ...]``."""
    return [f"{key}={_typed(value)}" for key, value in changes(workload, job).items()]


def as_job(workload: Workload, job: Job) -> Job:
    """The job with this configuration: what composing it with `words` gives."""
    values = changes(workload, job)
    of = {
        section: {key.partition(".")[2]: value for key, value in values.items() if key.startswith(section)}
        for section in ("topology", "train")
    }
    kept = {name: getattr(job.topology, name) for name in ("zero", "fsdp")}
    topology = dataclasses.replace(TopologyConfig(), **kept, **of["topology"])
    return dataclasses.replace(job, topology=topology, train=dataclasses.replace(job.train, **of["train"]))


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
