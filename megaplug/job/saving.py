"""Whether a job is saved while training goes on, and by whose processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job
from megaplug.job.sharding import implementation

_NVRX = "nvidia_resiliency_ext"


def async_strategy(job: Job, device: str) -> str:
    """``mcore`` (processes that each rank forks), ``nvrx`` (those of NVRx), or empty: training waits.

    Args:
        job: A job that passed its checks.
        device: ``cpu`` or ``cuda``.
    """
    asked = job.checkpoint.async_save
    strategy = job.checkpoint.async_strategy or ("nvrx" if device == "cuda" and _has_nvrx() else "mcore")
    # On a GPU it has not been measured.
    on = device == "cpu" if asked is None else asked
    return strategy if on and not _why_not(job, strategy, device) else ""


def async_problems(job: Job, device: str | None) -> Iterator[Problem]:
    """Why a job cannot be saved as asked.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda``; None where it is not known.
    """
    asked, strategy = job.checkpoint.async_save, job.checkpoint.async_strategy
    if not asked:
        if strategy is not None and asked is False:
            message = f"{strategy} says who saves while training goes on, and async_save=false"
            yield Problem("checkpoint.async_strategy", message, "leave it out")
        return
    if device is None:
        return
    strategy = strategy or ("nvrx" if device == "cuda" and _has_nvrx() else "mcore")
    if reason := _why_not(job, strategy, device):
        lacks = _NVRX if reason == _MISSING else ""
        yield Problem("checkpoint.async_save", reason, "use checkpoint.async_save=false", lacks)


_MISSING = "checkpoint.async_strategy=nvrx needs nvidia-resiliency-ext 0.6 or newer, which is not installed"


def _why_not(job: Job, strategy: str, device: str) -> str:
    if strategy == "nvrx":
        if device == "cpu":
            return "checkpoint.async_strategy=nvrx needs a GPU, and the device is cpu"
        return "" if _has_nvrx() else _MISSING
    if implementation(job) == "megatron_fsdp":
        return (
            f"the checkpoints of Megatron-FSDP (topology.zero={job.topology.zero}, format fsdp_dtensor) are "
            "saved while training goes on by NVRx only"
        )
    if device == "cuda" and job.optimizer.optimizer_cpu_offload:
        return "what optimizer.optimizer_cpu_offload keeps in pinned memory is not seen by a forked process"
    return ""


def _has_nvrx() -> bool:
    """Whether there is an NVRx with the part that Megatron takes; its version is asked by Megatron."""
    if importlib.util.find_spec(_NVRX) is None:
        return False
    return (
        importlib.util.find_spec(f"{_NVRX}.checkpointing.async_ckpt.cached_metadata_filesystem_reader")
        is not None
    )
