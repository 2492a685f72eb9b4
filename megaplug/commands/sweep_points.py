"""Which points of a sweep are run, and why not the others: all are checked, and none is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megaplug.commands.batch_job import on_nodes
from megaplug.commands.plan_job import cluster_here
from megaplug.commands.resolved import Resolved, resolve
from megaplug.errors import Problem, UserError
from megaplug.job.checks_values import value_of
from megaplug.job.compose import ConfigSource, compose_job, sweep_points
from megaplug.job.identity import digest
from megaplug.job.schema import Job, SlurmConfig, SweepConfig
from megaplug.plan.cluster import AUTO
from megaplug.plan.plan import make_plan
from megaplug.plan.workload import workload_of
from megaplug.runs.early_stop import has_stopped
from megaplug.runs.folder import RunFolder, find_latest
from megaplug.runs.metrics import read_metrics
from megaplug.runs.state import RunState, read_state

# Where, and how, the sweep as a whole is run.
_OF_ALL = (
    "runs_dir", "launch.kind", "launch.output", "launch.max_gpu_hours", "launch.submit", "launch.at_once",
    *(f"slurm.{item.name}" for item in fields(SlurmConfig)),
    *(f"sweep.{item.name}" for item in fields(SweepConfig)),
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One combination of the values that a sweep names.

    Attributes:
        number: In the order typed, from 1.
        words: Its overrides.
        own: Those of them that not all points have; all where there are none.
        job: With the topology chosen for it; None where it cannot be composed.
        problems: Why it cannot be run; none if it can.
        run: Its run's name without a number, ``<name>-<digest>``: all that decides its result.
        repeats: The number of an earlier point with the same run; None if there is none.
        is_done: Whether its run has come to its end already.
        gpu_hours: Modelled, of what is left of it; None where no time is modelled.
        no_hours: Why not.
    """

    number: int
    words: tuple[str, ...]
    own: tuple[str, ...]
    job: Job | None = None
    problems: tuple[Problem, ...] = ()
    run: str = ""
    repeats: int | None = None
    is_done: bool = False
    gpu_hours: float | None = None
    no_hours: str = ""

    @property
    def folder(self) -> RunFolder:
        """The newest folder of its run; where there is none yet, the one that it will have."""
        assert self.job is not None and self.run
        name, _, run_digest = self.run.rpartition("-")
        runs_dir = Path(self.job.runs_dir)
        return find_latest(runs_dir, name, run_digest) or RunFolder(runs_dir / self.run)


@dataclass(frozen=True)
class Points:
    """A sweep that has been checked.

    Attributes:
        all: Every point, in the order typed.
        place: Where the sweep's own files go, if its runs do not say.
    """

    all: tuple[Point, ...]
    place: Path | None = None

    @property
    def impossible(self) -> list[Point]:
        """Those that cannot be run."""
        return [point for point in self.all if point.problems]

    @property
    def repeated(self) -> list[Point]:
        """Those that an earlier one stands for."""
        return [point for point in self.all if point.repeats is not None]

    @property
    def runs(self) -> list[Point]:
        """Those that have a run of their own, finished or not."""
        return [point for point in self.all if not point.problems and point.repeats is None]

    @property
    def left(self) -> list[Point]:
        """Those whose run is not finished."""
        return [point for point in self.runs if not point.is_done]

    @property
    def gpu_hours(self) -> float:
        """Modelled, of all that is left, as far as it is known."""
        return sum(point.gpu_hours or 0.0 for point in self.left)

    @property
    def without_hours(self) -> list[Point]:
        """Those left for which no time is modelled."""
        return [point for point in self.left if point.gpu_hours is None]

    @property
    def job(self) -> Job | None:
        """A job that says where and how all are run; None where no point can be composed."""
        return next((point.job for point in self.all if point.job is not None), None)

    @property
    def folder(self) -> Path | None:
        """Where the sweep's own files go: named by its runs, in whatever order; None where there is none."""
        if self.place is not None:
            return self.place
        if self.job is None or not self.runs:
            return None
        name = digest({"runs": sorted(point.run for point in self.runs)})
        return Path(self.job.runs_dir) / "sweeps" / name


def check_points(typed_words: Sequence[str], source: ConfigSource) -> Points:
    """Compose and check every point as a run of its own would be, and find those that are one run.

    Args:
        typed_words: The overrides of the sweep.
        source: Where configuration is read from.

    Raises:
        UserError: A word is misspelt, or names several values of what all points share.
    """
    all_words = sweep_points(typed_words, source)
    composed = [
        _composed(number, words, own, source)
        for number, (words, own) in enumerate(zip(all_words, _own(all_words), strict=True), start=1)
    ]
    _one_for_all([point.job for point in composed if point.job is not None])
    points = Points(())
    for point in composed:
        points = _with(points, _checked(point))
    return points


def add_point(points: Points, words: Sequence[str], own: Sequence[str], source: ConfigSource) -> Points:
    """The same sweep with one more point, composed and checked.

    Args:
        points: The sweep.
        words: The overrides of the point.
        own: Those of them that not all points have.
        source: Where configuration is read from.

    Raises:
        UserError: As `check_points`.
    """
    point = _composed(len(points.all) + 1, words, tuple(own), source)
    _one_for_all([job for job in (points.job, point.job) if job is not None])
    return _with(points, _checked(point))


def _with(points: Points, point: Point) -> Points:
    """With one more point, which repeats an earlier one whose run is its own."""
    if point.run and not point.problems:
        first = next((each.number for each in points.runs if each.run == point.run), None)
        point = replace(point, repeats=first)
    return replace(points, all=(*points.all, point))


def _own(points: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Of every point the words that differ between the points."""
    places = [place for place, words in enumerate(zip(*points, strict=True)) if len(set(words)) > 1]
    return [tuple(words[place] for place in places) or tuple(words) for words in points]


def _composed(number: int, words: Sequence[str], own: tuple[str, ...], source: ConfigSource) -> Point:
    point = Point(number, tuple(words), own)
    try:
        job = compose_job(words, source)
        if job.topology.auto:
            from megaplug.commands.searched import choose

            job = choose(job, words)
        if job.launch.kind == "slurm":
            job = on_nodes(job)
    except UserError as error:
        return replace(point, problems=error.problems)
    return replace(point, job=job)


def _one_for_all(jobs: Sequence[Job]) -> None:
    for key in _OF_ALL:
        found = {str(value_of(job, key)) for job in jobs}
        if len(found) > 1:
            message = f"{key} is one for the whole sweep, and there are {' and '.join(sorted(found))}"
            raise UserError(message, hint="start a sweep for each")
    if any(job.launch.kind == "nodes" for job in jobs):
        message = "launch=nodes is one job on several machines, and a sweep has many"
        raise UserError(message, hint="launch=slurm queues them, launch=local runs them here")
    if any(job.launch.kind == "slurm" and job.slurm.chain > 1 for job in jobs):
        message = "slurm.chain queues one run several times, and a sweep is an array"
        raise UserError(message, hint="leave it out: the runs of an array are queued again by themselves")


def _checked(point: Point) -> Point:
    job = point.job
    if job is None:
        return point
    # What is only shown may be for another machine, if one is named.
    here = job.launch.kind == "local" or (job.launch.kind == "print" and job.cluster.name == AUTO)
    try:
        resolved = resolve(job, on_this_machine=here)
        point = replace(point, run=f"{resolved.job.name}-{resolved.digest}")
        state = read_state(point.folder.state_file) if resolved.job.resume else None
        is_done = state is not None and _is_done(resolved, point.folder, state)
    except UserError as error:
        return replace(point, problems=error.problems)
    hours, no_hours = (0.0, "") if is_done else _hours(resolved.job if here else job, resolved, state)
    return replace(point, is_done=is_done, gpu_hours=hours, no_hours=no_hours)


def _is_done(resolved: Resolved, folder: RunFolder, state: RunState) -> bool:
    """Whether the same command would find nothing to do; a checkpoint lost since is not missed."""
    train, iters = resolved.job.train, resolved.derived.iters
    if train.stop_at is not None and state.saved_iteration >= train.stop_at:
        return True
    if state.status != "finished" or state.iteration >= iters:
        return state.status == "finished"
    lines = read_metrics(folder.metrics_file)
    plateau = has_stopped(lines, state.iteration, train.early_stop_patience, train.early_stop_min_delta)
    return plateau is not None


def _hours(job: Job, resolved: Resolved, state: RunState | None) -> tuple[float | None, str]:
    """GPU-hours of the steps that are left, on the machines that a job is for; or why they are not known."""
    try:
        workload = workload_of(job, resolved.topology, resolved.shape)
        plan = make_plan(workload, cluster_here(job), tokens=resolved.derived.tokens)
    except UserError as error:
        return None, error.message
    if plan.gpu_hours is None:
        return None, plan.no_time
    iters = resolved.derived.iters
    end = min(iters, resolved.job.train.stop_at or iters)
    source = resolved.source
    begin = source.checkpoint.iteration if source is not None and not source.weights_only else 0
    saved = 0 if state is None else state.saved_iteration
    return plan.gpu_hours * max(0, end - max(begin, saved)) / iters, ""
