"""What this machine has, without torch, and whether a job fits on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megaplug.errors import Problem

# Resident memory of a rank that has imported torch and Megatron and has no model yet: measured, bytes.
RANK_BASE_BYTES = 700_000_000


@dataclass(frozen=True)
class Machine:
    """What a launcher can count on.

    Attributes:
        num_gpus: CUDA devices that a process would see here.
        cpu_count: CPUs that this process may use: affinity and the container's limit, at least 1.
        memory_total: Bytes, the container's limit included.
        memory_available: Bytes that can be had without swapping, the container's limit included.
    """

    num_gpus: int
    cpu_count: int
    memory_total: int
    memory_available: int


def detect_machine() -> Machine:
    """Look at this machine. Takes milliseconds and imports no torch."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _cgroup_memory()
    total, available = int(memory.total), int(memory.available)
    if limit is not None:
        total, available = min(total, limit), max(0, min(available, limit - used))
    return Machine(_num_gpus(), _cpu_count(), total, available)


def machine_problems(
    machine: Machine,
    world_size: int,
    bytes_per_rank: int,
    device: str,
    *,
    bytes_beside_saving: int = 0,
    runs_dir: Path | None = None,
    checkpoint_bytes: int = 0,
) -> list[Problem]:
    """What this machine lacks for a job whose ranks all run on it.

    Args:
        machine: From `detect_machine`.
        world_size: Number of ranks.
        bytes_per_rank: Host memory of the model, optimizer and activations of one rank, bytes (0: not known).
        device: ``cuda`` or ``cpu``, already resolved.
        bytes_beside_saving: Host memory that a rank takes besides while it saves and trains on, bytes.
        runs_dir: Where checkpoints go; it need not exist yet.
        checkpoint_bytes: Estimated size of all checkpoints that will lie there at once.
    """
    problems = []
    if device == "cuda" and world_size > machine.num_gpus:
        ranks = "1 rank needs a GPU" if world_size == 1 else f"{world_size} ranks need a GPU each"
        fewer = f"at most topology.world_size={machine.num_gpus}, or " if machine.num_gpus else ""
        problems.append(
            Problem(
                "topology.world_size",
                f"{ranks} and this machine shows {machine.num_gpus or 'none'}",
                f"choose {fewer}device=cpu to try the layout on CPU ranks",
            )
        )
    if device == "cpu":
        each = RANK_BASE_BYTES + bytes_per_rank + bytes_beside_saving
        if world_size * each > machine.memory_available:
            fit = machine.memory_available // each
            beside = f", a save beside it {_gb(bytes_beside_saving)}" if bytes_beside_saving else ""
            cure = f"at most {fit} such ranks fit here" if fit else "choose a smaller model or batch"
            if world_size * (each - bytes_beside_saving) <= machine.memory_available:
                cure = "let training wait for saves: checkpoint.async_save=false"
            problems.append(
                Problem(
                    "topology.world_size",
                    f"{world_size} ranks of {_gb(each)} (imports {_gb(RANK_BASE_BYTES)}, model and training "
                    f"{_gb(bytes_per_rank)}{beside}) need {_gb(world_size * each)} and this machine has "
                    f"{_gb(machine.memory_available)} free of {_gb(machine.memory_total)}",
                    cure,
                )
            )
    if runs_dir is not None and checkpoint_bytes:
        place = next(folder for folder in (runs_dir, *runs_dir.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if checkpoint_bytes > free:
            problems.append(
                Problem(
                    "runs_dir",
                    f"the checkpoints need {_gb(checkpoint_bytes)}; the disk of {place} has {_gb(free)} left",
                    "free some space, keep fewer (checkpoint.keep), or choose another disk (runs_dir)",
                )
            )
    return problems


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def gpu_name() -> str | None:
    """What the driver calls the first GPU here, such as ``NVIDIA H100 80GB HBM3``; None where there is none.

    The driver's files are read, and ``nvidia-smi`` is asked where a container hides them.
    """
    if not _num_gpus():
        return None
    for file in _model_files():
        if model := re.search(r"^Model:\s*(\S.*)$", file.read_text(), re.MULTILINE):
            return model[1].strip()
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
    return answer.splitlines()[0].strip() if answer.strip() else None


def _model_files() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))


def _num_gpus() -> int:
    """CUDA's own counting: the devices of this container, cut down by CUDA_VISIBLE_DEVICES."""
    nodes = sum(bool(re.fullmatch(r"nvidia[0-9]+", entry.name)) for entry in Path("/dev").glob("nvidia*"))
    driver = Path("/proc/driver/nvidia/gpus")
    known = sum(1 for _ in driver.iterdir()) if driver.is_dir() else 0
    # A container sees every GPU of its host below /proc and only its own below /dev.
    present = min(nodes, known) if nodes and known else max(nodes, known)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(_visible(visible), present)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that a process sees here."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = _num_gpus()
    return [str(gpu) for gpu in range(number)] if names is None else names.split(",")[:number]


def _visible(text: str) -> int:
    """How many devices CUDA_VISIBLE_DEVICES names; CUDA stops reading at the first that is none."""
    count = 0
    for name in text.split(","):
        if not re.fullmatch(r"[0-9]+|(GPU|MIG)-.+", name.strip()):
            break
        count += 1
    return count


def _cpu_count() -> int:
    allowed = len(os.sched_getaffinity(0))
    text = _read_cgroup("cpu.max").split()
    if len(text) == 2 and text[0].isdigit():
        allowed = min(allowed, max(1, int(text[0]) // int(text[1])))
    return allowed


def _cgroup_memory() -> tuple[int | None, int]:
    """The container's memory limit in bytes, if there is one, and what of it cannot be reclaimed."""
    limit = _read_cgroup("memory.max").strip()
    current = _read_cgroup("memory.current").strip()
    if not (limit.isdigit() and current.isdigit()):
        return None, 0
    cache = re.search(r"^inactive_file ([0-9]+)$", _read_cgroup("memory.stat"), re.MULTILINE)
    return int(limit), max(0, int(current) - (int(cache[1]) if cache else 0))


def _read_cgroup(name: str) -> str:
    """A control file of this process's own cgroup (version 2); empty where there is none."""
    groups = Path("/proc/self/cgroup")
    own = re.search(r"^0::/(.*)$", groups.read_text(), re.MULTILINE) if groups.exists() else None
    path = Path("/sys/fs/cgroup") / (own[1] if own else "") / name
    return path.read_text() if path.is_file() else ""
