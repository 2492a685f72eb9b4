"""Memory and time of every configuration of a space, from the same formulas as those of one job.

`stage_memory` and `step_parts` are asked once for a family of configurations, with columns in place of sizes
(``columns.py``). Of a pipeline's stages only those are asked that can be the fullest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from megaplug.plan.memory import stage_memory
from megaplug.plan.numbers import most
from megaplug.plan.search.clock import Clock
from megaplug.plan.search.columns import Numbers, by_columns, in_parts
from megaplug.plan.search.grids import Family, Legal
from megaplug.plan.search.space import Space
from megaplug.plan.telling_stages import stages_unlike
from megaplug.plan.workload import Recompute, Workload

Formula = Callable[[Workload], Any]
"""A number of a workload, or a column of them for one with columns in it."""


@dataclass(frozen=True)
class Scored:
    """A family of configurations with one choice of recomputation, and what each needs.

    Attributes:
        family: The configurations.
        recompute: What all of them compute again.
        memory: Bytes of the fullest stage's ranks.
        seconds: Of a step; NaN where it does not fit or no time is modelled.
    """

    family: Family
    recompute: Recompute
    memory: Numbers
    seconds: Numbers


def score(
    space: Space,
    found: Legal,
    template: Workload,
    usable_memory: float,
    clock: Clock | None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Scored]:
    """Memory of every legal configuration, and the time of those that fit.

    Args:
        space: What was searched.
        found: What is legal in it.
        template: The job; its topology, batch and recomputation are replaced.
        usable_memory: Bytes of a GPU that a rank may take.
        clock: How long a step takes; None if that is not modelled.
        progress: Told how many configurations were scored since it was last told.
    """
    scored = []
    for family in found.families:
        fullest = _fullest(telling_stages(family, space))
        for recompute in space.recomputes:
            at = partial(workload_at, space, family, recompute, template)
            memory = by_columns(lambda at=at, fullest=fullest, **sizes: fullest(at(**sizes)), family.sizes)
            scored.append(Scored(family, recompute, memory, np.full(len(family), np.nan)))
            fits = np.flatnonzero(memory <= usable_memory)
            if clock is not None and len(fits):
                sizes = {name: values[fits] for name, values in family.sizes.items()}
                for part, terms in in_parts(lambda at=at, **sizes: clock.terms(at(**sizes)), sizes):
                    clock.ask(terms, scored[-1].seconds, fits[part])
            progress(len(family))
    if clock is not None:
        clock.answer()
    return scored


def workload_at(
    space: Space, family: Family, recompute: Recompute, template: Workload, **sizes: int
) -> Workload:
    """The workload of one configuration, or of all of them if sizes are columns."""
    return replace(
        template,
        topology=family.topology(space.world_size, **sizes),
        batch=space.batch(sizes["micro_batch_size"]),
        recompute=recompute,
    )


def telling_stages(family: Family, space: Space) -> list[int]:
    """The stages one of which is the fullest, of all configurations of a family; see `stages_unlike`."""
    only = family.topology(family.pp, tp=1, cp=1, dp=1, ep=1, etp=1)
    return stages_unlike(only, space.shape)


def _fullest(stages: list[int]) -> Formula:
    def fullest(workload: Workload) -> Any:
        found: Any = 0
        for stage in stages:
            found = most(found, stage_memory(workload, stage).total)
        return found

    return fullest
