"""``action=plan``: the whole plan of a job on one screen, or why there is none and what is nearest to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megaplug.commands import cli
from megaplug.commands.plan_words import Asked
from megaplug.errors import Problem, UserError
from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.checks_values import value_problems
from megaplug.job.elsewhere import Judgement, judge, remarks
from megaplug.job.schema import Job
from megaplug.plan.cluster import AUTO, Cluster, cluster_of
from megaplug.plan.plan import Plan, make_plan
from megaplug.plan.plan_json import lacking_json, plan_json, problems_json
from megaplug.plan.plan_text import plan_text
from megaplug.plan.rank_table import rank_rows, table
from megaplug.plan.remedies import Remedy, nearest_jobs, too_few_ranks
from megaplug.plan.workload import workload_of
from megaplug.topology import resolve


def answer(asked: Asked) -> int:
    """Show the plan; 2 where the job cannot be, or does not fit the cluster."""
    job, folder = asked.job, asked.folder("pictures")
    cluster = cluster_here(job)
    vocab_size = vocabulary(job)
    device = _device(job, cluster)
    judged = judge(job, device, suggest=False)
    job = judged.job
    if judged.problems:
        return _impossible(asked, judged, device, cluster, vocab_size)
    topology = resolve_topology(job)
    ranks = asked.ranks(topology.world_size)
    plan = plan_of(job, cluster, vocab_size, tokens=asked.count("tokens"))
    rows = rank_rows(topology, plan.workload.shape, ranks, cluster.gpus_per_node)
    problems = plan.problems
    if problems:
        problems += too_few_ranks(job, topology.world_size, plan.workload.shape, cluster)
    remedies = nearest_jobs(job, cluster, vocab_size) if problems else []
    pictures = _draw(plan, folder, job.model.name) if folder is not None else []
    if asked.as_json:
        content = plan_json(plan, rows) | {"problems": problems_json(problems)}
        content |= {"nearest_that_work": [_remedy_json(found) for found in remedies]}
        content |= {"pictures": [str(picture) for picture in pictures]} if pictures else {}
        content |= {"lacking_here": lacking_json(judged.lacking)}
        cli.show(json.dumps(content, indent=2))
        return 2 if problems else 0
    cli.show(f"{job.model.name} on {plan_text(plan)}")
    if rows:
        cli.show(f"\n{table(rows)}")
    if pictures:
        without = f" ({plan.no_time}: no others)" if plan.no_time else ""
        cli.show(f"\npictures       {folder}: {', '.join(picture.name for picture in pictures)}{without}")
    if judged.lacking:
        cli.show("\n" + "\n".join(remarks(judged.lacking)))
    if problems:
        sys.stdout.flush()
        raise _error(job, cluster, problems, remedies, ())
    if job.cluster.name == AUTO:
        cli.show(f"\n{_here(cluster)}")
    return 0


def plan_of(job: Job, cluster: Cluster, vocab_size: int, *, tokens: int | None = None) -> Plan:
    """The plan of a job that has passed its checks.

    Args:
        job: The job.
        cluster: The machines.
        vocab_size: Of the model, before padding.
        tokens: Of the whole training; those that the job says if not given.

    Raises:
        UserError: As `make_plan`.
    """
    workload = workload_of(job, resolve_topology(job), job_shape(job, vocab_size))
    if tokens is None:
        tokens = job.train.tokens
    if tokens is None and job.train.iters is not None:
        tokens = job.train.iters * workload.tokens_per_step
    return make_plan(workload, cluster, tokens=tokens)


def cluster_here(job: Job) -> Cluster:
    """The cluster of a job; that of this machine for ``cluster=auto``.

    Raises:
        UserError: This machine's GPU has no preset.
    """
    if job.cluster.name != AUTO or job.device == "cpu":
        return cluster_of(job.cluster)
    from megaplug.launchers.machine import gpu_name

    return cluster_of(job.cluster, gpu_name())


def vocabulary(job: Job) -> int:
    """The vocabulary of a job's model: its own, or that of its tokenizer.

    Raises:
        UserError: It is that of a tokenizer which cannot be read.
    """
    if job.model.vocab_size is not None:
        return job.model.vocab_size
    from megaplug.data.tokenizers import load_tokenizer

    try:
        return load_tokenizer(job.tokenizer).vocab_size
    except UserError as error:
        hint = f"{error.hint}; or give the size: model.vocab_size=32000"
        raise UserError(
            f"the vocabulary is the tokenizer's, and it cannot be read: {error.message}", hint=hint
        ) from error


def _draw(plan: Plan, folder: Path, name: str) -> list[Path]:
    from megaplug.plan.pictures import draw_plan_pictures

    return draw_plan_pictures(plan.workload, plan.cluster, folder, name)


def _device(job: Job, cluster: Cluster) -> str:
    return cluster.device if job.device == "auto" else job.device


def _impossible(asked: Asked, judged: Judgement, device: str, cluster: Cluster, vocab_size: int) -> int:
    """Why there is no plan, and the nearest jobs of which there is one."""
    job = judged.job
    if value_problems(job):
        # Of sizes that are no sizes nothing is near.
        return _refuse(asked, UserError.from_problems(judged.problems), judged.problems, judged.lacking)
    remedies = nearest_jobs(job, cluster, vocab_size)
    # The nearest legal layouts are named only where none of them fits the cluster, too.
    problems = judge(job, device, suggest=not remedies).problems
    topology, _ = resolve(job.topology)
    if topology is not None:
        problems += too_few_ranks(job, topology.world_size, job_shape(job, vocab_size), cluster)
    error = _error(job, cluster, problems, remedies, judged.lacking)
    return _refuse(asked, error, problems, judged.lacking, remedies)


def _refuse(
    asked: Asked,
    error: UserError,
    problems: Sequence[Problem],
    lacking: Sequence[Problem],
    remedies: Sequence[Remedy] = (),
) -> int:
    """Say for a person or for a program that there is no plan."""
    if not asked.as_json:
        raise error
    content = {
        "possible": False,
        "problems": problems_json(problems),
        "nearest_that_work": [_remedy_json(found) for found in remedies],
        "lacking_here": lacking_json(lacking),
    }
    cli.show(json.dumps(content, indent=2))
    return 2


def _error(
    job: Job,
    cluster: Cluster,
    problems: Sequence[Problem],
    remedies: Sequence[Remedy],
    lacking: Sequence[Problem],
) -> UserError:
    lines = [str(UserError.from_problems(problems))]
    if remedies:
        lines.append("  the nearest that work (modelled), to be added to the command:")
        lines += [f"    {found}" for found in remedies]
    lines += [f"  {line}" for line in remarks(lacking)]
    if job.cluster.name == AUTO:
        lines.append(f"  {_here(cluster)}")
    return UserError("\n".join(lines))


def _here(cluster: Cluster) -> str:
    return f"planned for this machine ({cluster.name}); cluster=h100 plans for others: --help cluster"


def _remedy_json(remedy: Remedy) -> dict[str, object]:
    return {
        "overrides": list(remedy.words),
        "world_size": remedy.world_size,
        "layout": remedy.label,
        "memory_bytes_per_rank_modelled": remedy.memory,
    }
