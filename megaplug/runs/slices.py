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
        chosen: What it was, for each result.
        options: What it could be, in order; empty where it is a number of an interval.
        bounds: Of the interval.
        is_log: Whether the interval is to be drawn by the logarithm.
    """

    name: str
    chosen: Sequence[str]
    options: tuple[str, ...] = ()
    bounds: tuple[float, float] = (0.0, 1.0)
    is_log: bool = False


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
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(max(4.0, 3.4 * len(axes)), 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    fields = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for field, axis in zip(fields, axes, strict=True):
        if axis.options:
            places = [float(axis.options.index(text)) for text in axis.chosen]
            field.set_xticks(range(len(axis.options)), axis.options)
        else:
            places = [float(text) for text in axis.chosen]
            low, high = axis.bounds
            if axis.is_log:
                field.set_xscale("log")
                few = high / low < 100  # else a label for each power of ten is enough
                field.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
                field.xaxis.set_minor_formatter(NullFormatter())
                field.set_xlim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
            else:
                field.xaxis.set_major_locator(MaxNLocator(4))
                field.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
            field.xaxis.set_major_formatter("{x:g}")
        field.plot(places[1:], values[1:], "o", color="#4c72b0", alpha=0.6)
        field.plot(places[:1], values[:1], "o", color="#c44e52", label="best")
        field.set(xlabel=axis.name)
        field.grid(alpha=0.3)
    fields[0].set(ylabel=f"{label} (nats per token)")
    fields[0].legend(fontsize=8)
    with disk_errors(png, "draw"), replaced(png) as file:
        canvas.print_png(file)
