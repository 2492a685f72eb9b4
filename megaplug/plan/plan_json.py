"""A plan for a program: every figure in SI units, with where it comes from and how FLOPs are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import megaplug
from megaplug.errors import Problem, UserError
from megaplug.plan.plan import Plan
from megaplug.plan.plan_text import PARTS, TIMES
from megaplug.plan.rank_table import RankRow
from megaplug.plan.workload import Precision

FORMAT = 1
"""Of the plan's JSON: it rises when a key goes or comes to mean something else, not when one is added."""

CONVENTIONS = {
    "causal": "model FLOPs, forward and backward; attention as the causal mask leaves it",
    "full": "model FLOPs, forward and backward; attention over the whole square of scores",
}
"""How FLOPs are counted; see ``megaplug/job/flops.py``."""


def plan_json(plan: Plan, rows: Sequence[RankRow] = ()) -> dict[str, Any]:
    """All of a plan as plain values.

    Args:
        plan: The plan.
        rows: Ranks that were asked for.
    """
    job, cluster = plan.workload, plan.cluster
    content: dict[str, Any] = {
        "megaplug": megaplug.__version__,
        "format": FORMAT,
        "precision": precision_json(job.precision),
        "possible": not plan.problems,
        "problems": problems_json(plan.problems),
        "topology": asdict(job.topology),
        "batch": {
            "micro_batch_size": job.batch.micro_batch_size,
            "global_batch_size": job.batch.global_batch_size,
            "num_microbatches": job.num_microbatches,
            "seq_length": job.shape.seq_length,
            "tokens_per_step": job.tokens_per_step,
        },
        "pipeline": {
            "label": "counted",
            "bubble_of_equal_stages": plan.bubble,
            "num_microbatches_for_5_percent": plan.microbatches_for(0.05),
        },
        "cluster": asdict(cluster) | {"label": "published", "units": "bytes, bytes/s, FLOP/s"},
        "parameters": {
            "label": "counted",
            "total": plan.parameters,
            "total_with_padded_vocabulary": plan.parameters_padded,
            "active": plan.active,
        },
        "memory": _memory(plan),
        "step_time": _time(plan),
        "speed": _speed(plan),
        "training": _training(plan),
    }
    if rows:
        content["ranks"] = [row.as_json() for row in rows]
    return content


def error_json(error: UserError) -> dict[str, Any]:
    """Why there is no answer, as plain values: keys that an impossible job's plan has, too."""
    return {
        "megaplug": megaplug.__version__,
        "format": FORMAT,
        "possible": False,
        "problems": problems_json(error.problems),
        "exit_code": error.exit_code,
    }


def precision_json(precision: Precision) -> dict[str, Any]:
    """The number formats of a job as plain values."""
    return {
        "compute": precision.compute,
        "unit": "bytes a parameter",
        "weights": precision.parameter,
        "gradients": precision.gradient,
        "optimizer": precision.optimizer,
    }


def problems_json(problems: Sequence[Problem]) -> list[dict[str, str | bool]]:
    """Problems as plain values."""
    return [
        {
            "key": each.key,
            "message": each.message,
            "hint": each.hint,
            "megatron_accepts": each.megatron_accepts,
        }
        for each in problems
    ]


def lacking_json(lacking: Sequence[Problem]) -> list[dict[str, str]]:
    """What only this machine lacks, as plain values."""
    return [{"lacks": each.lacks, "key": each.key, "hint": each.hint} for each in lacking]


def _memory(plan: Plan) -> dict[str, Any]:
    return {
        "label": "modelled",
        "unit": "bytes a rank",
        "usable": plan.cluster.usable_memory,
        "fits": plan.spare_memory >= 0,
        "spare": plan.spare_memory,
        "fullest_stage": plan.fullest.stage,
        "stages": [
            {
                "stage": stage.stage,
                "layers": stage.layers,
                "parameters": stage.parameters,
                **{part: getattr(stage.memory, part) for part in PARTS},
                "total": stage.memory.total,
                "on_cpu": stage.memory.on_cpu,
            }
            for stage in plan.stages
        ],
    }


def _time(plan: Plan) -> dict[str, Any] | None:
    if plan.time is None:
        return None
    return {
        "label": "modelled",
        "unit": "seconds",
        "total": plan.time.total,
        "mean_relative_error": plan.time.error,
        **{name: getattr(plan.time, name) for name in TIMES},
    }


def _speed(plan: Plan) -> dict[str, Any] | None:
    rate = plan.tokens_per_second
    if rate is None:
        return None
    return {
        "label": "modelled",
        "flop_conventions": CONVENTIONS,
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / plan.world_size,
        "flops_per_token": plan.flops_per_token,
        "flops_per_second_per_gpu": plan.flops_per_gpu,
        "peak_flops": plan.peak_flops,
        "peak_format": plan.workload.precision.peak_format,
        "mfu": plan.mfu,
    }


def _training(plan: Plan) -> dict[str, Any] | None:
    if plan.tokens is None:
        return None
    return {
        "label": "modelled",
        "tokens": plan.tokens,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "us_dollars": plan.dollars,
    }
