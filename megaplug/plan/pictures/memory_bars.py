"""What a rank of each pipeline stage holds, as stacked bars against the device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.plan.memory import GIB, StageMemory
from megaplug.plan.pictures import canvas

PARTS = {
    "weights": canvas.BLUE,
    "gradients": canvas.SKY,
    "optimizer": canvas.GREEN,
    "activations": canvas.ORANGE,
    "logits": canvas.PURPLE,
    "workspace": canvas.GREY,
}

FEW = 8
"""Up to so many bars are wide enough for figures inside."""
DWARFED = 0.05
"""Part of the device's memory below which its line is not drawn to scale."""


def memory_data(
    stages: Sequence[StageMemory], memory: float, usable: float, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """The numbers of the picture, in GiB: of each stage its parts, total, layers and whether it fits.

    Args:
        stages: Modelled memory of a rank, first stage first.
        memory: Bytes of the device.
        usable: Bytes of it that a model may take.
        layers: Layers of each stage.
    """
    if not stages:
        raise UserError("there is no pipeline stage to draw")
    rows = []
    for index, stage in enumerate(stages):
        row: dict[str, Any] = {"stage": stage.stage}
        if layers is not None:
            row["layers"] = layers[index]
        row |= {f"{part}_gib": getattr(stage, part) / GIB for part in PARTS}
        rows.append(row | {"total_gib": stage.total / GIB, "fits": stage.total <= usable})
    return {"label": "modelled", "device_gib": memory / GIB, "usable_gib": usable / GIB, "stages": rows}


def draw_memory(
    stages: Sequence[StageMemory],
    png: Path,
    *,
    job: str,
    device: str,
    memory: float,
    usable: float | None = None,
    layers: Sequence[int] | None = None,
) -> Path:
    """Draws one bar for each pipeline stage, and the device's memory as a line.

    Args:
        stages: Modelled memory of a rank, first stage first.
        png: Where it goes; its numbers go beside it.
        job: Whose memory it is, such as ``llama3_405b, TP8 PP16 DP64``.
        device: Its name, such as ``H100``.
        memory: Bytes of the device.
        usable: Bytes of it that a model may take; all if not given.
        layers: Layers of each stage, written below its number.

    Raises:
        UserError: There is no stage, or the disk refused.
    """
    usable = memory if usable is None else usable
    data = memory_data(stages, memory, usable, layers)
    data = {"picture": "memory", "job": job, "device": device, **data}
    rows = data["stages"]
    figure = canvas.new_figure(9, 4.8)
    axes = figure.add_subplot()
    highest = max(row["total_gib"] for row in rows)
    unit, scale = ("GiB", 1.0) if highest >= 1 else ("MiB", 1024.0)
    ceiling = axis_end(highest, data["device_gib"])
    axes.set_ylim(0, scale * ceiling)
    _bars(axes, rows, data["device_gib"], ceiling, scale)
    _lines(axes, data, device, scale)
    fullest = max(rows, key=lambda row: row["total_gib"])
    verdict = "fits" if fullest["fits"] else "does not fit"
    where = f"stage {fullest['stage']} is fullest: " if len(rows) > 1 else ""
    canvas.titled(
        figure,
        f"Memory of a rank: {job}",
        f"modelled; {where}{_figure(scale * highest)} {unit} {verdict} into "
        f"{data['usable_gib']:.1f} usable GiB of {device}",
    )
    axes.set_ylabel(f"{unit} a rank")
    axes.set_xlabel("pipeline stage" + (" (layers below)" if layers is not None else ""))
    # In the order in which they lie in the picture.
    canvas.legend_beside(axes, axes.get_legend_handles_labels()[0][::-1])
    return canvas.save(figure, png, data)


def _bars(axes: Any, rows: list[dict[str, Any]], device: float, ceiling: float, scale: float) -> None:
    places = range(len(rows))
    floor = [0.0] * len(rows)
    for part, colour in PARTS.items():
        heights = [scale * row[f"{part}_gib"] for row in rows]
        if not any(heights):
            continue
        axes.bar(
            places, heights, 0.72, bottom=floor, color=colour, label=part, edgecolor="white", linewidth=0.5
        )
        if len(rows) <= FEW:
            _write_inside(axes, floor, heights, 0.035 * scale * ceiling)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    small = 9 if len(rows) <= 16 else 6.5
    for place, row in zip(places, rows, strict=True):
        # A figure that would lie on the device's line stands above it.
        near = 0.94 * device < row["total_gib"] <= device
        axes.annotate(
            _figure(scale * row["total_gib"]),
            (place, scale * (device + 0.004 * ceiling if near else row["total_gib"])),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=small,
            color=canvas.INK if row["fits"] else canvas.VERMILION,
            fontweight="normal" if row["fits"] else "bold",
            path_effects=canvas.haloed(),
            zorder=5,
        )
    names = [f"{row['stage']}" + (f"\n{row['layers']}" if "layers" in row else "") for row in rows]
    axes.set_xticks(places, names, fontsize=small)
    # One bar alone is not to be as wide as the picture.
    margin = max(0.6, (6 - len(rows)) / 2)
    axes.set_xlim(-margin, len(rows) - 1 + margin)
    canvas.plain_axes(axes)
    axes.tick_params(axis="x", length=0)


def _write_inside(axes: Any, floor: list[float], heights: list[float], least: float) -> None:
    for place, (low, height) in enumerate(zip(floor, heights, strict=True)):
        if height > least:
            axes.text(
                place,
                low + height / 2,
                _figure(height),
                ha="center",
                va="center",
                fontsize=8,
                color="black",
            )


def axis_end(highest: float, device: float) -> float:
    """Above the highest bar and the device's line; not above a line so far away that bars would lie flat.

    The legend tells of a line that is beyond the axis.
    """
    return 1.12 * max(highest, device if highest > DWARFED * device else 0.0)


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _lines(axes: Any, data: dict[str, Any], device: str, scale: float) -> None:
    axes.axhline(
        scale * data["device_gib"],
        color=canvas.VERMILION,
        linewidth=1.6,
        label=f"{device}: {data['device_gib']:.1f} GiB",
    )
    if data["usable_gib"] < data["device_gib"]:
        axes.axhline(
            scale * data["usable_gib"],
            color=canvas.VERMILION,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label=f"usable: {data['usable_gib']:.1f} GiB",
        )
