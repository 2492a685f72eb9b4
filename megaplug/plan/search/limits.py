"""What the rest of a job forbids a layout: the smallest jobs that show it are checked.

An attention may have no context parallelism, a way of sharding no pipeline, an FP8 recipe no recomputed
norms. Such rules are those of ``job/checks.py``; they are asked here before anything is enumerated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.job.schema import Job
from megaplug.plan.search.chosen import as_job
from megaplug.plan.search.space import Space
from megaplug.plan.workload import Recompute, Workload
from megaplug.topology import Batch, Topology, violations

Check = Callable[[Job], list[Problem]]
_DIMENSIONS = ("tp", "pp", "cp", "ep")


def limited(space: Space, job: Job, template: Workload, check: Check) -> Space:
    """The space without what the rest of the job forbids.

    Args:
        space: What was to be searched.
        job: The job.
        template: It as a workload.
        check: What is wrong with a job.

    Raises:
        UserError: Something is wrong with the job whatever its layout, or with all that is left to choose.
    """
    one = Topology(1, 1, None, 1, 1, 1, 1, 1)
    plain = dataclasses.replace(template, topology=one, batch=Batch(1, space.global_batch_size))
    plain = dataclasses.replace(plain, recompute=Recompute())
    if problems := check(as_job(plain, job)):
        raise UserError.from_problems(problems)
    fixed, fixed_by = dict(space.fixed), {}
    for name in _DIMENSIONS:
        if name not in fixed:
            # Two ranks: the experts' tensor parallelism follows tp, and ep needs data-parallel ranks.
            sizes: dict[str, Any] = {name: 2, "world_size": 2}
            sizes |= {"tp": {"etp": 2, "sequence_parallel": True}, "ep": {"dp": 2}}.get(name, {})
            workload = dataclasses.replace(plain, topology=dataclasses.replace(one, **sizes))
            legal = not violations(workload.topology, workload.shape, workload.batch)
            if legal and (problems := check(as_job(workload, job))):
                fixed[name], fixed_by[name] = 1, problems[0].message
    refused: list[Problem] = []
    recomputes = []
    for choice in space.recomputes:
        problems = check(as_job(dataclasses.replace(plain, recompute=choice), job))
        refused += problems
        recomputes += [] if problems else [choice]
    if not recomputes:
        raise UserError.from_problems(refused)
    return dataclasses.replace(space, fixed=fixed, fixed_by=fixed_by, recomputes=tuple(recomputes))
