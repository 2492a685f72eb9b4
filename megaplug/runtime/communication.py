"""How long a rank's computation stands still for communication, by process group.

Every collective and point-to-point call of torch's Python side ends in a method of ``ProcessGroup``, and
every wait in ``Work.wait``; the clock stands between. With gloo a call holds the host, and host time is
measured. With NCCL it holds the current CUDA stream, and CUDA events on that stream are measured;
communication that runs beside computation costs nothing until it is waited for, and is not counted before.
So the figure is *exposed* time: what would be saved by a network without limits and ranks without
stragglers. Waiting for a slower rank counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup, Work

# By how Megatron's description of a group begins (``group_desc`` in its parallel_state.py).
_LABELS = {
    "TENSOR_MODEL_PARALLEL": "tp",
    "PIPELINE_MODEL_PARALLEL": "pp",
    "EMBEDDING": "pp",
    "POSITION_EMBEDDING": "pp",
    "DATA_PARALLEL": "dp",
    "INTRA_PARTIAL_DATA_PARALLEL": "dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE": "dp",
    "CONTEXT_PARALLEL": "cp",
    "HIERARCHICAL_CONTEXT_PARALLEL": "cp",
    "EXPERT_MODEL_PARALLEL": "ep",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL": "ep",
    "EXPERT_TENSOR_PARALLEL": "etp",
    "EXPERT_DATA_PARALLEL": "edp",
}
LABELS = ("tp", "pp", "dp", "cp", "ep", "etp", "edp", "other")
"""What is told apart; ``edp`` are the replicas of an expert, ``other`` spans several dimensions."""

_CALLS = (
    "allreduce", "allreduce_coalesced", "allgather", "allgather_coalesced", "_allgather_base",
    "allgather_into_tensor_coalesced", "all_gather_single", "all_gather_single_coalesced",
    "reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "broadcast",
    "reduce", "gather", "gather_single", "gather_into_tensor", "scatter", "send", "recv", "recv_anysource",
    "barrier", "_end_coalescing",
)  # fmt: skip


def label_of(description: str) -> str:
    """One of `LABELS` for a group's description."""
    fitting = [start for start in _LABELS if description.startswith(start)]
    return _LABELS[max(fitting, key=len)] if fitting else "other"


class CommunicationClock:
    """Exposed seconds by group, between `begin` and `take`.

    Args:
        on_cpu: Whether the ranks talk over gloo.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.active = False
        self._on_cpu = on_cpu
        self._seconds: dict[str, float] = {}
        self._pairs: list[tuple[str, Any, Any]] = []
        self._labels: dict[str, str | None] = {}
        self._owners: WeakKeyDictionary[Work, str] = WeakKeyDictionary()

    def install(self) -> None:
        """Stand before every method of torch's process groups that communicates; once for a process."""
        group_class: Any = ProcessGroup
        work_class: Any = Work
        for name in _CALLS:
            if hasattr(group_class, name):
                setattr(group_class, name, self._timed_call(getattr(group_class, name)))
        work_class.wait = self._timed_wait(work_class.wait)

    def begin(self) -> None:
        """Measure from here on."""
        self._seconds, self._pairs = {}, []
        self.active = True

    def end(self) -> None:
        """Measure no more."""
        self.active = False

    def take(self) -> dict[str, float]:
        """Seconds by group since `begin`; on CUDA it waits for what was measured."""
        for label, start, end in self._pairs:
            end.synchronize()
            self._seconds[label] = self._seconds.get(label, 0.0) + start.elapsed_time(end) / 1000
        self._pairs = []
        return dict(self._seconds)

    def _timed_call(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return real(group, *args, **kwargs)
            label = self._label(group)
            if label is None:
                return real(group, *args, **kwargs)
            work = self._measured(label, real, group, *args, **kwargs)
            if work is not None:
                self._owners[work] = label
            return work

        return call

    def _timed_wait(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: Work, *args: Any, **kwargs: Any) -> Any:
            label = self._owners.get(work) if self.active else None
            if label is None:
                return real(work, *args, **kwargs)
            return self._measured(label, real, work, *args, **kwargs)

        return wait

    def _measured(self, label: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._on_cpu:
            began = time.perf_counter()
            answer = real(*args, **kwargs)
            self._seconds[label] = self._seconds.get(label, 0.0) + time.perf_counter() - began
            return answer
        if torch.cuda.is_current_stream_capturing():
            return real(*args, **kwargs)  # what a CUDA graph replays cannot be timed from here
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        answer = real(*args, **kwargs)
        end.record()
        self._pairs.append((label, start, end))
        return answer

    def _label(self, group: ProcessGroup) -> str | None:
        """The group's label; None for a group of one, where nobody waits for anybody."""
        name = group.group_name
        if name not in self._labels:
            self._labels[name] = label_of(group.group_desc) if group.size() > 1 else None
        return self._labels[name]
