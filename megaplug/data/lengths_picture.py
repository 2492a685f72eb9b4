"""The picture of a set's document lengths."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from megaplug.data.inspection import Inspection
from megaplug.errors import UserError
from megaplug.runs.atomic import write_bytes_atomic

ENDINGS = (".png", ".svg", ".pdf")


def draw_lengths(file: Path, title: str, sets: Sequence[tuple[str, Inspection]]) -> None:
    """Draws how many documents have which length, on a logarithmic scale.

    Args:
        file: Where it goes; its ending says in which form. Replaced atomically.
        title: Stands above it.
        sets: Labels and what was found.

    Raises:
        UserError: The ending is not known, there is no document, or the disk refused.
    """
    check_ending(file)
    drawn = [(label, found) for label, found in sets if found.num_documents]
    if not drawn:
        raise UserError(
            f"picture: there is no document in {title}, and so no length", hint="leave picture= away"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, found in drawn:
        edges = [low for low, _, _ in found.histogram] + [high + 1 for _, high, _ in found.histogram[-1:]]
        axes.stairs(
            [number for *_, number in found.histogram], [max(edge, 0.5) for edge in edges], label=label
        )
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel="tokens of a document", ylabel="documents")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    canvas.print_figure(content, format=file.suffix.lower().removeprefix("."))
    write_bytes_atomic(file, content.getvalue(), "picture=")


def check_ending(file: Path) -> None:
    """Raises `UserError` unless a picture can have this name."""
    if file.suffix.lower() not in ENDINGS:
        raise UserError(
            f"picture: {file.name} ends in {file.suffix or 'nothing'!r}",
            hint=f"end it with {' or '.join(ENDINGS)}",
        )
