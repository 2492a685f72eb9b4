"""The picture of what has come of a search: the result over each thing that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaplug.runs.atomic import disk_errors, replaced


@dataclass(frozen=True)
class Axis:
    """Something that was chosen.

    Attributes:
        name: Its key.
        options: What it could be, in order; empty where it is a number of an interval.
        is_log: Whether the interval is to be drawn by the logarithm.
        chosen: What it was, for each result.
    """

    name: str
    options: tuple[str, ...]
    is_log: bool
    chosen: Sequence[str]


def draw_slices(axes: Sequence[Axis], values: Sequence[float], png: Path, label: str) -> None:
    """Draw a field for each axis, with a dot for each result.

    Args:
        axes: What was chosen.
        values: The results, the best first.
        png: Where the picture goes; replaced atomically.
        label: What the results are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 3.4 * len(axes)), 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    fields = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for field, axis in zip(fields, axes, strict=True):
        if axis.options:
            places = [float(axis.options.index(text)) for text in axis.chosen]
            field.set_xticks(range(len(axis.options)), axis.options)
        else:
            places = [float(text) for text in axis.chosen]
            field.set_xscale("log" if axis.is_log else "linear")
        field.plot(places[1:], values[1:], "o", color="#4c72b0", alpha=0.6)
        field.plot(places[:1], values[:1], "o", color="#c44e52", label="best")
        field.set(xlabel=axis.name)
        field.grid(alpha=0.3)
    fields[0].set(ylabel=f"{label} (nats per token)")
    fields[0].legend(fontsize=8)
    with disk_errors(png, "draw"), replaced(png) as file:
        canvas.print_png(file)
