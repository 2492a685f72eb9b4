"""``action=plan``: the whole plan of a job on one screen, or why there is none and what is nearest to it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megaplug
from megaplug.commands import cli
from megaplug.commands.hints import sound, with_words
from megaplug.commands.notes import job_notes, plan_notes, time_notes
from megaplug.commands.plan_refused import Refused, planned_here
from megaplug.commands.plan_words import Asked
from megaplug.errors import Problem, UserError
from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.checks_values import value_problems
from megaplug.job.elsewhere import Judgement, judge, remarks
from megaplug.job.schema import Job
from megaplug.plan.cluster import AUTO, Cluster, cluster_of, format_problem
from megaplug.plan.plan import Plan, make_plan
from megaplug.plan.plan_json import FORMAT, lacking_json, plan_json, precision_json
from megaplug.plan.plan_text import labelled, plan_text
from megaplug.plan.rank_table import rank_rows, table
from megaplug.plan.remedies import nearest_jobs, too_few_ranks
from megaplug.plan.workload import precision_of, workload_of
from megaplug.topology import resolve

_NO_PICTURES = "what is wrong is not the layout, and of a job that cannot be only layouts are drawn"

# Keys of which no layout makes right what is wrong.
_NO_LAYOUTS = ("attention.", "megatron.")


def answer(asked: Asked) -> int:
    """Show the plan; 2 where the job cannot be, or does not fit the cluster."""
    job, folder = asked.job, asked.folder("pictures")
    cluster = cluster_here(job)
    vocab_size = vocabulary(job)
    judged = judge(job, _device(job, cluster), suggest=False)
    job = judged.job
    if judged.problems or _format_problems(job, cluster):
        return _impossible(asked, judged, cluster, vocab_size, folder)
    topology = resolve_topology(job)
    ranks = asked.ranks(topology.world_size)
    plan = plan_of(job, cluster, vocab_size, tokens=asked.count("tokens"))
    rows = rank_rows(topology, plan.workload.shape, ranks, cluster.gpus_per_node)
    refused = _refused(asked, job, cluster, vocab_size, plan.problems) if plan.problems else None
    notes = plan_notes(job, asked.command.overrides, cluster, works=not plan.problems) + time_notes(plan)
    pictures = _draw(plan, folder, job.model.name) if folder is not None else []
    if asked.as_json:
        content = _named(asked) | plan_json(plan, rows) | {"nearest_that_work": []}
        content |= refused.as_json() if refused else {}
        content |= {"pictures": [str(picture) for picture in pictures]} if pictures else {}
        content |= {"notes": notes, "lacking_here": lacking_json(judged.lacking)}
        cli.show(json.dumps(content, indent=2))
        return 2 if refused else 0
    cli.show(f"{job.model.name} on {plan_text(plan)}")
    if rows:
        cli.show(f"\n{table(rows)}")
    if pictures:
        without = f" ({plan.no_time}: no others)" if plan.no_time else ""
        cli.show(f"\npictures       {folder}: {', '.join(picture.name for picture in pictures)}{without}")
    if told := [*notes, *remarks(judged.lacking)]:
        cli.show("\n" + "\n".join(labelled([("note", line) for line in told])))
    if refused:
        sys.stdout.flush()
        raise refused.error
    if job.cluster.name == AUTO:
        cli.show(f"\n{planned_here(cluster)}")
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
    return make_plan(workload, cluster, tokens=training_tokens(job, workload.tokens_per_step, tokens))


def training_tokens(job: Job, tokens_per_step: int, typed: int | None = None) -> int | None:
    """Tokens of the whole training: as typed, else as the job says; None if nothing does."""
    if typed is not None or job.train.tokens is not None:
        return typed or job.train.tokens
    return None if job.train.iters is None else job.train.iters * tokens_per_step


def cluster_here(job: Job) -> Cluster:
    """The cluster of a job; that of this machine for ``cluster=auto``.

    Raises:
        UserError: This machine's GPU has no preset, or the job is to run on what the cluster has not.
    """
    if job.cluster.name != AUTO:
        cluster = cluster_of(job.cluster)
        if job.device not in ("auto", cluster.device):
            has, wanted, other = (
                ("GPUs", "cores", "cpu2") if cluster.device == "cuda" else ("cores", "GPUs", "h100")
            )
            raise UserError(
                f"device={job.device} wants {wanted}, and cluster={cluster.name} has {has}",
                hint=f"leave out one of them, or plan for machines with {wanted}, such as cluster={other}",
            )
        return cluster
    if job.device == "cpu":
        return cluster_of(job.cluster)
    from megaplug.launchers.machine import gpu_name

    cluster = cluster_of(job.cluster, gpu_name())
    if job.device == "cuda" and cluster.device != "cuda":
        raise UserError(
            "device=cuda wants GPUs, and this machine has none that is found",
            hint="leave it out, or plan for machines with GPUs, such as cluster=h100",
        )
    return cluster


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


def _format_problems(job: Job, cluster: Cluster) -> list[Problem]:
    """That the GPUs do not compute in the job's number format; of CPU ranks no time is modelled."""
    problem = format_problem(cluster, precision_of(job).compute) if cluster.device == "cuda" else None
    return [problem] if problem else []


def _draw_impossible(job: Job, cluster: Cluster, vocab_size: int, folder: Path) -> list[Path]:
    """Which layouts can be, where the one that was asked for cannot."""
    topology, _ = resolve(job.topology)
    if topology is None or value_problems(job):
        return []
    from megaplug.plan.pictures import draw_impossible

    workload = workload_of(job, topology, job_shape(job, vocab_size))
    return draw_impossible(workload, cluster, folder, job.model.name)


def _impossible(
    asked: Asked, judged: Judgement, cluster: Cluster, vocab_size: int, folder: Path | None
) -> int:
    """Say for a person or for a program why there is no plan."""
    job, formats = judged.job, _format_problems(judged.job, cluster)
    if value_problems(job):
        # Of sizes that are no sizes nothing is near.
        refused = Refused(judged.problems, (), cluster, job.cluster.name == AUTO)
    else:
        elsewhere = any(problem.key.startswith(_NO_LAYOUTS) for problem in judged.problems)
        refused = _refused(asked, job, cluster, vocab_size, formats, layout=not formats and not elsewhere)
    notes = [*job_notes(asked.job, asked.command.overrides), *remarks(judged.lacking)]
    pictures: list[Path] = []
    if folder is not None:
        pictures = [] if formats else _draw_impossible(job, cluster, vocab_size, folder)
        what = ", ".join(picture.name for picture in pictures)
        notes.append(f"pictures in {folder}: {what}" if pictures else f"no pictures: {_NO_PICTURES}")
    if not asked.as_json:
        raise dataclasses.replace(refused, notes=notes).error
    content = _named(asked) | refused.as_json()
    content |= {"pictures": [str(picture) for picture in pictures]} if pictures else {}
    content |= {"notes": notes, "lacking_here": lacking_json(judged.lacking)}
    cli.show(json.dumps(content, indent=2))
    return 2


def _refused(
    asked: Asked,
    job: Job,
    cluster: Cluster,
    vocab_size: int,
    problems: Sequence[Problem],
    *,
    layout: bool = True,
) -> Refused:
    """All that is wrong, and what would be right: only what leads to a plan is proposed.

    Args:
        asked: The question.
        job: Its job, as judged.
        cluster: The machines.
        vocab_size: Of the model, before padding.
        problems: What is wrong beside what its checks say.
        layout: Whether another layout can be right.
    """
    remedies = nearest_jobs(job, cluster, vocab_size) if layout else []
    # The nearest legal layouts are named only where none of them fits the cluster, too.
    found = [*judge(job, _device(job, cluster), suggest=not remedies).problems, *problems]
    topology, _ = resolve(job.topology)
    if topology is not None and not job.topology.auto:
        found += too_few_ranks(job, topology.world_size, job_shape(job, vocab_size), cluster)
    hints = sound(found, lambda words: _works(asked, words))
    return Refused(hints, remedies, cluster, job.cluster.name == AUTO)


def _works(asked: Asked, words: Sequence[str]) -> bool:
    """Whether there is a plan with these overrides added to the command."""
    try:
        job = with_words(asked.job, asked.job_words, asked.command.source, words)
        cluster = cluster_here(job)
        judged = judge(job, _device(job, cluster), suggest=False)
        problems = judged.problems or plan_of(judged.job, cluster, vocabulary(job)).problems
    except UserError:
        return False
    return not problems


def _named(asked: Asked) -> dict[str, Any]:
    """What a program needs to know which answer this is, and of which job."""
    job = asked.job
    return {
        "megaplug": megaplug.__version__,
        "format": FORMAT,
        "model": job.model.name,
        "precision": precision_json(precision_of(job)),
    }
