"""Variables of the environment that Megatron asks for, by the words that its parser is given.

From ``validate_args`` of megatron-core 0.19.
"""

from __future__ import annotations

from collections.abc import Sequence

# How many queues to a GPU there are.
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
# Keeps Transformer Engine from moving weights to the CPU beside the activations.
OFFLOAD = "NVTE_CPU_OFFLOAD_V1"
_FSDP = ("--use-megatron-fsdp", "--use-torch-fsdp2")
_SIZES = ("--tensor-model-parallel-size", "--context-parallel-size")


def uses_fsdp(megatron_args: Sequence[str]) -> bool:
    """Whether torch's or Megatron's FSDP shards, whose transfers one queue would keep behind computation."""
    return any(flag in megatron_args for flag in _FSDP)


def needs_one_queue(megatron_args: Sequence[str]) -> bool:
    """Whether transfers have to start in the order in which they were asked for: before Blackwell, one queue.

    The overlap of tensor and context parallelism relies on it; beside FSDP Megatron gives it up.
    """
    values = dict(zip(megatron_args, [*megatron_args[1:], ""], strict=False))
    return not uses_fsdp(megatron_args) and any(values.get(flag, "1") != "1" for flag in _SIZES)


def moves_activations(megatron_args: Sequence[str]) -> bool:
    """Whether :data:`OFFLOAD` has to be 1."""
    return "--fine-grained-activation-offloading" in megatron_args
