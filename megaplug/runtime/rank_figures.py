"""What one rank knows and the others do not: its waits, its memory, its pace. Gathered where it is logged.

Every figure is that of the step it stands with, but for the peaks, which are those of the run so far.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from megaplug.runtime.communication import LABELS, CommunicationClock
from megaplug.runtime.stopwatch import data_wait

_OWN = ("data", "busy", "peak", "reserved", "utilization")


class RankFigures:
    """Measures this rank's steps.

    Args:
        on_cpu: Whether the CPU stands in for CUDA.
        communication: Whether calls of process groups are timed, and with them how long a rank computes.
    """

    def __init__(self, *, on_cpu: bool, communication: bool) -> None:
        self.peak = 0
        self._on_cpu = on_cpu
        self._clock = CommunicationClock(on_cpu) if communication else None
        self._step_seconds = math.nan
        self._data_seconds = math.nan
        self._sees_utilization = not on_cpu and _has_utilization()
        if self._clock is not None:
            self._clock.install()

    def watch(self, training: Any) -> None:
        """Stand around ``megatron.training.training.train_step``."""
        real_step = training.train_step

        def train_step(*args: Any, **kwargs: Any) -> Any:
            data_wait.take()  # what validation has waited for is not this step's
            if self._clock is not None:
                self._clock.begin()
            began = time.perf_counter()
            answer = real_step(*args, **kwargs)
            self._step_seconds = time.perf_counter() - began
            self._data_seconds = data_wait.take()
            if self._clock is not None:
                self._clock.end()
            return answer

        training.train_step = train_step

    def gather(self) -> list[list[float]]:
        """Every rank's figures of the step that has just ended; all ranks call it, synchronized."""
        waits = self._clock.take() if self._clock is not None else {}
        busy = self._step_seconds - sum(waits.values()) if self._clock is not None else math.nan
        self.peak = torch.cuda.max_memory_allocated()
        reserved = math.nan if self._on_cpu else float(torch.cuda.max_memory_reserved())
        utilization = float(torch.cuda.utilization()) if self._sees_utilization else math.nan
        own = [self._data_seconds, busy, float(self.peak), reserved, utilization]
        own += [waits.get(label, math.nan) for label in LABELS]
        world_size = torch.distributed.get_world_size()
        if world_size == 1:
            return [own]
        device = torch.cuda.current_device()
        mine = torch.tensor(own, dtype=torch.float64, device=device)
        every = torch.empty(world_size * len(own), dtype=torch.float64, device=device)
        torch.distributed.all_gather_into_tensor(every, mine)
        return every.view(world_size, len(own)).tolist()


def _has_utilization() -> bool:
    """Whether NVML can be asked, with a line where not: the figure is absent then, not zero."""
    if importlib.util.find_spec("pynvml") is None:
        print("megaplug: no GPU utilization: pip install nvidia-ml-py", flush=True)
        return False
    import pynvml

    try:
        torch.cuda.utilization()
    except pynvml.NVMLError as error:  # a slice of a GPU (MIG) does not have it
        print(f"megaplug: no GPU utilization: {error}", flush=True)
        return False
    return True


def merged(rows: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """The figures of all ranks as metrics; what no rank knows is left out.

    Args:
        rows: From `RankFigures.gather`, one for each rank.

    Returns:
        ``data_seconds``, ``memory_peak_bytes`` and ``memory_reserved_bytes`` of the rank that has most;
        ``gpu_utilization`` (percent) and ``communication_<group>_seconds``, means over those that have them;
        of two ranks or more ``slowest_rank`` and ``slowest_rank_behind_seconds``: how much longer it has
        computed than the median of the others.
    """
    columns = dict(zip((*_OWN, *LABELS), zip(*rows, strict=True), strict=True))
    known = {name: [value for value in values if not math.isnan(value)] for name, values in columns.items()}
    found: dict[str, float | int] = {}
    if known["data"]:
        found["data_seconds"] = max(known["data"])
    if known["peak"]:
        found["memory_peak_bytes"] = int(max(known["peak"]))
    if known["reserved"]:
        found["memory_reserved_bytes"] = int(max(known["reserved"]))
    if known["utilization"]:
        found["gpu_utilization"] = statistics.mean(known["utilization"])
    if len(rows) > 1 and len(known["busy"]) == len(rows):
        busy = known["busy"]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        others = statistics.median(seconds for rank, seconds in enumerate(busy) if rank != slowest)
        found |= {"slowest_rank": slowest, "slowest_rank_behind_seconds": busy[slowest] - others}
    for label in LABELS:
        if known[label]:
            found[f"communication_{label}_seconds"] = statistics.mean(known[label])
    return found
