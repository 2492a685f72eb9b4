"""What a job's timeline shows: its step under 1F1B, interleaved 1F1B and GPipe, or why one cannot be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megaplug.plan.cluster import Cluster
from megaplug.plan.pictures.durations import chunk_seconds
from megaplug.plan.schedule import Timeline, simulate
from megaplug.plan.workload import Workload
from megaplug.topology import violations

MOST_MICROBATCHES = 32
"""So many are drawn, or two rounds of a longer pipeline; fewer than there are is said."""

NAMES = {"1f1b": "1F1B", "interleaved": "interleaved 1F1B", "gpipe": "GPipe"}


@dataclass(frozen=True)
class Panel:
    """One schedule of one job.

    Attributes:
        kind: One of `schedule.KINDS`.
        chunks: Virtual stages of a stage.
        own: Whether it is the job's own schedule.
        microbatches: Of the job's step.
        drawn: Of the timeline; fewer where all would be too many to see.
        timeline: None if the schedule cannot be.
        seconds: Of the whole step, without what comes after its microbatches.
        work: Seconds that the busiest stage computes in it.
        kept: Microbatches whose activations the first stage keeps at once.
        idle: Part of all stages' time in which they wait.
        reason: Why it cannot be.
    """

    kind: str
    chunks: int
    own: bool
    microbatches: int
    drawn: int = 0
    timeline: Timeline | None = None
    seconds: float = 0.0
    work: float = 0.0
    kept: float = 0.0
    idle: float = 0.0
    reason: str = ""

    @property
    def bubble(self) -> float:
        """Wait of the busiest stage as part of its work."""
        return (self.seconds - self.work) / self.work

    def data(self) -> dict[str, Any]:
        """The numbers of the panel; every pass as stage, microbatch, chunk, direction, start, end."""
        told = {"schedule": self.kind, "chunks": self.chunks, "own": self.own}
        if self.timeline is None:
            return told | {"impossible": self.reason}
        return told | {
            "microbatches": self.microbatches,
            "microbatches_drawn": self.drawn,
            "seconds": self.seconds,
            "bubble_of_work": self.bubble,
            "idle": self.idle,
            "microbatches_kept_on_first_stage": self.kept,
            "columns": ["stage", "microbatch", "chunk", "pass", "start", "end"],
            "passes": [
                [
                    event.stage,
                    event.done.microbatch,
                    event.done.chunk,
                    "forward" if event.done.forward else "backward",
                    round(event.start, 9),
                    round(event.end, 9),
                ]
                for events in self.timeline.events
                for event in events
            ],
        }


def schedule_panels(workload: Workload, cluster: Cluster) -> list[Panel]:
    """The three schedules of a job.

    Args:
        workload: A legal job. Where it is not interleaved, the interleaving with fewest chunks is shown.
        cluster: Its machines, which say how long a pass takes.

    Raises:
        UserError: The layers cannot be dealt out, or the cluster has no peak for the number format.
    """
    own = "interleaved" if workload.topology.vpp else "1f1b"
    plain = replace(workload, topology=replace(workload.topology, vpp=None))
    woven, reason = _interleaved(workload)
    panels = [_panel("1f1b", plain, cluster, own)]
    if woven is None:
        panels.append(Panel("interleaved", 0, False, workload.num_microbatches, reason=reason))
    else:
        panels.append(_panel("interleaved", woven, cluster, own))
    return [*panels, _panel("gpipe", plain, cluster, own)]


def _interleaved(workload: Workload) -> tuple[Workload | None, str]:
    """The job with virtual stages: its own, else the fewest that can be; or why there are none."""
    topology, shape = workload.topology, workload.shape
    if topology.vpp:
        return workload, ""
    reason = ""
    for chunks in range(2, max(3, max(topology.layers_of_stage(shape.num_layers)) + 1)):
        tried = replace(topology, vpp=chunks)
        problems = violations(tried, shape, workload.batch)
        if not problems:
            return replace(workload, topology=tried), ""
        reason = reason or problems[0].message
    return None, reason


def _panel(kind: str, workload: Workload, cluster: Cluster, own: str) -> Panel:
    topology, count = workload.topology, workload.num_microbatches
    chunks = topology.vpp or 1
    forward, backward = chunk_seconds(workload, cluster)
    # Whole rounds of the pipeline: interleaving needs them.
    drawn = min(count, max(2, MOST_MICROBATCHES // topology.pp) * topology.pp)
    timeline = simulate(kind, forward, backward, drawn)
    kept = timeline.in_flight(0) / chunks * (count / drawn if kind == "gpipe" else 1)
    per_stage = [sum(one) + sum(other) for one, other in zip(forward, backward, strict=True)]
    # Every further microbatch takes as long as on the busiest stage.
    seconds = timeline.makespan + (count - drawn) * max(per_stage)
    return Panel(
        kind,
        chunks,
        kind == own,
        count,
        drawn,
        timeline,
        seconds,
        count * max(per_stage),
        kept,
        1 - count * sum(per_stage) / (topology.pp * seconds),
    )
