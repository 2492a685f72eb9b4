"""When a rank hangs: it gets nothing more done, for longer than what it is doing may take.

Time counts only while the supervisor itself runs: a launcher that was stopped, or a machine that slept, has
not seen its ranks stand still. A job hangs once every rank is overdue, or one is that somebody has stopped:
a rank that only waits for another is overdue as well, but the other may still be saving, which takes longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TICK_S = 1.0
"""How often a supervisor looks."""

# What takes so many times as long as the slowest so far, and at least so long, comes to nothing.
_TIMES_THE_SLOWEST, _AT_LEAST_S = 10.0, 300.0
_AFTER_TRAINING = ("saving", "ending")
_STEPPING = ("training", "validating")


@dataclass(frozen=True)
class Limits:
    """Seconds without any progress after which a rank is overdue, by what it is doing; 0 for no limit.

    Attributes:
        start_s: Each of: importing, building the model, loading a checkpoint, loading data.
        first_step_s: What pays for compilation: the first step, the first batch of a validation.
        save_s: A checkpoint, and the end of a run.
        hang_s: A micro-batch or a step of training or validation. None for ten times the slowest so far, and
            at least five minutes.
    """

    start_s: float = 1800.0
    first_step_s: float = 1800.0
    save_s: float = 1800.0
    hang_s: float | None = None


@dataclass
class Standing:
    """What is known of a rank's progress.

    Attributes:
        phase: See `megaplug.runtime.heartbeat.Whereabouts`.
        iteration: Steps done.
        progress: The rank's own count.
        since: When that last changed, on the watch's clock.
        slowest: The longest that a change has taken while stepping.
        num_validated: Changes seen while validating.
    """

    phase: str = "starting"
    iteration: int = 0
    progress: int = -1
    since: float = 0.0
    slowest: float = 0.0
    num_validated: int = 0


class HangWatch:
    """Adds up what ranks say of their progress.

    Args:
        limits: How long each phase may stand still.
        num_ranks: How many there are.
        now: Seconds that only ever grow.
    """

    def __init__(self, limits: Limits, num_ranks: int, now: float) -> None:
        self.limits = limits
        self.ranks = [Standing() for _ in range(num_ranks)]
        self.clock = 0.0
        self._seen = now

    def tick(self, now: float) -> None:
        """Let time pass; at most two ticks of it, since a supervisor that was held up has seen no more."""
        self.clock += min(now - self._seen, 2 * TICK_S)
        self._seen = now

    def take(self, rank: int, beat: Mapping[str, Any]) -> None:
        """Take one ``beat``."""
        standing = self.ranks[rank]
        progress, phase = beat.get("progress"), str(beat.get("phase"))
        if not isinstance(progress, int) or progress <= standing.progress:
            return  # the rank's two threads may tell the same, or in the wrong order
        if standing.phase == phase == "training":
            standing.slowest = max(standing.slowest, self.clock - standing.since)
        standing.num_validated += standing.phase == phase == "validating"
        standing.phase, standing.progress, standing.since = phase, progress, self.clock
        standing.iteration = int(beat.get("iteration", standing.iteration))

    def released(self) -> None:
        """A rank has come to its end: whoever has waited for it has done nothing wrong so far."""
        for standing in self.ranks:
            standing.since = self.clock

    def stood_still(self, rank: int) -> float:
        """Seconds since a rank has last got anything done."""
        return self.clock - self.ranks[rank].since

    def limit(self, rank: int) -> float:
        """Seconds that a rank may stand still in what it is doing; infinity for no limit."""
        standing, limits = self.ranks[rank], self.limits
        if standing.phase in _STEPPING:
            slowest = max(other.slowest for other in self.ranks)
            seconds = limits.hang_s
            if seconds is None:
                seconds = max(_AT_LEAST_S, _TIMES_THE_SLOWEST * slowest)
            if standing.phase == "validating" and not standing.num_validated and seconds:
                seconds = max(seconds, limits.first_step_s)
        elif standing.phase == "first step":
            seconds = limits.first_step_s
        else:
            seconds = limits.save_s if standing.phase in _AFTER_TRAINING else limits.start_s
        return seconds or float("inf")

    def overdue(self, ranks: Iterable[int]) -> list[int]:
        """Those of some ranks that have stood still for too long."""
        return [rank for rank in ranks if self.stood_still(rank) > self.limit(rank)]
