"""The environment that torch, CUDA and NCCL read once: set before any of them is imported."""

from __future__ import annotations

import os
import shutil
import subprocess

from megaplug.errors import UserError
from megaplug.job.freeze import FrozenJob
from megaplug.job.variables import CONNECTIONS, OFFLOAD, moves_activations, needs_one_queue, uses_fsdp

_BLACKWELL = 10


def prepare(frozen: FrozenJob) -> None:
    """Set what the job needs in ``os.environ``; what a person has set holds.

    Raises:
        UserError: What a person has set cannot work.
    """
    if frozen.derived.device == "cpu":
        # Helpers that Megatron compiles are plain functions on the CPU.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if moves_activations(frozen.megatron_args):
        os.environ[OFFLOAD] = "1"
    connections = queues(frozen, os.environ.get(CONNECTIONS))
    if connections is not None:
        os.environ[CONNECTIONS] = connections


def queues(frozen: FrozenJob, given: str | None) -> str | None:
    """How many queues to a GPU there must be; None where CUDA's own number is right.

    With one queue a transfer that was asked for first is also started first, on which the overlap of tensor
    and context parallelism relies before Blackwell; Megatron refuses any other number there, and refuses 1
    under FSDP, whose transfers would wait behind computation (``validate_args`` of megatron-core 0.19).

    Args:
        frozen: The job.
        given: What the environment says.
    """
    if uses_fsdp(frozen.megatron_args) and given == "1":
        raise UserError(
            f"{CONNECTIONS}=1 is set, under which FSDP's transfers would wait behind computation",
            hint=f"unset {CONNECTIONS}",
            exit_code=1,
        )
    if not needs_one_queue(frozen.megatron_args):
        return given
    # The stand-in answers as an old GPU.
    if frozen.derived.device == "cuda" and _compute_capability() >= _BLACKWELL:
        return given
    if given not in (None, "1"):
        raise UserError(
            f"{CONNECTIONS}={given} is set, and tensor and context parallelism need 1 on this GPU",
            hint=f"unset {CONNECTIONS}",
            exit_code=1,
        )
    return "1"


def _compute_capability() -> int:
    """The major number of this machine's GPUs, without torch; 0 where the driver's tool does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    words = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    first = done.stdout.split(".", 1)[0].strip()
    return int(first) if done.returncode == 0 and first.isdigit() else 0
