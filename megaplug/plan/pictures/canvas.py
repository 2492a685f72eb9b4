"""What all pictures share: a figure without a display, colours that everybody can tell apart, the files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors, strict_json, write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 140
SETTING = "pictures="
"""What a user types to choose the folder; named where a disk refuses."""

# Okabe and Ito's colours (Color Universal Design, 2008), which colour-blind people can tell apart.
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
VERMILION, PURPLE, YELLOW, GREY = "#d55e00", "#cc79a7", "#f0e442", "#8c8c8c"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, "#7a5c00", GREY, YELLOW)
INK, FAINT = "#333333", "#d9d9d9"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; `DPI` dots each. Nothing of matplotlib is imported before."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes, *, grid: Literal["x", "y", "both"] = "y") -> None:
    """Takes away the frame that says nothing and lays a faint grid under the data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=INK)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)


def titled(figure: Figure, title: str, below: str = "") -> None:
    """A bold title from the left edge, and a line in small letters below it."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    height = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    figure.text(0.012, 1 - 0.36 / height, below, fontsize=9, color="#555555", va="top")
    # What is drawn keeps below both.
    rect = (0, 0, 1, 1 - (0.62 if below else 0.4) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=rect))


def legend_beside(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """The legend to the right of the axes, first line at their top."""
    chosen = {} if handles is None else {"handles": handles}
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        **chosen,
    )


def haloed(width: float = 2.5) -> list[Any]:
    """Path effects that keep letters readable on lines and bars."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="white")]


def save(figure: Figure, png: Path, data: Mapping[str, Any]) -> Path:
    """Writes a picture, and the numbers in it beside it as ``<name>.json``; each is replaced atomically.

    Args:
        figure: What is drawn.
        png: Where it goes; its folder is made.
        data: The numbers that the picture shows.

    Returns:
        ``png``.

    Raises:
        UserError: The name does not end in ``.png``, or the disk refused.
    """
    if png.suffix.lower() != ".png":
        raise UserError(f"a picture cannot be written to {png.name}", hint="end the name with .png")
    content = io.BytesIO()
    # Without the name of the program the same numbers give the same bytes.
    figure.savefig(content, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    with disk_errors(png.parent, "make the folder", SETTING):
        png.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(png.with_suffix(".json"), _readable(data), SETTING)
    write_bytes_atomic(png, content.getvalue(), SETTING)
    return png


def _readable(data: Mapping[str, Any]) -> str:
    """Indented JSON whose lists of plain values stand on one line each."""
    text = json.dumps(strict_json(data), indent=1, allow_nan=False)
    # No string holds a line's end: JSON writes it as backslash n.
    lists = re.compile(r"\[\n([^\[\]{}]*)\n *\]")
    return lists.sub(lambda found: f"[{re.sub(r'\n\s*', ' ', found[1]).strip()}]", text) + "\n"
