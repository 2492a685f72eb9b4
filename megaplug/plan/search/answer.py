"""The answer of a search: the best configurations, what they cost, and how sure that order is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import StageMemory, estimate
from megaplug.plan.search.clock import Clock
from megaplug.plan.search.grids import NAMES, legal
from megaplug.plan.search.score import Scored, score, workload_at
from megaplug.plan.search.space import Space
from megaplug.plan.step_time import StepTime, step_time
from megaplug.plan.workload import Workload

MOST_REFUSED = 200
"""After so many that the rest of a job forbids, a search gives up."""

BY_TIME = "modelled time of a step"
BY_RULE = "a rule, as no time is modelled: no recompute first, then data parallelism, then large microbatches"


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        workload: It as a whole.
        memory: Of the fullest stage.
        time: Of a step; None if it is not modelled.
        on_front: Whether none that fits needs less memory and less time.
        near_first: Whether it is slower than the first by less than the model's error.
    """

    workload: Workload
    memory: StageMemory
    time: StepTime | None
    on_front: bool = False
    near_first: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole world."""
        return None if self.time is None else self.workload.tokens_per_step / self.time.total


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes:
        rows: The best, best first; of those that fit.
        front: The Pareto front of memory against time, the fastest first, as far as it is listed.
        num_front: How many are on it.
        num_grids: Pairs of grids that cover the ranks.
        num_meshes: Of them, those that fit model and batch.
        num_legal: Configurations: those meshes with every pipeline, microbatch and recomputation.
        num_fit: Of them, those that fit into memory.
        seconds: That the search took.
        ranked_by: `BY_TIME` or `BY_RULE`.
        error: Mean relative error of the time model, None where it is not known.
        note: What is to be said of the time model; empty if nothing.
        least: Where nothing fits, the configuration that needs least.
        refused: Configurations before the last row that something else of the job forbids.
    """

    rows: list[Row]
    front: list[Row]
    num_front: int
    num_grids: int
    num_meshes: int
    num_legal: int
    num_fit: int
    seconds: float
    ranked_by: str
    error: float | None = None
    note: str = ""
    least: Row | None = None
    refused: int = 0


@dataclass
class _Table:
    """All configurations that fit, flat: where each is, what it needs, and its place in the order."""

    scored: list[Scored]
    of: NDArray[np.intp]
    row: NDArray[np.intp]
    memory: NDArray[np.float64]
    seconds: NDArray[np.float64]
    order: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))


def find(
    space: Space,
    template: Workload,
    cluster: Cluster,
    *,
    top: int = 10,
    possible: Callable[[Row], bool] = lambda row: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answer:
    """The best configurations of a space.

    Args:
        space: What may be chosen.
        template: The job as a workload; topology, batch and recomputation are replaced.
        cluster: The machines.
        top: How many are wanted.
        possible: Whether the rest of the job goes with a configuration; asked of the best only.
        progress: Told how many of how many configurations were scored.

    Raises:
        UserError: The cluster has no peak for the job's number format.
    """
    started = time.perf_counter()
    # No time is modelled of ranks on a CPU.
    clock = None if cluster.device == "cpu" else Clock(cluster, template)
    error = None if clock is None else clock.error
    found = legal(space)
    total, done = found.num_configurations * len(space.recomputes), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    scored = score(space, found, template, cluster.usable_memory, clock, advance)
    table = _flat(scored, cluster.usable_memory)
    table.order = _order(table, timed=clock is not None, space=space)
    front = _front(table) if clock is not None else np.empty(0, np.intp)
    fast = float(table.seconds[table.order[0]]) if len(table.order) else 0.0
    on_front = set(front.tolist())

    def row_of(number: int) -> Row:
        workload = _workload(table, number, space, template)
        seconds = step_time(workload, cluster) if clock is not None else None
        near = seconds is not None and error is not None and seconds.total <= fast * (1 + error)
        return Row(workload, estimate(workload), seconds, number in on_front, near)

    rows: list[Row] = []
    refused = 0
    for number in table.order.tolist():
        if len(rows) == top or refused >= MOST_REFUSED:
            break
        row = row_of(number)
        if possible(row):
            rows.append(row)
        else:
            refused += 1
    return Answer(
        rows,
        [row for row in (row_of(number) for number in front[:top].tolist()) if possible(row)],
        len(front),
        found.num_grids,
        found.num_meshes,
        total,
        len(table.order),
        time.perf_counter() - started,
        BY_TIME if clock is not None else BY_RULE,
        error,
        "" if clock is None else clock.note,
        None if len(table.order) else _least(scored, space, template),
        refused,
    )


def _flat(scored: list[Scored], usable_memory: float) -> _Table:
    parts = [np.flatnonzero(found.memory <= usable_memory) for found in scored]
    return _Table(
        scored,
        np.repeat(np.arange(len(scored)), [len(part) for part in parts]),
        np.concatenate(parts) if parts else np.empty(0, np.intp),
        _joined([found.memory[part] for found, part in zip(scored, parts, strict=True)]),
        _joined([found.seconds[part] for found, part in zip(scored, parts, strict=True)]),
    )


def _joined(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.empty(0)


def _order(table: _Table, *, timed: bool, space: Space) -> NDArray[np.intp]:
    """Best first. Equal ones come in the order of enumeration, which depends on nothing but the space."""
    if timed:
        return np.lexsort((table.memory, table.seconds))
    level = np.array([space.recomputes.index(found.recompute) for found in table.scored], int)
    again = level[table.of] if len(table.of) else np.empty(0, int)
    dp, micro = (_column(table, name) for name in ("dp", "micro_batch_size"))
    return np.lexsort((table.memory, -micro, -dp, again))


def _column(table: _Table, name: str) -> NDArray[np.int64]:
    found = np.empty(len(table.of), np.int64)
    for number in np.unique(table.of):
        here = table.of == number
        found[here] = table.scored[number].family.sizes[name][table.row[here]]
    return found


def _front(table: _Table) -> NDArray[np.intp]:
    """Those that nothing beats in memory and time at once, the fastest first."""
    memory = table.memory[table.order]
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], memory]))[:-1]
    return table.order[memory < least_before]


def _least(scored: list[Scored], space: Space, template: Workload) -> Row | None:
    if not scored:
        return None
    found = min(scored, key=lambda found: float(found.memory.min()))
    table = _Table(
        [found], np.zeros(1, np.intp), np.array([found.memory.argmin()]), found.memory, found.seconds
    )
    workload = _workload(table, 0, space, template)
    return Row(workload, estimate(workload), None)


def _workload(table: _Table, number: int, space: Space, template: Workload) -> Workload:
    found = table.scored[table.of[number]]
    sizes = {name: int(found.family.sizes[name][table.row[number]]) for name in NAMES}
    return workload_at(space, found.family, found.recompute, template, **sizes)


def smallest_that_fits(
    space: Space, template: Workload, cluster: Cluster, *, times: int = 64
) -> tuple[int, Row] | None:
    """The first of twice, four times, ... as many ranks that something fits, and what needs least there."""
    for world_size in _larger(space, times):
        wider = dataclasses.replace(space, world_size=world_size)
        scored = score(wider, legal(wider), template, cluster.usable_memory, None)
        row = _least(scored, wider, template)
        if row is not None and row.memory.total <= cluster.usable_memory:
            return world_size, row
    return None


def _larger(space: Space, times: int) -> Iterator[int]:
    factor = 2
    while factor <= times:
        yield space.world_size * factor
        factor *= 2
