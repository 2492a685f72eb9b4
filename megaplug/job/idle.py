"""Keys that were set and do nothing for this model: Megatron takes them in silence."""

from __future__ import annotations

import dataclasses

from megaplug.job.schema import Job, MoeConfig

_SHOWN = 3


def idle_keys(job: Job) -> list[str]:
    """Keys for experts that a model without experts does not read, in dotted form.

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
    """One line that names them; none where every key does something."""
    idle = idle_keys(job)
    if not idle:
        return []
    more = f" and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
    do = "does" if len(idle) == 1 else "do"
    return [f"{', '.join(idle[:_SHOWN])}{more} {do} nothing: {job.model.name} has no experts"]
