"""A sweep as text and as JSON: what becomes of each point, why not of the others, and what is left to pay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import megaplug
from megaplug.commands.actions import FORMAT, columns
from megaplug.commands.sweep_points import Point, Points
from megaplug.plan.plan_json import problems_json
from megaplug.plan.units import digits
from megaplug.runs.standing import standing


def listed(points: Points) -> list[str]:
    """A line for each point, the reasons below those that cannot be run, and the cost."""
    rows: list[tuple[str, ...]] = [
        (str(point.number), _becomes(point), _run(point), _hours_left(point), " ".join(point.own))
        for point in points.all
    ]
    if not any(row[3] for row in rows):
        rows = [(*row[:3], *row[4:]) for row in rows]
    lines = []
    for point, line in zip(points.all, columns(rows, left=(1, 2, len(rows[0]) - 1)), strict=True):
        lines += [f"  {line}", *_reasons(point, points, " " * 6)]
    return [*_told(points), *lines, *_cost(points)]


def explained(points: Points) -> list[str]:
    """Only the points that are not run, with their reasons, and the cost."""
    why = [line for point in points.all for line in explained_point(point, points)]
    return [*_told(points), *why, *_cost(points)]


def explained_point(point: Point, points: Points) -> list[str]:
    """Why a point is not run; nothing where it is.

    Args:
        point: One of them.
        points: The sweep.
    """
    own = " ".join(point.own)
    if point.problems:
        return [f"point {point.number} is not possible: {own}", *_reasons(point, points, "  ")]
    if point.repeats is not None:
        return [f"point {point.number} repeats point {point.repeats}: {own}"]
    return []


def _told(points: Points) -> list[str]:
    """How many points there are of each kind, and how many runs are finished already."""
    all_points, runs = f"{len(points.all)} {_several(points.all, 'point')}", _several(points.runs, "run")
    numbers = [f"{all_points}: {len(points.runs)} {runs}"]
    if points.impossible:
        numbers.append(f"{len(points.impossible)} not possible")
    if points.repeated:
        repeat = "repeats another" if len(points.repeated) == 1 else "repeat others"
        numbers.append(f"{len(points.repeated)} that {repeat}")
    done = len(points.runs) - len(points.left)
    finished = [f"{done} of {len(points.runs)} are finished already"] if done else []
    return [", ".join(numbers), *finished]


def _cost(points: Points) -> list[str]:
    """The modelled GPU-hours of what is left, and for how many runs none are modelled."""
    unknown = points.without_hours
    if not points.left:
        return []
    reasons = "; ".join(dict.fromkeys(point.no_hours for point in unknown))
    if len(unknown) == len(points.left):
        return [f"GPU-hours of what is left: not known, {reasons}"]
    also = ""
    if unknown:
        numbers = ", ".join(str(point.number) for point in unknown)
        also = f", without {_several(unknown, 'point')} {numbers}: {reasons}"
    return [f"GPU-hours of what is left: {hours(points.gpu_hours)} (modelled){also}"]


def _several(items: Sequence[object], name: str) -> str:
    return name if len(items) == 1 else f"{name}s"


def hours(number: float) -> str:
    """GPU-hours as a person reads them."""
    return digits(number) if number >= 0.01 else "less than 0.01"


def confirming(gpu_hours: float) -> str:
    """The word with which a sweep is started that costs more than its limit."""
    return f"launch.max_gpu_hours={math.ceil(gpu_hours)}"


def as_json(
    points: Points, command: str, running: int | None = None, refused: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """All of it as plain values.

    Args:
        points: The sweep.
        command: What was typed.
        running: The point whose run is being started.
        refused: By the number of a point, why its run could not be started when its turn came.
    """
    unknown = points.without_hours
    return {
        "megaplug": megaplug.__version__,
        "format": FORMAT,
        "command": command,
        "folder": None if points.folder is None else str(points.folder),
        "num_points": len(points.all),
        "num_runs": len(points.runs),
        "num_impossible": len(points.impossible),
        "num_repeated": len(points.repeated),
        "num_finished_before": len(points.runs) - len(points.left),
        "gpu_hours_modelled": None if len(unknown) == len(points.left) > 0 else points.gpu_hours,
        "gpu_hours_unknown": [point.number for point in unknown],
        "max_gpu_hours": None if points.job is None else points.job.launch.max_gpu_hours,
        "points": [_point_json(point, running, (refused or {}).get(point.number)) for point in points.all],
    }


def _point_json(point: Point, running: int | None, refused: str | None) -> dict[str, Any]:
    status, reason = _stands(point)
    return {
        "number": point.number,
        "words": list(point.words),
        "own": list(point.own),
        "run": str(point.folder.path) if point.run else None,
        "status": "running" if point.number == running else status,
        "reason": refused or reason,
        "repeats": point.repeats,
        "problems": problems_json(point.problems),
        "gpu_hours_modelled": point.gpu_hours,
        "no_gpu_hours": point.no_hours,
    }


def _stands(point: Point) -> tuple[str, str]:
    """``impossible``, ``repeat``, ``new``, or one of `megaplug.runs.standing.STANDINGS`; and why."""
    if point.problems:
        return "impossible", ""
    if point.repeats is not None:
        return "repeat", ""
    if not point.folder.path.is_dir():
        return "new", ""
    found = standing(point.folder)
    return found.status, found.fault or ("" if found.state is None else found.state.reason)


def _becomes(point: Point) -> str:
    if point.problems:
        return "not possible"
    if point.repeats is not None:
        return f"repeats {point.repeats}"
    return _stands(point)[0]


def _run(point: Point) -> str:
    return "" if point.problems else str(point.folder.path)


def _hours_left(point: Point) -> str:
    if point.problems or point.repeats is not None or not point.gpu_hours:
        return ""
    return f"{hours(point.gpu_hours)} GPU-hours"


def _reasons(point: Point, points: Points, indent: str) -> list[str]:
    """Why a point cannot be run; the point of which that has been said already."""
    first = next((each for each in points.impossible if each.problems == point.problems), point)
    if first.number != point.number:
        return [f"{indent}as point {first.number}"]
    return [f"{indent}{line}" for problem in point.problems for line in str(problem).splitlines()]
