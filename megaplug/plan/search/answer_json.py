"""The answer of a search for a program: what was considered, and each row in the words of ``action=plan``."""

from __future__ import annotations

from typing import Any

import megaplug
from megaplug.job.schema import Job
from megaplug.plan.plan_json import plan_json
from megaplug.plan.search.answer import Answer, Row
from megaplug.plan.search.chosen import words
from megaplug.plan.search.text import layout, recompute

FORMAT = 1
"""Of the search's JSON: it rises when a key goes or comes to mean something else, not when one is added."""

SECTIONS = ("topology", "batch", "pipeline", "step_time", "speed", "training")
"""Of a plan's JSON, those that each row has as they are; of ``memory`` it has the fullest stage alone."""


def answer_json(answer: Answer, job: Job) -> dict[str, Any]:
    """All of an answer as plain values, in SI units.

    Args:
        answer: What was found; it has rows.
        job: The job that was asked about.
    """
    first = answer.rows[0].plan
    best = plan_json(first)
    return {
        "format": FORMAT,
        "megaplug": megaplug.__version__,
        "possible": True,
        "model": job.model.name,
        "precision": first.workload.precision.compute,
        "world_size": first.world_size,
        "num_nodes": first.num_nodes,
        "cluster": best["cluster"],
        "parameters": {key: best["parameters"][key] for key in ("label", "total", "active")},
        "ranked_by": answer.ranked_by,
        "mean_relative_error_of_time": answer.error,
        "note": answer.note,
        "considered": {
            "grids": answer.tally.num_grids,
            "grids_forbidden": answer.tally.broken,
            "grids_legal": answer.tally.num_legal,
            "configurations_legal": answer.num_legal,
            "configurations_that_fit": answer.num_fit,
            "left_out": answer.refused,
            "gave_up": answer.gave_up,
            "seconds": answer.seconds,
        },
        "rows": [_row(row, job) for row in answer.rows],
        "pareto_front": [_row(row, job) for row in answer.front],
    }


def _row(row: Row, job: Job) -> dict[str, Any]:
    plan = plan_json(row.plan)
    memory = plan["memory"]
    return {
        "overrides": words(row.workload, job),
        "layout": layout(row.workload),
        "recompute": recompute(row.workload.recompute),
        "on_pareto_front": row.on_front,
        "within_the_error_of_the_first": row.near_first,
        "memory": memory | {"stages": [memory["stages"][memory["fullest_stage"]]]},
        **{name: plan[name] for name in SECTIONS},
    }
