"""Which experts the layers of a job have."""

from __future__ import annotations

from megaplug.job.schema import Job, MoeConfig
from megaplug.layers.registry import ExpertsChoice


def experts_choice(job: Job, backend: str) -> ExpertsChoice:
    """What the job's keys say of its experts, given ``native`` or ``te``; they need not have been checked."""
    config = job.moe
    if config.experts != "auto":
        return ExpertsChoice(config.experts, config.experts_params)
    return ExpertsChoice(None if backend == "te" else ExpertsChoice().name, config.experts_params)


def layer_freq(config: MoeConfig, num_layers: int) -> str | None:
    """Which layers are mixtures of experts, as Megatron's ``--moe-layer-freq`` has it; None for all."""
    if config.layers is None:
        return config.moe_layer_freq
    named = set(config.layers)
    flags = ("1" if number in named else "0" for number in range(1, num_layers + 1))
    return f"[{','.join(flags)}]"


def are_grouped(job: Job, backend: str) -> bool:
    """Whether all experts of a rank are one product; Megatron's argument counts for Transformer Engine's."""
    name = experts_choice(job, backend).name
    return bool(job.megatron.get("moe_grouped_gemm")) if name is None else name == "grouped"
