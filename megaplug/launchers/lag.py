"""Told once: a rank that computes much longer than the others, step after step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STEPS, _TIMES = 20, 1.5


class LagWatch:
    """Looks at the steps' ``slowest_rank``, which is measured where communication is timed.

    A rank that is slow by chance is another one at the next step; only one that stays the slowest is told.
    """

    def __init__(self) -> None:
        self._rank: int | None = None
        self._in_a_row = 0
        self._times = 0.0
        self._told: set[int] = set()

    def take(self, event: Mapping[str, Any]) -> str | None:
        """A sentence about the rank that lags, at the step that makes it sure; None at all others."""
        rank, behind, seconds = (
            event.get(key) for key in ("slowest_rank", "slowest_rank_behind_seconds", "seconds")
        )
        if event["event"] != "step" or rank is None or behind is None or not seconds:
            return None
        # The slowest is what the step waits for; the others have computed for what is left.
        times = seconds / max(seconds - behind, 1e-9)
        if times < _TIMES or rank != self._rank:
            self._rank, self._in_a_row, self._times = rank, 0, 0.0
        if times < _TIMES:
            return None
        self._in_a_row += 1
        self._times += times
        if self._in_a_row < _STEPS or rank in self._told:
            return None
        self._told.add(rank)
        mean = self._times / self._in_a_row
        return (
            f"rank {rank} lags: over the last {self._in_a_row} steps it has computed about {mean:.1f} times "
            "as long as the others, which wait for it"
        )
