"""Whether Megatron's and NVRx's ways of finding faults can be had where the job runs."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from megaplug.errors import Problem
from megaplug.job.schema import Job, ResilienceConfig

NVRX = "nvidia_resiliency_ext"
INSTALL = "pip install 'nvidia-resiliency-ext>=0.6'"
# What Megatron-core 0.19 names; it calls earlier ones in a way that they do not know.
_OLDEST = (0, 6)


def resilience_problems(job: Job, device: str | None) -> Iterator[Problem]:
    """Everything that would keep ``resilience`` from doing what it says.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda`` where it is known.
    """
    config, default = job.resilience, ResilienceConfig()
    if config.enable_ft_package:
        if message := _why_no_nvrx():
            yield Problem("resilience.enable_ft_package", message, INSTALL, lacks=NVRX)
        if job.launch.kind in ("local", "nodes"):
            message = "needs the monitors that NVRx's own launcher starts beside the ranks"
            hint = (
                "use launch=freeze, and start the job.yaml that it names with ft_launcher: docs/surviving.md"
            )
            yield Problem("resilience.enable_ft_package", message, hint)
    else:
        for key in ("calc_ft_timeouts", "ft_num_warmup_iters"):
            if getattr(config, key) != getattr(default, key):
                message = "does nothing without resilience.enable_ft_package=true"
                yield Problem(f"resilience.{key}", message, "leave it out, or enable that")
    if config.log_straggler and device == "cpu":
        message = "Megatron's detector measures the clocks and events of a GPU, and the device is cpu"
        hint = "leave it out: slowest_rank of metrics.jsonl says who is behind"
        yield Problem("resilience.log_straggler", message, hint)
    if config.result_rejected_tracker_filename:
        yield from _tracker_problems(Path(config.result_rejected_tracker_filename))
    if config.error_injection_rate and config.rerun_mode == "disabled":
        message = "injects nothing where no result is computed again"
        yield Problem("resilience.error_injection_rate", message, "resilience.rerun_mode=validate_results")


def _tracker_problems(file: Path) -> Iterator[Problem]:
    """Megatron appends to it in the rank, and makes no folder."""
    key = "resilience.result_rejected_tracker_filename"
    folder = file.parent
    if file.is_dir():
        yield Problem(key, f"{file} is a folder", f"{key}={file / 'rejected.txt'}")
    elif not folder.is_dir():
        yield Problem(key, f"there is no folder {folder}", f"mkdir -p {folder}", lacks=str(folder))
    elif not os.access(file if file.exists() else folder, os.W_OK):
        message = f"{file} may not be written to by this user"
        yield Problem(key, message, "name another file", lacks=str(file))


def _why_no_nvrx() -> str:
    """Why NVRx cannot be had here; empty if it can."""
    if importlib.util.find_spec(NVRX) is None:
        return f"needs the package {NVRX}, which is not installed"
    found = metadata.version("nvidia-resiliency-ext")
    numbers = tuple(int(number) for number in re.findall(r"[0-9]+", found)[:2])
    if numbers < _OLDEST:
        return f"needs {NVRX} 0.6 or newer, and {found} is installed"
    return ""
