"""The time model asked for many configurations at once: their terms are collected and evaluated together."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaplug.plan.cluster import Cluster
from megaplug.plan.search.columns import Numbers
from megaplug.plan.step_time import StepTime, Terms, constants_of, rates_of, step_parts, terms_of
from megaplug.plan.workload import Workload

_TOGETHER = 8192
"""Configurations that are evaluated at once: as many as stay in a core's cache."""
_NAMES = tuple(field.name for field in fields(Terms))


class Clock:
    """Seconds of a step on one cluster, in one number format.

    Attributes:
        error: Mean relative error of the constants, None where it is not known.
        note: What is to be said of them; empty if nothing.
    """

    def __init__(self, cluster: Cluster, template: Workload) -> None:
        """Find the constants.

        Args:
            cluster: The machines.
            template: The job; number format and model of all that will be asked.

        Raises:
            UserError: The cluster has no peak for the number format.
        """
        compute = template.precision.compute
        constants = constants_of(template, cluster)
        self.error = constants.error
        self.note = constants.note
        self._rates = rates_of(cluster, compute, constants)
        self._moe = template.shape.is_moe
        self._asked: list[tuple[list[Any], Numbers, NDArray[np.intp]]] = []
        self._waiting = 0

    def terms(self, workload: Workload) -> list[Any]:
        """The terms of a workload, or columns of them."""
        terms = terms_of(workload)
        return [getattr(terms, name) for name in _NAMES]

    def ask(self, terms: list[Any], results: Numbers, rows: NDArray[np.intp]) -> None:
        """Have the seconds of some terms written into rows of the results, now or with the next `answer`."""
        self._asked.append((terms, results, rows))
        self._waiting += len(rows)
        if self._waiting >= _TOGETHER:
            self.answer()

    def answer(self) -> None:
        """Write all that was asked for."""
        if not self._asked:
            return
        lengths = [len(rows) for _, _, rows in self._asked]
        columns = [
            _joined([terms[place] for terms, _, _ in self._asked], lengths) for place in range(len(_NAMES))
        ]
        terms = Terms(**dict(zip(_NAMES, columns, strict=True)))
        parts = step_parts(terms, self._rates, moe=self._moe)
        seconds = np.broadcast_to(StepTime(**parts).total, self._waiting)
        start = 0
        for (_, results, rows), length in zip(self._asked, lengths, strict=True):
            results[rows] = seconds[start : start + length]
            start += length
        self._asked, self._waiting = [], 0


def _joined(values: list[Any], lengths: list[int]) -> Any:
    """One column of all; a plain number where all are the same one."""
    first = values[0]
    if all(not isinstance(value, np.ndarray) and value == first for value in values):
        return first
    return np.concatenate(
        [np.broadcast_to(np.asarray(value, float), n) for value, n in zip(values, lengths, strict=True)]
    )
