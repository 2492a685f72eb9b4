"""Step time, or memory, of a job for every tensor- and pipeline-parallel size on the same GPUs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megaplug.plan.memory import GIB
from megaplug.plan.pictures import canvas
from megaplug.plan.pictures.cells import Cell

BEST = {"time": "fastest", "memory": "least memory"}
TOO_LARGE, IMPOSSIBLE = "#f2d7c4", "#f4f4f4"


def draw_heat_map(
    cells: Sequence[Cell],
    png: Path,
    *,
    job: str,
    cluster: str,
    num_gpus: int,
    by: Literal["time", "memory"] = "time",
) -> Path:
    """Draws a cell for every (tp, pp): its figures, or the rule that it breaks.

    Args:
        cells: From `cells.cells_of`.
        png: Where it goes; its numbers go beside it.
        job: Whose cells they are.
        cluster: Name of the machines.
        num_gpus: How many.
        by: What the colour says.

    Raises:
        UserError: The disk refused.
    """
    tps, pps = sorted({cell.tp for cell in cells}), sorted({cell.pp for cell in cells})
    figure = canvas.new_figure(max(7.5, 2.2 + 1.12 * len(tps)), 1.75 + 0.56 * len(pps))
    axes = figure.add_subplot()
    good = [cell for cell in cells if cell.fits]
    best = min(good, key=lambda cell: _value(cell, by), default=None)
    shades = _shades(good, by)
    for cell in cells:
        _square(axes, cell, tps.index(cell.tp), pps.index(cell.pp), shades)
    own = next((cell for cell in cells if cell.own), None)
    for framed, colour in ((own, canvas.INK), (best, canvas.VERMILION)):
        if framed is not None:
            inside = colour == canvas.VERMILION and framed.own
            _frame(axes, tps.index(framed.tp), pps.index(framed.pp), colour, inside=inside)
    # One column alone is not to be as wide as the picture.
    margin = max(0.0, (4 - len(tps)) / 2)
    axes.set(xlim=(-0.5 - margin, len(tps) - 0.5 + margin), ylim=(len(pps) - 0.5, -0.5))
    axes.set_xticks(range(len(tps)), [str(tp) for tp in tps])
    axes.set_yticks(range(len(pps)), [str(pp) for pp in pps])
    axes.set_xlabel("tensor-parallel size (TP)")
    axes.set_ylabel("pipeline stages (PP)" if len(pps) > 2 else "PP")
    axes.tick_params(length=0, colors=canvas.INK)
    for side in axes.spines.values():
        side.set_visible(False)
    said = "nothing fits"
    if best is not None:
        figures = f"{_seconds(best.seconds)} a step, {_gib(best.memory or 0.0)}"
        said = f"{BEST[by]}: TP{best.tp} PP{best.pp} with {figures}"
    canvas.titled(
        figure,
        f"{'Step time' if by == 'time' else 'Memory'} by TP and PP: {job}",
        f"modelled, {num_gpus:,} {cluster}; memory is that of the fullest rank; {said}",
    )
    figure.legend(
        handles=_handles(best, by), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5
    )
    data = {"picture": "heat_map", "job": job, "cluster": cluster, "num_gpus": num_gpus, "by": by}
    return canvas.save(figure, png, data | {"label": "modelled", "cells": [cell.data() for cell in cells]})


def _value(cell: Cell, by: str) -> float:
    return (cell.seconds if by == "time" else cell.memory) or 1.0


def _shades(good: Sequence[Cell], by: str) -> dict[tuple[int, int], tuple[Any, str]]:
    """Colour of ground and of letters for each cell that fits: the darker, the better."""
    from matplotlib import colormaps

    values = {(cell.tp, cell.pp): math.log(_value(cell, by)) for cell in good}
    if not values:
        return {}
    low, high = min(values.values()), max(values.values())
    ramp = colormaps["GnBu"]
    shades: dict[tuple[int, int], tuple[Any, str]] = {}
    for place, value in values.items():
        part = 1 - (value - low) / (high - low) if high > low else 1.0
        shades[place] = (ramp(0.15 + 0.8 * part), "white" if part > 0.62 else canvas.INK)
    return shades


def _square(
    axes: Any, cell: Cell, column: int, row: int, shades: dict[tuple[int, int], tuple[Any, str]]
) -> None:
    from matplotlib.patches import Rectangle

    letters, size, weight = canvas.INK, 8.0, "normal"
    if cell.memory is None:
        ground, text, size = IMPOSSIBLE, "\n".join(textwrap.wrap(cell.rule, 20)), 7.0
        letters = "#555555"
    elif not cell.fits:
        ground, text = TOO_LARGE, f"does not fit\n{_gib(cell.memory)}"
    else:
        ground, letters = shades[cell.tp, cell.pp]
        text = f"{_seconds(cell.seconds)}\n{_gib(cell.memory)}"
    axes.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=ground, linewidth=0))
    axes.text(column, row, text, ha="center", va="center", fontsize=size, color=letters, fontweight=weight)


def _frame(axes: Any, column: int, row: int, colour: str, *, inside: bool) -> None:
    from matplotlib.patches import Rectangle

    half = 0.42 if inside else 0.47
    axes.add_patch(
        Rectangle(
            (column - half, row - half),
            2 * half,
            2 * half,
            fill=False,
            edgecolor=colour,
            linewidth=2,
            zorder=4,
        )
    )


def _handles(best: Cell | None, by: str) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=TOO_LARGE, label="does not fit"),
        Patch(facecolor=IMPOSSIBLE, edgecolor=canvas.FAINT, label="breaks the rule named"),
        Patch(facecolor="none", edgecolor=canvas.INK, linewidth=2, label="this job"),
    ]
    if best is not None:
        handles.append(
            Patch(
                facecolor="none",
                edgecolor=canvas.VERMILION,
                linewidth=2,
                label=f"{BEST[by]} (darker is better)",
            )
        )
    return handles


def _seconds(seconds: float | None) -> str:
    seconds = seconds or 0.0
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _gib(memory: float) -> str:
    return f"{memory / GIB:,.1f} GiB" if memory < 100 * GIB else f"{memory / GIB:,.0f} GiB"
