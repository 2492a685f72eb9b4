"""Tokens a second and MFU against the number of GPUs: strong scaling (one batch) and weak (a growing one)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.plan.pictures import canvas
from megaplug.plan.pictures.growth import Size

STYLES = {
    "fixed": (canvas.BLUE, "o", "same batch (strong)"),
    "growing": (canvas.ORANGE, "s", "batch grows (weak)"),
}

IDEAL: dict[str, Any] = {
    "color": "#cccccc",
    "linewidth": 7,
    "solid_capstyle": "butt",
    "zorder": 1.5,
}
"""A band so wide that curves which keep to it do not hide it."""


def draw_scaling(sizes: Sequence[Size], png: Path, *, job: str, cluster: str) -> Path:
    """Draws tokens a second (logarithmic, with the ideal) and MFU, beside each other.

    Args:
        sizes: From `growth.sizes_of`.
        png: Where it goes; its numbers go beside it.
        job: Whose they are.
        cluster: Name of the machines.

    Raises:
        UserError: There is no size, or the disk refused.
    """
    if not sizes:
        raise UserError("there is no number of GPUs that this job can run on")
    figure = canvas.new_figure(10, 4.6)
    left, right = figure.subplots(1, 2)
    for batches, (colour, marker, label) in STYLES.items():
        own = sorted((size for size in sizes if size.batches == batches), key=lambda size: size.num_gpus)
        if own:
            _curves(left, right, own, colour, marker, label)
    _marks(left, right, sizes)
    counts = sorted({size.num_gpus for size in sizes})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=40 if len(counts) > 5 else 0)
        axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        canvas.plain_axes(axes, grid="both")
    left.set_yscale("log")
    left.yaxis.set_major_formatter(_short)
    left.yaxis.set_minor_formatter(lambda value, _: _short(value, _) if _leading(value) in (2, 5) else "")
    left.tick_params(axis="y", which="minor", labelsize=8, colors=canvas.INK)
    left.set_ylabel("tokens/s")
    right.set_ylim(0, max(50.0, 112 * max(size.mfu for size in sizes)))
    right.set_ylabel("MFU (%)")
    canvas.titled(
        figure,
        f"Scaling: {job}",
        f"modelled, {cluster}, data-parallel replicas added; MFU counts causal attention and no recompute",
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    data = {"picture": "scaling", "job": job, "cluster": cluster, "label": "modelled"}
    return canvas.save(figure, png, data | {"sizes": [size.data() for size in sizes]})


def _curves(left: Any, right: Any, own: Sequence[Size], colour: str, marker: str, label: str) -> None:
    counts = [size.num_gpus for size in own]
    # A strong and a weak curve meet in the job; the ideal of each goes through its own first point.
    first = own[0]
    ideal = [first.tokens_per_second * count / first.num_gpus for count in counts]
    left.plot(counts, ideal, **IDEAL)
    right.plot(counts, [100 * first.mfu] * len(counts), **IDEAL)
    style = {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 6}
    left.plot(counts, [size.tokens_per_second for size in own], label=label, **style)
    right.plot(counts, [100 * size.mfu for size in own], **style)


def _marks(left: Any, right: Any, sizes: Sequence[Size]) -> None:
    """Open marks where the job does not fit, a ring round the job itself."""
    from matplotlib.lines import Line2D

    small = [size for size in sizes if not size.fits]
    own = [size for size in sizes if size.own]
    for axes, value in ((left, "tokens_per_second"), (right, "mfu")):
        scale = 100 if value == "mfu" else 1
        for size in small:
            colour, marker, _ = STYLES[size.batches]
            axes.plot(
                size.num_gpus,
                scale * getattr(size, value),
                marker=marker,
                markersize=6,
                markerfacecolor="white",
                markeredgecolor=colour,
                linestyle="",
                zorder=4,
            )
        for size in own[:1]:
            axes.plot(
                size.num_gpus,
                scale * getattr(size, value),
                marker="o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=canvas.INK,
                linestyle="",
                label="this job",
            )
    left.add_line(Line2D([], [], label="ideal", **IDEAL))
    if small:
        left.add_line(
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                markerfacecolor="white",
                markeredgecolor=canvas.GREY,
                label="does not fit",
            )
        )


def _short(value: float, _place: object) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _leading(value: float) -> int:
    return int(f"{value:e}"[0])
