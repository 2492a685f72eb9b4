"""Who computes when: the passes of one step on every pipeline stage, one panel a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaplug.plan.pictures import canvas
from megaplug.plan.pictures.panels import NAMES, Panel

FORWARD = ("#0072b2", "#9ecae9")
BACKWARD = ("#c45500", "#fdc48a")
"""Colour of the first and of the last chunk of a stage."""
WAITING = "#ececec"

WIDTH = 10.0
LETTER = 0.075
"""Inches that a digit of a microbatch's number needs, with what is left free beside it."""


def draw_timeline(panels: Sequence[Panel], png: Path, *, job: str, cluster: str) -> Path:
    """Draws the schedules of a job one below the other, on one axis of time.

    Args:
        panels: From `panels.schedule_panels`.
        png: Where it goes; its numbers go beside it.
        job: Whose step it is.
        cluster: Whose seconds they are.

    Raises:
        UserError: The disk refused.
    """
    shown = [panel for panel in panels if panel.timeline is not None]
    num_stages = len(shown[0].timeline.events) if shown and shown[0].timeline else 1
    row = min(0.3, max(0.075, 2.2 / num_stages))
    heights = [0.02 if panel.timeline is None else num_stages * row for panel in panels]
    figure = canvas.new_figure(WIDTH, 1.45 + sum(heights) + 0.45 * len(panels))
    longest = max(panel.timeline.makespan for panel in panels if panel.timeline)
    several = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(several, panels, strict=True):
        _panel(axes, panel, row, longest)
    several[-1].tick_params(axis="x", bottom=True, labelbottom=True)
    several[-1].spines["bottom"].set_visible(True)
    several[-1].set_xlabel("seconds from the start of the step (modelled)")
    own = next(panel for panel in panels if panel.own)
    drawn = f", {own.drawn} of them drawn" if own.drawn < own.microbatches else ""
    canvas.titled(
        figure,
        f"Pipeline schedules: {job}",
        f"modelled on {cluster}: {num_stages} stage{'s' * (num_stages > 1)}, {own.microbatches:,} "
        f"microbatch{'es' * (own.microbatches > 1)}{drawn}; without reduction of gradients and optimizer",
    )
    figure.legend(handles=_handles(max(panel.chunks for panel in panels)), **_BELOW)
    data = {"picture": "timeline", "job": job, "cluster": cluster, "label": "modelled", "unit": "s"}
    return canvas.save(figure, png, data | {"schedules": [panel.data() for panel in panels]})


_BELOW: dict[str, Any] = {
    "loc": "outside lower center",
    "ncols": 6,
    "frameon": False,
    "fontsize": 9,
    "labelcolor": canvas.INK,
}


def _panel(axes: Any, panel: Panel, row: float, longest: float) -> None:
    mine = " (this job)" if panel.own else ""
    name = f"{NAMES[panel.kind]}{f', {panel.chunks} chunks a stage' if panel.chunks > 1 else ''}{mine}"
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.set_title(name, loc="left", fontweight="bold" if panel.own else "normal", **_SMALL)
    if panel.timeline is None:
        axes.set_title(f"cannot be: {panel.reason}", loc="right", **_SMALL)
        axes.set_yticks([])
        return
    kept = f"{panel.kept:.1f}".removesuffix(".0")
    axes.set_title(
        f"{panel.seconds:.3g} s, bubble {panel.bubble:.1%} of the work, stages wait {panel.idle:.1%} of the "
        f"time, stage 0 keeps {kept} microbatch{'es' * (kept != '1')}",
        loc="right",
        **_SMALL,
    )
    num_stages, makespan = len(panel.timeline.events), panel.timeline.makespan
    axes.set_xlim(0, longest)
    axes.set_ylim(num_stages - 0.5, -0.5)
    step = 1 if row >= 0.13 else 4
    axes.set_yticks(range(0, num_stages, step), range(0, num_stages, step), fontsize=8)
    axes.tick_params(axis="y", length=0, colors=canvas.INK)
    axes.set_ylabel("stage", fontsize=9)
    axes.barh(range(num_stages), makespan, 0.86, color=WAITING, linewidth=0)
    _passes(axes, panel, row, (WIDTH - 0.8) / longest)


_SMALL: dict[str, Any] = {"fontsize": 9, "color": canvas.INK}


def _passes(axes: Any, panel: Panel, row: float, inches: float) -> None:
    assert panel.timeline is not None
    events = [event for of_stage in panel.timeline.events for event in of_stage]
    shortest = min(event.end - event.start for event in events) * inches
    digits = len(str(panel.drawn))
    readable = shortest > LETTER * (digits + 0.4) and row >= 0.13
    lined = shortest > 0.03
    bars: dict[tuple[int, bool, int], list[tuple[float, float]]] = {}
    for event in events:
        key = (event.stage, event.done.forward, event.done.chunk)
        bars.setdefault(key, []).append((event.start, event.end - event.start))
        if readable:
            axes.text(
                (event.start + event.end) / 2,
                event.stage,
                str(event.done.microbatch + 1),
                ha="center",
                va="center_baseline",
                fontsize=7 if row > 0.18 else 6,
                color="white" if event.done.chunk < (panel.chunks + 1) // 2 else "black",
            )
    for (stage, forward, chunk), spans in bars.items():
        axes.broken_barh(
            spans if lined else _joined(spans),
            (stage - 0.43, 0.86),
            facecolor=_colour(forward, chunk, panel.chunks),
            edgecolor="white" if lined else "none",
            linewidth=0.5 if lined else 0,
        )


def _joined(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that touch as one: the ground would shine through between them."""
    joined: list[tuple[float, float]] = []
    for start, length in spans:
        if joined and abs(sum(joined[-1]) - start) < 1e-6 * length:
            start, length = joined[-1][0], start + length - joined[-1][0]
            joined.pop()
        joined.append((start, length))
    return joined


def _colour(forward: bool, chunk: int, chunks: int) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    first, last = (to_rgb(end) for end in (FORWARD if forward else BACKWARD))
    part = chunk / (chunks - 1) if chunks > 1 else 0.0
    return tuple(a + (b - a) * part for a, b in zip(first, last, strict=True))


def _handles(chunks: int) -> list[Any]:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=FORWARD[0], label="forward"),
        Patch(color=BACKWARD[0], label="backward"),
        Patch(color=WAITING, label="waiting: the bubble"),
    ]
    if chunks > 1:
        handles.insert(1, Patch(color=FORWARD[1], label="forward, last chunk"))
        handles.insert(3, Patch(color=BACKWARD[1], label="backward, last chunk"))
    return handles
