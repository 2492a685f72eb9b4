"""How well predicted times rank what was measured: Kendall's tau and regret."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def kendall_tau(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Kendall's tau-b: 1 where both order every pair alike, -1 where they never do, 0 without relation.

    Pairs equal on one side count for neither order and make the divisor smaller: tau = (C - D) /
    sqrt((n0 - n1)(n0 - n2)), with n0 pairs in all, n1 and n2 of them equal on the one and on the other side
    (Kendall 1945).

    Args:
        predicted: Of every candidate.
        measured: Of the same candidates.

    Returns:
        None where there is no order: fewer than two candidates, or all equal on a side.

    Raises:
        ValueError: If the two are not of one length.
    """
    _same_length(predicted, measured)
    concordance = equal_predicted = equal_measured = pairs = 0
    for (one_predicted, one_measured), (other_predicted, other_measured) in combinations(
        zip(predicted, measured, strict=True), 2
    ):
        by_prediction, by_measure = (
            _sign(one_predicted - other_predicted),
            _sign(one_measured - other_measured),
        )
        concordance += by_prediction * by_measure
        equal_predicted += by_prediction == 0
        equal_measured += by_measure == 0
        pairs += 1
    ordered = (pairs - equal_predicted) * (pairs - equal_measured)
    return concordance / math.sqrt(ordered) if ordered else None


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """What following the prediction costs: the measured time of its best over the best measured time, less 1.

    Where several are predicted best, the slowest of them counts: nothing says that another is picked.

    Args:
        predicted: Times of every candidate.
        measured: Times of the same candidates, above zero.

    Raises:
        ValueError: If there is none, or the two are not of one length.
    """
    _same_length(predicted, measured)
    if not predicted:
        raise ValueError("there is nothing to choose from")
    best = min(predicted)
    picked = max(time for guess, time in zip(predicted, measured, strict=True) if guess == best)
    return picked / min(measured) - 1


def _same_length(predicted: Sequence[float], measured: Sequence[float]) -> None:
    if len(predicted) != len(measured):
        raise ValueError(f"{len(predicted)} predictions for {len(measured)} measurements")


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
