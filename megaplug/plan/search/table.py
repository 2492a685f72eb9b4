"""All configurations that fit, in one table: where each is, what it needs, and the order of the best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaplug.plan.search.grids import NAMES
from megaplug.plan.search.score import Scored, workload_at
from megaplug.plan.search.space import Space
from megaplug.plan.workload import Workload


@dataclass(frozen=True)
class Table:
    """What fits, a row each.

    Attributes:
        scored: The families that the rows are of.
        of: Of each row the place of its family among them.
        row: Of each row its place in the family.
        memory: Bytes of the fullest stage's ranks.
        seconds: Of a step; NaN where no time is modelled.
    """

    scored: list[Scored]
    of: NDArray[np.intp]
    row: NDArray[np.intp]
    memory: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.of)

    def order(self, space: Space, *, timed: bool) -> NDArray[np.intp]:
        """The rows, best first. Equal ones keep the order of enumeration, which depends on the space alone.

        Args:
            space: What was searched.
            timed: By time, and then by memory; else by the rule that `answer.BY_RULE` says.
        """
        if timed:
            return np.lexsort((self.memory, self.seconds))
        level = np.array([space.recomputes.index(found.recompute) for found in self.scored], int)
        again = level[self.of] if len(self) else np.empty(0, int)
        dp, micro = (self._column(name) for name in ("dp", "micro_batch_size"))
        return np.lexsort((self.memory, -micro, -dp, again))

    def _column(self, name: str) -> NDArray[np.int64]:
        found = np.empty(len(self), np.int64)
        for number in np.unique(self.of):
            here = self.of == number
            found[here] = self.scored[number].family.sizes[name][self.row[here]]
        return found

    def workload(self, row: int, space: Space, template: Workload) -> Workload:
        """One row as a workload."""
        return _workload(self.scored[self.of[row]], int(self.row[row]), space, template)


def table_of(scored: list[Scored], usable_memory: float) -> Table:
    """The table of what needs no more than this memory."""
    parts = [np.flatnonzero(found.memory <= usable_memory) for found in scored]
    empty = np.empty(0)
    return Table(
        scored,
        np.repeat(np.arange(len(scored)), [len(part) for part in parts]),
        np.concatenate([np.empty(0, np.intp), *parts]),
        np.concatenate([empty, *(found.memory[part] for found, part in zip(scored, parts, strict=True))]),
        np.concatenate([empty, *(found.seconds[part] for found, part in zip(scored, parts, strict=True))]),
    )


def least_of(scored: list[Scored], space: Space, template: Workload) -> Workload | None:
    """The configuration that needs least memory; None if there is none."""
    if not scored:
        return None
    found = min(scored, key=lambda found: float(found.memory.min()))
    return _workload(found, int(found.memory.argmin()), space, template)


def _workload(found: Scored, row: int, space: Space, template: Workload) -> Workload:
    sizes = {name: int(found.family.sizes[name][row]) for name in NAMES}
    return workload_at(space, found.family, found.recompute, template, **sizes)
