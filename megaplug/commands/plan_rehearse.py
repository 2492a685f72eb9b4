"""``action=rehearse``: chosen ranks of the real Megatron model without numbers, beside what the plan says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence

import megaplug
from megaplug.commands import cli
from megaplug.commands.plan_job import vocabulary
from megaplug.commands.plan_words import Asked
from megaplug.errors import UserError
from megaplug.job.attention import attention_layers
from megaplug.job.checks import check, job_shape, resolve_topology
from megaplug.job.schema import Job
from megaplug.plan.memory import stage_memory
from megaplug.plan.rehearsal import RankRehearsal, compare, rehearse, rehearsed_job
from megaplug.plan.rehearsal.frozen import differences
from megaplug.plan.rehearsal.show import as_json, as_text
from megaplug.plan.workload import workload_of

_MOST_RANKS = 64


def answer(asked: Asked) -> int:
    """Rehearse the ranks and show each as soon as it is done.

    Raises:
        UserError: The job is impossible or cannot be rehearsed, or it has no such ranks.
    """
    job = asked.job
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, vocab_size=vocabulary(job)))
    told = differences(job)
    job = rehearsed_job(job)
    if problems := check(job, device="cuda"):
        raise UserError.from_problems(problems)
    world_size = resolve_topology(job).world_size
    ranks = asked.ranks(world_size) or default_ranks(job)
    if len(ranks) > _MOST_RANKS:
        raise UserError(
            f"ranks={asked.typed['ranks']} are {len(ranks):,} ranks; {_MOST_RANKS} at most are rehearsed",
            hint="the ranks of one pipeline stage are alike: ranks=[0,7] rehearses two",
        )
    found: list[RankRehearsal] = []
    # However this ends, the line for the person who waits is cleared and the other ranks are ended.
    with contextlib.closing(rehearse(job, ranks)) as rehearsals, contextlib.ExitStack() as ending:
        ending.callback(_progress, [], found)
        _progress(ranks, found)
        for rehearsed in rehearsals:
            found.append(rehearsed)
            if not asked.as_json:
                _progress([], found)
                cli.show(as_text(rehearsed, compare(job, rehearsed)))
            _progress(ranks, found)
    if asked.as_json:
        content = [as_json(rehearsed, compare(job, rehearsed)) for rehearsed in found]
        cli.show(json.dumps({"megaplug": megaplug.__version__, "notes": told, "ranks": content}, indent=2))
    else:
        cli.show("\nThe plan is modelled, the rehearsal counted; what a run has beside it:")
        cli.show("\n".join(f"  - {line}" for line in told))
    return 0


def default_ranks(job: Job) -> list[int]:
    """A rank of the first stage, of the one that needs most memory by the plan, and of the last."""
    topology = resolve_topology(job)
    workload = workload_of(job, topology, job_shape(job))
    fullest = max(range(topology.pp), key=lambda stage: stage_memory(workload, stage).total)
    stages = sorted({0, fullest, topology.pp - 1})
    # Of ranks that share a sequence the last has most where tokens are contiguous, else the first.
    within = 0
    if attention_layers(job.attention).token_layout() == "contiguous":
        within = (topology.cp - 1) * topology.tp
    return [stage * (topology.world_size // topology.pp) + within for stage in stages]


def _progress(ranks: Sequence[int], found: Sequence[RankRehearsal]) -> None:
    """One line for a person who waits; it is cleared with no ranks."""
    if not sys.stderr.isatty():
        return
    line = ""
    if len(found) < len(ranks):
        line = f"rehearsing rank {ranks[len(found)]} ({len(found)} of {len(ranks)} ranks done) ..."
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
