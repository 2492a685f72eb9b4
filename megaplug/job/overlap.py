"""Which communication runs beside computation, and why the rest does not.

The conditions are those of Megatron 0.19: ``validate_args`` of ``training/arguments.py`` and
``training/determinism.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megaplug.errors import Problem
from megaplug.job.sharding import implementation

if TYPE_CHECKING:
    from megaplug.job.schema import Job
    from megaplug.topology import Topology

# What a person calls them.
NAMES = {
    "overlap_grad_reduce": "gradient reduction",
    "overlap_param_gather": "parameter gathering",
    "overlap_p2p_comm": "pipeline transfers",
    "tp_comm_overlap": "tensor-parallel transfers",
}
ON = "on"
# What nobody would change for the sake of overlap.
_NOTHING_TO_DO = ("there is one", "tp is 1", "it needs a GPU")


def obstacles(job: Job, topology: Topology, *, backend: str, device: str) -> dict[str, str]:
    """For each kind of overlap why it cannot be had; empty where it can.

    Args:
        job: The job.
        topology: Its resolved rank grid.
        backend: ``native`` or ``te``.
        device: ``cpu`` or ``cuda``.
    """
    gradients = _gradients(job, topology)
    return {
        "overlap_grad_reduce": gradients,
        "overlap_param_gather": gradients or _parameters(job),
        "overlap_p2p_comm": _pipeline(topology),
        "tp_comm_overlap": _tensor_parallel(job, topology, backend, device),
    }


def _gradients(job: Job, topology: Topology) -> str:
    if implementation(job) == "torch_fsdp2":
        return "torch's FSDP2 overlaps by itself"
    experts_are_replicated = bool(job.moe.num_experts) and topology.expert_dp > 1
    if topology.dp * topology.cp == 1 and not experts_are_replicated:
        return "there is one data-parallel rank"
    return ""


def _parameters(job: Job) -> str:
    if job.overlap.overlap_grad_reduce is False:
        return "it needs overlap.overlap_grad_reduce"
    if implementation(job) == "plain":
        return "topology.zero=0 gathers no parameters"
    return ""


def _pipeline(topology: Topology) -> str:
    if topology.pp == 1:
        return "there is one pipeline stage"
    return "" if topology.vpp else "it needs virtual stages (topology.vpp)"


def _tensor_parallel(job: Job, topology: Topology, backend: str, device: str) -> str:
    if topology.tp == 1:
        return "tp is 1"
    if device == "cpu":
        return "it needs a GPU"
    if backend != "te":
        return "it needs Transformer Engine's layers (backend=te)"
    if not topology.sequence_parallel:
        return "it needs topology.sequence_parallel"
    if not job.precision.bf16:
        # Megatron sets up its buffers for that alone (initialize_ub in training/initialize.py).
        return "it needs precision=bf16"
    if job.train.deterministic_mode:
        return "train.deterministic_mode excludes it"
    return ""


def decide(job: Job, topology: Topology, *, backend: str, device: str) -> dict[str, str]:
    """``on``, or why it is off, for each kind of overlap; arguments as for :func:`obstacles`."""
    decided = {}
    for name, obstacle in obstacles(job, topology, backend=backend, device=device).items():
        wanted = getattr(job.overlap, name)
        decided[name] = f"overlap.{name}=false" if wanted is False else obstacle or ON
    return decided


def overlap_problems(job: Job, topology: Topology, *, backend: str, device: str) -> Iterator[Problem]:
    """Overlap that was asked for and cannot be had; arguments as for :func:`obstacles`."""
    found = obstacles(job, topology, backend=backend, device=device)
    for item in dataclasses.fields(job.overlap):
        if getattr(job.overlap, item.name) and found[item.name]:
            message = f"{NAMES[item.name]} cannot run beside computation: {found[item.name]}"
            yield Problem(f"overlap.{item.name}", message, "leave it null: it is on wherever it can be")


def overlap_line(decided: dict[str, str]) -> str:
    """One line: what is on, and what is off for a reason that a person may want to change."""
    on = [NAMES[name] for name, word in decided.items() if word == ON]
    off = [
        f"{NAMES[name]} off: {word}"
        for name, word in decided.items()
        if word != ON and not word.startswith(_NOTHING_TO_DO)
    ]
    return "; ".join([", ".join(on), *off] if on else off)
