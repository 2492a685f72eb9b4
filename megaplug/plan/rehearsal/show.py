"""A rehearsed rank for a person and for a program, the plan's figures beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megaplug.plan.rehearsal.compare import Figure
from megaplug.plan.rehearsal.result import RankRehearsal
from megaplug.plan.units import GIB, gib, mib, short

FLOP_CONVENTION = "matrix products and attention, attention without regard to its mask; 2 a multiply-add"


def as_json(rehearsed: RankRehearsal, figures: Sequence[Figure]) -> dict[str, Any]:
    """Everything that was counted, and the comparison, as plain values."""
    beside = [
        dataclasses.asdict(figure) | {"difference": figure.difference, "relative": figure.relative}
        for figure in figures
    ]
    return {
        **dataclasses.asdict(rehearsed),
        "flop_convention": FLOP_CONVENTION,
        "planned_and_rehearsed": beside,
    }


def as_text(rehearsed: RankRehearsal, figures: Sequence[Figure]) -> str:
    """Some thirty lines."""
    small = rehearsed.peak_bytes_in_blocks < GIB
    unit, size_of = ("MiB", mib) if small else ("GiB", gib)
    lines = [
        f"rank {rehearsed.rank}, pipeline stage {rehearsed.stage}; one step after the first, "
        f"rehearsed in {rehearsed.seconds:.1f} s",
        f"  {'':36}{'planned':>18}{'rehearsed':>18}{'difference':>14}",
    ]
    lines += [_row(figure, unit, size_of) for figure in figures]
    parts = ", ".join(f"{name} {size_of(size)}" for name, size in rehearsed.at_peak.items() if size >= 1024)
    blocks = size_of(rehearsed.peak_bytes_in_blocks)
    lines += [f"  at the peak, in {unit}: {parts}; {blocks} in all in the allocator's blocks of 512 bytes"]
    flops = ", ".join(f"{name} {short(count)}" for name, count in rehearsed.flops.items())
    lines += [f"  FLOPs of a step: {flops} ({FLOP_CONVENTION})"]
    if rehearsed.traffic:
        lines += [f"  {'communication of a step':36}{'calls':>18}{unit:>18}{f'{unit} it sends':>14}"]
    for each in rehearsed.traffic:
        name = f"{each.group} ({each.size} ranks) {each.collective}"
        lines += [f"  {name:36}{each.calls:18,}{size_of(each.bytes):>18}{size_of(each.sent_bytes):>14}"]
    return "\n".join(lines)


def _row(figure: Figure, unit: str, size_of: Callable[[float], str]) -> str:
    if figure.unit == "parameters":
        return f"  {figure.name:36}{figure.planned:18,}{figure.rehearsed:18,}{figure.difference:+14,}"
    planned, rehearsed = (f"{size_of(size)} {unit}" for size in (figure.planned, figure.rehearsed))
    return f"  {figure.name:36}{planned:>18}{rehearsed:>18}{figure.relative:>+14.2%}"
