"""What a model predicted against what somebody measured: a point for each, and how far off it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.plan.pictures import canvas

BAND = 0.10
"""Relative error that is marked as a band."""


@dataclass(frozen=True)
class Point:
    """One job that was measured and predicted, in the same unit.

    Attributes:
        table: Where the measurement was published, such as ``SC21 A100``: one colour each.
        label: Which row of it, such as ``GPT 1T, TP8 PP64``.
        measured: Above zero.
        predicted: Above zero.
        fitted: Whether the model's constants were fitted on it.
    """

    table: str
    label: str
    measured: float
    predicted: float
    fitted: bool = False

    @property
    def error(self) -> float:
        """Relative: 0.1 where 10 % too much is predicted."""
        return self.predicted / self.measured - 1


def predicted_data(points: Sequence[Point]) -> dict[str, Any]:
    """The numbers of the picture: every point, and of each table the errors on the points not fitted.

    Raises:
        UserError: There is no point, or one that has no place on logarithmic axes.
    """
    if not points:
        raise UserError("there is no measured point to draw")
    for point in points:
        if not (point.measured > 0 and point.predicted > 0):
            raise UserError(
                f"{point.table}, {point.label}: measured {point.measured} and predicted {point.predicted} "
                "have no place on logarithmic axes",
                hint="both must be above zero",
            )
    tables = {}
    for table in dict.fromkeys(point.table for point in points):
        own = [point for point in points if point.table == table]
        errors = sorted(abs(point.error) for point in own if not point.fitted)
        tables[table] = {
            "points": len(own),
            "fitted": len(own) - len(errors),
            "mean_error": statistics.fmean(errors) if errors else None,
            "median_error": statistics.median(errors) if errors else None,
            "max_error": errors[-1] if errors else None,
            "within_band": sum(error <= BAND for error in errors) / len(errors) if errors else None,
        }
    return {
        "band": BAND,
        "tables": tables,
        "points": [
            {
                "table": point.table,
                "label": point.label,
                "measured": point.measured,
                "predicted": point.predicted,
                "error": point.error,
                "fitted": point.fitted,
            }
            for point in points
        ],
    }


def draw_predicted(
    points: Sequence[Point], png: Path, *, quantity: str = "step time", unit: str = "s", title: str = ""
) -> Path:
    """Draws predicted against measured on logarithmic axes, and below it the error of every point.

    Args:
        points: The measurements; every table has its colour, fitted points are rings.
        png: Where it goes; its numbers go beside it.
        quantity: What was measured.
        unit: Of both values.
        title: Stands above it; a plain one if not given.

    Raises:
        UserError: There is no point, one that is not above zero, or the disk refused.
    """
    data = {"picture": "predicted", "quantity": quantity, "unit": unit, **predicted_data(points)}
    figure = canvas.new_figure(9, 7)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    values = [value for point in points for value in (point.measured, point.predicted)]
    ends = [min(values) / 1.25, max(values) * 1.25]
    upper.fill_between(
        ends,
        [end * (1 - BAND) for end in ends],
        [end * (1 + BAND) for end in ends],
        color=canvas.FAINT,
        alpha=0.6,
        linewidth=0,
    )
    upper.plot(ends, ends, color=canvas.GREY, linewidth=1)
    lower.axhspan(-100 * BAND, 100 * BAND, color=canvas.FAINT, alpha=0.6, linewidth=0)
    lower.axhline(0, color=canvas.GREY, linewidth=1)
    for index, table in enumerate(data["tables"]):
        own = [point for point in points if point.table == table]
        colour = canvas.SERIES[index % len(canvas.SERIES)]
        _dots(upper, lower, own, colour)
    upper.set(xscale="log", yscale="log", xlim=ends, ylim=ends, ylabel=f"predicted {quantity} ({unit})")
    worst = max(abs(100 * point.error) for point in points)
    limit = min(100.0, max(25.0, 1.15 * worst))
    lower.set(ylim=(-limit, limit), ylabel="error (%)", xlabel=f"measured {quantity} ({unit})")
    for axes in (upper, lower):
        canvas.plain_axes(axes, grid="both")
        axes.xaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_major_formatter("{x:g}")
    total = len(points)
    fitted = sum(point.fitted for point in points)
    canvas.titled(
        figure,
        title or f"Predicted against measured {quantity}",
        f"{total:,} published measurements; rings are the {fitted:,} that constants were fitted on, "
        "errors those of the others",
    )
    canvas.legend_beside(upper, _handles(data["tables"]))
    return canvas.save(figure, png, data)


def _handles(tables: dict[str, dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=canvas.FAINT, alpha=0.6, label=f"within {BAND:.0%}")]
    for index, (table, errors) in enumerate(tables.items()):
        colour = canvas.SERIES[index % len(canvas.SERIES)]
        handles.append(Line2D([], [], marker="o", linestyle="", color=colour, label=_legend(table, errors)))
    return handles


def _legend(table: str, errors: dict[str, Any]) -> str:
    if errors["mean_error"] is None:
        return f"{table}\n{errors['points']:,} points, all fitted"
    points = f"{errors['points']:,} point" + ("s" if errors["points"] > 1 else "")
    return f"{table}\n{points}, {errors['mean_error']:.1%} mean error"


def _dots(upper: Any, lower: Any, points: Sequence[Point], colour: str) -> None:
    size, alpha = (34, 0.9) if len(points) < 200 else (9, 0.45)
    for fitted in (False, True):
        own = [point for point in points if point.fitted == fitted]
        if not own:
            continue
        style: dict[str, Any] = {"s": size, "alpha": alpha, "linewidths": 1.2 if fitted else 0}
        style |= {
            "zorder": 3 - len(points) / 10_000,
            "facecolors": "none" if fitted else colour,
            "edgecolors": colour,
        }
        measured = [point.measured for point in own]
        upper.scatter(measured, [point.predicted for point in own], **style)
        # An error beyond the axis stands on its edge.
        lower.scatter(measured, [max(-100.0, min(100.0, 100 * point.error)) for point in own], **style)
