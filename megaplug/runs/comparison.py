"""The picture of several runs' losses, over tokens: runs with other batches can be compared so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaplug.runs.atomic import disk_errors, replaced
from megaplug.runs.metrics import read_metrics, validations

# A line is smoothed over this part of its run.
_SMOOTHED = 50


def draw_comparison(metrics_files: Mapping[str, Path], png: Path) -> bool:
    """Draw training losses as lines, smoothed, and validations as dots of the same colour.

    Args:
        metrics_files: ``metrics.jsonl`` of each run, by what it is called in the picture.
        png: Where the picture goes; replaced atomically.

    Returns:
        False if no run has a step to draw, and then nothing is written.
    """
    read = {name: read_metrics(file) for name, file in metrics_files.items()}
    drawn = {name: curve for name, lines in read.items() if (curve := _curve(lines))[0]}
    if not drawn:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (tokens, losses) in drawn.items():
        (line,) = axes.plot(tokens, losses, linewidth=1.2, label=name)
        lines = read[name]
        at = {each["iteration"]: each["tokens"] for each in lines if each.get("tokens") is not None}
        dots = [(at[step], loss) for step, loss in validations(lines) if step in at]
        if dots:
            colour = line.get_color()
            axes.plot(*zip(*dots, strict=True), color=colour, marker="o", markersize=4, linestyle="")
    axes.set(title="training (lines) and validation (dots)", xlabel="tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with disk_errors(png, "draw", "picture="), replaced(png) as file:
        canvas.print_png(file)
    return True


def _curve(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Tokens and smoothed loss of every step."""
    steps = [line for line in lines if line.get("loss") is not None and line.get("tokens") is not None]
    return [line["tokens"] for line in steps], smoothed([line["loss"] for line in steps])


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each and those before it, as many as are a fiftieth of all."""
    window = max(1, len(losses) // _SMOOTHED)
    sums = [0.0, *itertools.accumulate(losses)]
    return [(sums[end] - sums[max(0, end - window)]) / min(window, end) for end in range(1, len(losses) + 1)]
