"""What the benchmarks share: alternating timings, peak memory of one call, and where it was measured."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[str], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of every run of every contender, taken in turns so that a busy machine hurts all alike.

    Args:
        contenders: By their names.
        repeats: How often each is timed.
        device: ``cpu`` or ``cuda``, which is waited for.
        clock: Seconds.
        before: Is called with the contender's name before each run of it, and no time is counted for that.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            before(name)
            _synchronize(device)
            start = clock()
            run()
            _synchronize(device)
            if repeat:  # the first round warms up
                seconds[name].append(clock() - start)
    return seconds


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """How much more memory was in use at the worst moment of ``run`` than before it.

    On CUDA as counted by torch's allocator. On a CPU as resident memory: the kernel's high-water mark is
    put back to what is resident now (Linux), so run this in a fresh process, once.
    """
    if device == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    run()
    return _resident_peak() - before


def environment(device: str) -> dict[str, Any]:
    """The kind of machine, the versions and the day, to be written beside every number."""
    from importlib.metadata import version

    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "date": datetime.now(UTC).date().isoformat(),
        "maximum_resident_bytes_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.machine()
