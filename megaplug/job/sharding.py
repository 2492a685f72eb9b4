"""What data-parallel ranks share out, and the Megatron arguments and checkpoint format that it takes.

``topology.zero`` counts as ZeRO does: 0 shares nothing, 1 the optimizer's state, 2 also gradients,
3 also weights.
"""

from __future__ import annotations

from typing import Any

from megaplug.job.schema import Job

LEVELS = (0, 1, 2, 3)
_STRATEGIES = {2: "optim_grads", 3: "optim_grads_params"}


def implementation(job: Job) -> str:
    """What shards: ``plain`` (nothing), ``distributed_optimizer``, ``megatron_fsdp`` or ``torch_fsdp2``."""
    if job.topology.zero in _STRATEGIES:
        return "megatron_fsdp" if job.topology.fsdp == "megatron" else "torch_fsdp2"
    return "distributed_optimizer" if job.topology.zero else "plain"


def described(job: Job) -> str:
    """What is shared out, in a few words."""
    if implementation(job) == "plain":
        return "nothing shared out (zero=0)"
    by = "Megatron-FSDP" if job.topology.fsdp == "megatron" else "torch FSDP2"
    return {1: "ZeRO-1"}.get(job.topology.zero, f"ZeRO-{job.topology.zero} by {by}")


def sharding_arguments(job: Job) -> dict[str, Any]:
    """Megatron's arguments for ``topology.zero`` and ``topology.fsdp``."""
    kind = implementation(job)
    if kind == "megatron_fsdp":
        return {
            "use_megatron_fsdp": True,
            "data_parallel_sharding_strategy": _STRATEGIES[job.topology.zero],
            # Megatron-FSDP keeps its state in the distributed optimizer, and in its own format.
            "use_distributed_optimizer": True,
            "ckpt_format": "fsdp_dtensor",
            # It accumulates gradients itself.
            "gradient_accumulation_fusion": False,
        }
    values: dict[str, Any] = {"ckpt_format": "torch_dist"}
    if kind == "torch_fsdp2":
        return values | {
            "use_torch_fsdp2": True,
            # ZeRO-2 keeps the gathered weights from forward to backward.
            "torch_fsdp2_reshard_after_forward": job.topology.zero == 3,
            "gradient_accumulation_fusion": False,
        }
    if kind == "distributed_optimizer":
        # Megatron's default format for its state resumes wrongly without Transformer Engine or Apex.
        values |= {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
    return values
