"""The plan of a job that is about to start, in a few rows of its header."""

from __future__ import annotations

from typing import Any

from megaplug.commands.plan_job import cluster_here
from megaplug.commands.resolved import Resolved
from megaplug.errors import UserError
from megaplug.plan.cluster import AUTO
from megaplug.plan.plan import Plan, make_plan
from megaplug.plan.plan_json import plan_json
from megaplug.plan.plan_text import rank_memory, short_rows
from megaplug.plan.workload import workload_of


def plan_rows(resolved: Resolved) -> list[tuple[str, str]]:
    """Memory against the device, step time, speed and duration; a warning where it will not fit.

    On this machine's CPUs only memory: all ranks share the machine's, which is asked before they start.
    """
    try:
        plan = _plan(resolved)
    except UserError as error:
        return [("memory", str(resolved.memory)), ("no plan", f"{error.message}; {error.hint}")]
    if resolved.job.cluster.name == AUTO and plan.cluster.device == "cpu":
        return [("memory", rank_memory(plan))]
    # The model of memory may err, so a start is not refused.
    warnings = [("WARNING", f"{problem.key}: {problem.message}") for problem in plan.problems]
    return [*short_rows(plan), *warnings]


def planned_json(resolved: Resolved) -> dict[str, Any]:
    """The whole plan as plain values; only ``no_plan``, and why, where it cannot be made."""
    try:
        return plan_json(_plan(resolved))
    except UserError as error:
        return {"no_plan": f"{error.message}; {error.hint}"}


def _plan(resolved: Resolved) -> Plan:
    workload = workload_of(resolved.job, resolved.topology, resolved.shape)
    return make_plan(workload, cluster_here(resolved.job), tokens=resolved.derived.tokens)
