"""The last words of a rank that failed, and what they suggest."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

_NOISE = re.compile(
    r"(Warning: |warnings\.warn\(|\bWARNING\b|^\s*return func\(\*args, \*\*kwargs\)$|^\[W[0-9])"
)
_FULL = re.compile(r"No space left on|Disk quota", re.IGNORECASE)
_BYTES = 64 << 10
# With less than this left, what a log should have said of a full disk may not have fitted on it.
_FULL_DISK = 1 << 20


def log_tail(log: Path, start: int = 0, num_lines: int = 20) -> tuple[str, ...]:
    """The last lines of a log, without warnings; none where it cannot be read: somebody may have removed it.

    Args:
        log: A rank's log.
        start: The byte at which this start of the rank begins in it.
        num_lines: At most so many.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    lines = [line.rstrip() for line in text.splitlines()]
    return tuple([line for line in lines if line and not _NOISE.search(line)][-num_lines:])


def hint_for(
    lines: tuple[str, ...], exit_code: int | None, oom_kills: int, folder: Path | None = None
) -> str:
    """What would help after a failure, judged from the log's end and the exit code.

    Args:
        lines: From `log_tail`.
        exit_code: The failing rank's; negative for a signal.
        oom_kills: How often the kernel's out-of-memory killer has struck on this machine meanwhile.
        folder: The run, for a word on its disk.
    """
    text = "\n".join(lines)
    smaller = "a smaller train.micro_batch_size, fewer ranks, or train.recompute_granularity=full needs less"
    full = _FULL.search(text)
    if full or (folder is not None and _free_bytes(folder) < _FULL_DISK):
        place = f" of {folder}" if folder is not None else ""
        return (
            f"the disk{place} is full: free some space and the same command goes on, or choose another "
            "disk (runs_dir)"
        )
    if "CUDA out of memory" in text or "torch.OutOfMemoryError" in text:
        return f"the GPU's memory is full: {smaller}"
    if exit_code == -9 and oom_kills > 0:
        return f"the machine ran out of memory and the kernel killed a process: {smaller}"
    if exit_code == -9:
        return (
            f"if nobody killed it, the machine ran out of memory (the kernel's log tells: dmesg): {smaller}"
        )
    if "MemoryError" in text or "Cannot allocate memory" in text or "can't allocate memory" in text:
        return f"the machine's memory is full: {smaller}"
    return ""


def _free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf  # it is not known that none are


def count_oom_kills() -> int:
    """How often the kernel's out-of-memory killer has struck on this machine; 0 where it does not say."""
    counters = Path("/proc/vmstat")
    found = (
        re.search(r"^oom_kill ([0-9]+)$", counters.read_text(), re.MULTILINE) if counters.exists() else None
    )
    return int(found[1]) if found else 0
