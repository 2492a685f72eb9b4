"""A job judged for other machines: what only this one lacks is told, and is not wrong.

A launch asks `checks.check`, which refuses what cannot run here. A plan is made for a cluster, on whatever
machine: there the packages that the job needs can be installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megaplug.errors import Problem
from megaplug.job.attention import attention_layers, name_key
from megaplug.job.checks import check
from megaplug.job.packages import backend_problem
from megaplug.job.schema import Job


@dataclass(frozen=True)
class Judgement:
    """What can be said of a job wherever it runs.

    Attributes:
        job: It; its backend is ``te`` where it can run only with Transformer Engine.
        problems: What is wrong on every machine.
        lacking: What would be wrong on this one alone, each with what it lacks.
    """

    job: Job
    problems: list[Problem]
    lacking: list[Problem]


def judge(job: Job, device: str, *, suggest: bool = True) -> Judgement:
    """Check a job for machines that have every package it needs.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda``, of those machines.
        suggest: Whether the nearest rank grids are looked for where this one is not possible.
    """
    if device == "cuda" and job.backend == "auto" and job.kernels.te != "off" and te_needed_for(job):
        job = dataclasses.replace(job, backend="te")
    found = check(job, device=device, suggest=suggest)
    if backend := backend_problem(job, device, te_needed_for(job)):
        found.append(backend)
    lacking = [problem for problem in found if problem.lacks]
    return Judgement(job, [problem for problem in found if not problem.lacks], lacking)


def te_needed_for(job: Job) -> str:
    """The key by which a job runs only where Transformer Engine is installed; empty if none does."""
    wanted = {
        name_key(job.attention): "te" in attention_layers(job.attention).names,
        "kernels.te": job.kernels.te == "require",
        "precision.fp8_format": job.precision.fp8_format is not None,
        "overlap.tp_comm_overlap": job.overlap.tp_comm_overlap is True,
        "cuda_graph.cuda_graph_impl": job.cuda_graph.cuda_graph_impl == "transformer_engine",
        "optimizer.use_precision_aware_optimizer": job.optimizer.use_precision_aware_optimizer is True
        and not job.optimizer.optimizer_cpu_offload,
        "train.cpu_offloading_num_layers": job.train.cpu_offloading_num_layers > 0,
        "train.fine_grained_activation_offloading": job.train.fine_grained_activation_offloading,
    }
    return next((key for key, is_wanted in wanted.items() if is_wanted), "")


def remarks(lacking: Sequence[Problem]) -> list[str]:
    """A line for each package that this machine lacks, with the keys that ask for it."""
    keys: dict[str, list[str]] = {}
    for problem in lacking:
        keys.setdefault(problem.lacks, []).append(problem.key)
    return [
        f"this machine lacks {what}, which {' and '.join(dict.fromkeys(of))} "
        f"{'needs' if len(set(of)) == 1 else 'need'}: install it where the job runs"
        for what, of in keys.items()
    ]
