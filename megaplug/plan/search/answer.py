"""The answer of a search: the best configurations, what they cost, and how sure that order is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megaplug.errors import Problem
from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import StageMemory
from megaplug.plan.plan import Plan, make_plan
from megaplug.plan.search.clock import Clock
from megaplug.plan.search.grids import legal
from megaplug.plan.search.score import score
from megaplug.plan.search.space import Space
from megaplug.plan.search.table import Table, least_of, table_of
from megaplug.plan.search.tally import Tally, tally_of
from megaplug.plan.step_time import StepTime
from megaplug.plan.workload import Workload

MOST_REFUSED = 200
"""After so many that the rest of a job forbids, a search gives up."""

BY_TIME = "modelled time of a step"
BY_RULE = "a rule, as no time is modelled: no recompute first, then data parallelism, then large microbatches"


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        plan: Of it.
        on_front: Whether none that fits and can be run needs less memory and no more time.
        near_first: Whether it is slower than the first by less than the model's error.
    """

    plan: Plan
    on_front: bool = False
    near_first: bool = False

    @property
    def workload(self) -> Workload:
        """The configuration as a whole."""
        return self.plan.workload

    @property
    def memory(self) -> StageMemory:
        """Of the fullest stage's ranks."""
        return self.plan.fullest.memory

    @property
    def time(self) -> StepTime | None:
        """Of a step; None if it is not modelled."""
        return self.plan.time


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes:
        space: What was searched.
        rows: The best that fit and can be run, best first.
        front: The whole Pareto front of memory against time, the fastest first; empty where time is not
            modelled, or where it was not asked for.
        tally: What was considered, and which rules forbid how much of it.
        num_legal: Configurations: legal meshes with every pipeline, microbatch and recomputation.
        num_fit: Of them, those that fit into memory.
        seconds: That the search took.
        ranked_by: `BY_TIME` or `BY_RULE`.
        error: Mean relative error of the time model, None where it is not known.
        note: What is to be said of the time model; empty if nothing.
        least: Where nothing fits, the configuration that needs least.
        refused: Why the rest of the job forbids configurations that were about to be listed, and how many.
        gave_up: Whether they were so many that the search stopped there.
    """

    space: Space
    rows: list[Row]
    front: list[Row]
    tally: Tally
    num_legal: int
    num_fit: int
    seconds: float
    ranked_by: str
    error: float | None = None
    note: str = ""
    least: Row | None = None
    refused: dict[str, int] = field(default_factory=dict)
    gave_up: bool = False


def find(
    space: Space,
    template: Workload,
    cluster: Cluster,
    *,
    top: int = 10,
    with_front: bool = True,
    tokens: int | None = None,
    problems_of: Callable[[Workload], Sequence[Problem]] = lambda workload: (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answer:
    """The best configurations of a space.

    Args:
        space: What may be chosen.
        template: The job as a workload; topology, batch and recomputation are replaced.
        cluster: The machines.
        top: How many are wanted.
        with_front: Whether the Pareto front is wanted, too.
        tokens: Of the whole training, for days and money.
        problems_of: Why the rest of the job forbids a configuration; asked of those to be listed only.
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
    table = table_of(scored, cluster.usable_memory)
    least = None if len(table) else least_of(scored, space, template)
    walk = _Walk(space, template, cluster, tokens, problems_of, error)
    walk.through(table, top, timed=clock is not None, with_front=with_front)
    return Answer(
        space,
        walk.rows,
        walk.front,
        tally_of(found),
        total,
        len(table),
        time.perf_counter() - started,
        BY_TIME if clock is not None else BY_RULE,
        error,
        "" if clock is None else clock.note,
        None if least is None else Row(make_plan(least, cluster, tokens=tokens)),
        dict(walk.refused.most_common()),
        walk.gave_up,
    )


@dataclass
class _Walk:
    """From the best on: the rows to be listed, and those of the front.

    Whether the rest of the job forbids a configuration is asked of no other ones: it takes milliseconds.
    """

    space: Space
    template: Workload
    cluster: Cluster
    tokens: int | None
    problems_of: Callable[[Workload], Sequence[Problem]]
    error: float | None
    rows: list[Row] = field(default_factory=list)
    front: list[Row] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def gave_up(self) -> bool:
        return self.refused.total() >= MOST_REFUSED

    def through(self, table: Table, top: int, *, timed: bool, with_front: bool) -> None:
        """Fill in both."""
        order = table.order(self.space, timed=timed)
        memory = table.memory[order]
        # Of all possible ones so far, which are no slower than what is still to come.
        least = np.inf
        place = 0
        while place < len(order) and not self.gave_up:
            if len(self.rows) >= top:
                smaller = np.flatnonzero(memory[place:] < least)
                if not (timed and with_front and len(smaller)):
                    break
                place += int(smaller[0])
            on_front = timed and bool(memory[place] < least)
            row = self._row(table.workload(order[place], self.space, self.template), on_front)
            if row is not None:
                self.rows += [row] if len(self.rows) < top else []
                self.front += [row] if on_front and with_front else []
                least = min(least, memory[place])
            place += 1

    def _row(self, workload: Workload, on_front: bool) -> Row | None:
        if problems := self.problems_of(workload):
            self.refused[str(problems[0])] += 1
            return None
        plan = make_plan(workload, self.cluster, tokens=self.tokens)
        near = False
        if plan.time is not None and self.error is not None:
            first = plan.time if not self.rows else self.rows[0].time
            assert first is not None
            near = plan.time.total <= first.total * (1 + self.error)
        return Row(plan, on_front, near)
