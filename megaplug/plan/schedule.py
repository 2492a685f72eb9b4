"""The order of microbatches on every pipeline stage, and when each runs: 1F1B, interleaved 1F1B and GPipe.

The orders are those of Megatron-core's ``pipeline_parallel/schedules.py`` (``get_pp_rank_microbatches``,
``get_schedule_table``): warm-up forward passes, then one forward and one backward pass by turns, then the
backward passes that are left. GPipe (Huang et al. 2019), which Megatron has not, stands beside them for
comparison. Times follow from durations and from what waits for what, not from closed forms: those are
tested against it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

KINDS = ("1f1b", "interleaved", "gpipe")

Durations = Sequence[Sequence[float]]
"""Seconds of one microbatch by stage, then by the stage's chunk of layers."""


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of one microbatch through one chunk of a stage's layers."""

    microbatch: int
    chunk: int
    forward: bool


@dataclass(frozen=True)
class Event:
    """A pass, where and when it runs; seconds, or whatever the durations are in."""

    stage: int
    done: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All passes of one step.

    Attributes:
        kind: One of `KINDS`.
        events: Of every stage, in the order in which they run.
    """

    kind: str
    events: tuple[tuple[Event, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(events[-1].end for events in self.events)

    @property
    def busy(self) -> list[float]:
        """Time that each stage computes."""
        return [sum(event.end - event.start for event in events) for events in self.events]

    @property
    def bubble_of_ideal(self) -> float:
        """Wait of the busiest stage as part of its work: (p - 1) / (m v) where all stages are equal."""
        work = max(self.busy)
        return (self.makespan - work) / work

    @property
    def idle(self) -> float:
        """Part of all stages' time in which they wait: (p - 1) / (v m + p - 1) where all are equal."""
        return 1 - sum(self.busy) / (len(self.events) * self.makespan)

    def in_flight(self, stage: int) -> int:
        """The most chunks whose forward pass has run and whose backward pass has not, on one stage."""
        held = most = 0
        for event in self.events[stage]:
            held += 1 if event.done.forward else -1
            most = max(most, held)
        return most


def warmup_passes(
    num_stages: int, stage: int, num_microbatches: int, num_chunks: int = 1, group: int | None = None
) -> int:
    """Forward passes of a stage before its first backward pass's turn comes.

    Args:
        num_stages: Pipeline stages.
        stage: Which one, from 0.
        num_microbatches: Of a step.
        num_chunks: Virtual stages of a stage; 1 is plain 1F1B.
        group: Microbatches that pass one chunk before the next; as many as stages if not given
            (Megatron's ``--microbatch-group-size-per-virtual-pipeline-stage``).
    """
    behind = num_stages - stage - 1
    wanted = behind if num_chunks == 1 else 2 * behind + (num_chunks - 1) * (group or num_stages)
    return min(wanted, num_microbatches * num_chunks) if num_stages > 1 else 0


def forward_order(num_microbatches: int, num_chunks: int, group: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) of all forward passes of any stage: groups of microbatches, chunk by chunk."""
    return [
        (microbatch, chunk)
        for first in range(0, num_microbatches, group)
        for chunk in range(num_chunks)
        for microbatch in range(first, min(first + group, num_microbatches))
    ]


def passes(
    kind: str,
    num_stages: int,
    stage: int,
    num_microbatches: int,
    num_chunks: int = 1,
    group: int | None = None,
) -> list[Pass]:
    """All passes of one stage in the order in which it runs them; arguments as for `warmup_passes`."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if num_chunks > 1 and kind != "interleaved":
        raise ValueError(f"{kind} has one chunk a stage, not {num_chunks}")
    order = forward_order(num_microbatches, num_chunks, group or num_stages)
    forward = [Pass(microbatch, chunk, True) for microbatch, chunk in order]
    # Backward goes through the chunks from the last to the first, microbatches in the same order.
    backward = [Pass(microbatch, num_chunks - 1 - chunk, False) for microbatch, chunk in order]
    if kind == "gpipe":
        return forward + backward
    ahead = warmup_passes(num_stages, stage, num_microbatches, num_chunks, group)
    steady = [
        done for pair in zip(forward[ahead:], backward[: len(order) - ahead], strict=True) for done in pair
    ]
    return forward[:ahead] + steady + backward[len(order) - ahead :]


def simulate(
    kind: str,
    forward: Durations,
    backward: Durations,
    num_microbatches: int,
    *,
    group: int | None = None,
    transfer: float = 0.0,
) -> Timeline:
    """Runs a step: every stage takes its passes in order, each as soon as what it needs has arrived.

    Args:
        kind: One of `KINDS`.
        forward: How long a forward pass takes, by stage and chunk.
        backward: How long a backward pass takes.
        num_microbatches: Of a step.
        group: As for `warmup_passes`.
        transfer: From the end of a pass to when the next stage has its output; no stage is held up by it.
    """
    num_stages, num_chunks = len(forward), len(forward[0])
    queues = [
        deque(passes(kind, num_stages, stage, num_microbatches, num_chunks, group))
        for stage in range(num_stages)
    ]
    events: list[list[Event]] = [[] for _ in range(num_stages)]
    ends: dict[tuple[int, Pass], float] = {}
    free = [0.0] * num_stages
    ready = deque(range(num_stages))
    while ready:
        stage = ready.popleft()
        while queues[stage]:
            done = queues[stage][0]
            needed = _needed(stage, done, num_stages, num_chunks)
            if any(need not in ends for need in needed):
                break
            queues[stage].popleft()
            arrived = [ends[need] + (transfer if need[0] != stage else 0.0) for need in needed]
            start = max([free[stage], *arrived])
            duration = (forward if done.forward else backward)[stage][done.chunk]
            free[stage] = ends[stage, done] = start + duration
            events[stage].append(Event(stage, done, start, free[stage]))
            # Only neighbours can have waited for it.
            for other in {(stage + 1) % num_stages, (stage - 1) % num_stages} - {stage}:
                if other not in ready:
                    ready.append(other)
    stuck = [stage for stage in range(num_stages) if queues[stage]]
    if stuck:
        raise ValueError(
            f"{kind} with {num_stages} stages, {num_microbatches} microbatches and groups of "
            f"{group or num_stages} never ends: stages {stuck} wait for each other"
        )
    return Timeline(kind, tuple(tuple(of_stage) for of_stage in events))


def _needed(stage: int, done: Pass, num_stages: int, num_chunks: int) -> list[tuple[int, Pass]]:
    """What must have ended before a pass can start; chunk by chunk the model winds round the stages."""
    microbatch, chunk = done.microbatch, done.chunk
    if done.forward:
        if stage:
            return [(stage - 1, done)]
        return [(num_stages - 1, Pass(microbatch, chunk - 1, True))] if chunk else []
    own = (stage, Pass(microbatch, chunk, True))
    if stage < num_stages - 1:
        return [own, (stage + 1, done)]
    return [own, (0, Pass(microbatch, chunk + 1, False))] if chunk < num_chunks - 1 else [own]
