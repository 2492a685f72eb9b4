"""A search for a job as it was typed: for ``action=search``, and for ``topology=auto``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megaplug.commands.plan_job import cluster_here, training_tokens, vocabulary
from megaplug.errors import Problem, UserError
from megaplug.job import overrides
from megaplug.job.checks import job_shape
from megaplug.job.checks_values import value_problems
from megaplug.job.elsewhere import judge
from megaplug.job.schema import Job
from megaplug.plan.cluster import Cluster
from megaplug.plan.search.answer import Answer, find
from megaplug.plan.search.chosen import as_job, words
from megaplug.plan.search.limits import limited
from megaplug.plan.search.nothing import error_of
from megaplug.plan.search.request import space_of
from megaplug.plan.search.text import layout
from megaplug.plan.workload import workload_of
from megaplug.topology import Topology

_ONE_RANK = Topology(1, 1, None, 1, 1, 1, 1, 1)
_SILENT_S = 1.0


@dataclass(frozen=True)
class Searched:
    """What was found for a job.

    Attributes:
        answer: Its rows; there is at least one.
        cluster: The machines.
        lacking: What only this machine lacks for the job.
    """

    answer: Answer
    cluster: Cluster
    lacking: Sequence[Problem] = ()


def search(
    job: Job,
    typed_words: Sequence[str],
    *,
    top: int = 10,
    with_front: bool = True,
    tokens: int | None = None,
) -> Searched:
    """The best configurations of a job.

    Args:
        job: As composed.
        typed_words: Its overrides; the keys among them stay as they are.
        top: How many are wanted.
        with_front: Whether the Pareto front of memory against time is wanted, too.
        tokens: Of the whole training; those that the job says if not given.

    Raises:
        UserError: Nothing is legal, nothing fits, or what was typed cannot be.
    """
    cluster = cluster_here(job)
    device = cluster.device if job.device == "auto" else job.device
    judged = judge(job, device, suggest=False)
    job = judged.job
    if problems := value_problems(job):
        raise UserError.from_problems(problems)
    shape = job_shape(job, vocabulary(job))
    typed = {found.key_or_group for found in overrides.parse(typed_words)}
    space = space_of(job, shape, typed, cluster.num_gpus)
    template = workload_of(job, _ONE_RANK, shape)

    def problems_of(candidate: Job) -> list[Problem]:
        return judge(candidate, device, suggest=False).problems

    asked, space = space, limited(space, job, template, problems_of)
    with _Progress() as progress:
        answer = find(
            space,
            template,
            cluster,
            top=top,
            with_front=with_front,
            tokens=training_tokens(job, template.tokens_per_step, tokens),
            problems_of=lambda workload: problems_of(as_job(workload, job)),
            progress=progress.show,
        )
    if not answer.num_fit:
        inherited = "" if "model.seq_length" in typed else f"model={job.model.name}"
        raise error_of(answer, asked, template, cluster, inherited=inherited)
    if not answer.rows:
        reason = next(iter(answer.refused))
        raise UserError(f"{answer.num_fit:,} configurations fit, but none of the best can be run: {reason}")
    return Searched(answer, cluster, judged.lacking)


def choose(job: Job, typed_words: Sequence[str]) -> Job:
    """The job with the best topology found for it, which is shown.

    The search is deterministic, and the job becomes the one that typing the chosen sizes gives: the same
    command finds its run again.

    Raises:
        UserError: As `search`.
    """
    found = search(job, typed_words, top=1, with_front=False)
    answer, row = found.answer, found.answer.rows[0]
    shown = " ".join(words(row.workload, job))
    seconds = "" if row.time is None else f", {row.time.total:.3g} s a step (modelled)"
    print(
        f"topology=auto: {layout(row.workload)}{seconds}, the first of {answer.num_fit:,} that fit "
        f"{found.cluster.name} of {answer.num_legal:,} legal ones, by {answer.ranked_by}: {shown}",
        file=sys.stderr,
    )
    return as_job(row.workload, job)


class _Progress:
    """How far a search has come, on a terminal and where it takes more than a second."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._shown = False

    def __enter__(self) -> _Progress:
        return self

    def show(self, done: int, total: int) -> None:
        """Say how many of how many configurations are scored."""
        if sys.stderr.isatty() and time.perf_counter() - self._started > _SILENT_S:
            self._shown = True
            print(f"\r{done:,} of {total:,} configurations", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
