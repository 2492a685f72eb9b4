"""The simplex method of Nelder and Mead (1965): least of a function of a few numbers, without derivatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def nelder_mead(
    function: Callable[[np.ndarray], float],
    start: np.ndarray,
    *,
    step: float,
    evaluations: int,
    restarts: int = 3,
) -> np.ndarray:
    """Where a function is least, or as near as the given evaluations come.

    Args:
        function: Of a vector as long as ``start``.
        start: Where to begin.
        step: Size of the first simplex.
        evaluations: Of the function, of each restart at most.
        restarts: How often a fresh simplex is set up where the last one ended.
    """
    best = np.asarray(start, float)
    for _ in range(restarts):
        best = _once(function, best, step, evaluations)
    return best


def _once(
    function: Callable[[np.ndarray], float], start: np.ndarray, step: float, evaluations: int
) -> np.ndarray:
    points = [start, *(start + step * row for row in np.eye(len(start)))]
    values = [function(point) for point in points]
    used = len(points)
    while used < evaluations:
        order = np.argsort(values, kind="stable")
        points, values = [points[i] for i in order], [values[i] for i in order]
        middle = np.mean(points[:-1], axis=0)
        away = middle - points[-1]
        reflected = middle + away
        value = function(reflected)
        used += 1
        if value < values[0]:
            farther = middle + 2 * away
            there = function(farther)
            used += 1
            points[-1], values[-1] = (farther, there) if there < value else (reflected, value)
        elif value < values[-2]:
            points[-1], values[-1] = reflected, value
        else:
            nearer = middle - away / 2
            there = function(nearer)
            used += 1
            if there < values[-1]:
                points[-1], values[-1] = nearer, there
            else:
                points = [points[0], *(points[0] + (point - points[0]) / 2 for point in points[1:])]
                values = [values[0], *(function(point) for point in points[1:])]
                used += len(points) - 1
    return points[int(np.argmin(values))]
