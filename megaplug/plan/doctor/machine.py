"""Cores, memory, shared memory and disks, as far as this process may use them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megaplug.plan.doctor.finding import Finding

GIB = 1024**3
# Judgement, not measurement: a rank with torch and Megatron imported holds about 1 GiB before its first step.
_LEAST_MEMORY = 1.5 * GIB
_MEMORY_FOR_COMFORT = 4 * GIB
# Containers start with 64 MiB of it, which neither NCCL nor data loaders can live with.
_SHARED_MEMORY_FOR_COMFORT = 256 * 1024**2
_LEAST_DISK = 0.5 * GIB
_DISK_FOR_COMFORT = 5 * GIB


def machine_findings(runs_dir: Path, cache_dir: Path) -> list[Finding]:
    """Cores, memory, shared memory, and the disks that a run writes to."""
    return [
        cores_finding(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cgroup_cores()),
        memory_finding(*_memory()),
        shared_memory_finding(Path("/dev/shm")),
        disk_finding("disk for runs", runs_dir, "runs_dir"),
        disk_finding("disk for data", cache_dir, "data.cache_dir"),
    ]


def cores_finding(usable: int, present: int, quota: float | None) -> Finding:
    """Cores that this process may use; a container's quota can leave fewer than the affinity shows."""
    shown = f"{usable} usable" if usable == present else f"{usable} usable of {present}"
    if quota is not None and quota < usable:
        cure = f"set OMP_NUM_THREADS={max(1, int(quota))}, or give the container more: more threads only wait"
        return Finding("cores", f"{shown}, but this container's quota is {quota:g}", "warning", cure)
    return Finding("cores", shown)


def cgroup_cores(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """The quota of cores of this container (cgroup v2: microseconds a period), None if there is none."""
    if not file.is_file():
        return None
    quota, _, period = file.read_text().partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> tuple[int, int]:
    """Free and total bytes, the container's limit included; psutil may be missing, so Linux is asked."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    available, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    limit = _number_in(Path("/sys/fs/cgroup/memory.max"))
    used = _number_in(Path("/sys/fs/cgroup/memory.current"))
    if limit is None or used is None or limit >= total:
        return available, total
    return min(available, limit - used), limit


def _number_in(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else "max"
    return None if text == "max" else int(text)


def memory_finding(available: int, total: int) -> Finding:
    """Main memory, in bytes."""
    value = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    if available < _LEAST_MEMORY:
        cure = "end what holds it: a rank alone takes about 1 GiB before its first step"
        return Finding("memory", value, "broken", cure)
    if available < _MEMORY_FOR_COMFORT:
        return Finding("memory", value, "warning", "keep to one or two ranks, or end what holds it")
    return Finding("memory", value)


def shared_memory_finding(folder: Path) -> Finding:
    """The size of /dev/shm, which NCCL and data loaders with workers pass tensors through."""
    if not folder.is_dir():
        return Finding("shared memory", f"no {folder}", "warning", f"mount a tmpfs at {folder}")
    usage = shutil.disk_usage(folder)
    value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    if usage.free < _SHARED_MEMORY_FOR_COMFORT:
        cure = "start the container with --shm-size=8g or --ipc=host, or remove what fills it"
        return Finding("shared memory", value, "warning", cure)
    return Finding("shared memory", value)


def disk_finding(name: str, folder: Path, key: str) -> Finding:
    """Free space where a folder is, or will be made.

    Args:
        name: What the finding is called.
        folder: The folder; the nearest parent that exists is asked.
        key: The configuration key that moves it elsewhere.
    """
    folder = folder.expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    elsewhere = f"{key}=/another/disk moves it"
    if not existing.is_dir():
        return Finding(name, f"{existing} is not a folder", "broken", elsewhere)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, f"{existing} cannot be written to", "broken", elsewhere)
    free = shutil.disk_usage(existing).free
    value = f"{free / GIB:.1f} GiB free for {folder}"
    if free < _LEAST_DISK:
        return Finding(name, value, "broken", f"make room, or {elsewhere}")
    if free < _DISK_FOR_COMFORT:
        return Finding(name, value, "warning", f"checkpoints may not fit: make room, or {elsewhere}")
    return Finding(name, value)
