"""Which of our keys sets which of Megatron's arguments.

A key that bears the name of a Megatron argument needs no line here: the table knows it.
"""

from __future__ import annotations

import dataclasses

from megaplug.job.schema import Job

# The few keys that are shorter than, or differ from, Megatron's name for the same value.
ALIASES = {
    "topology.tp": "tensor_model_parallel_size",
    "topology.pp": "pipeline_model_parallel_size",
    "topology.vpp": "num_virtual_stages_per_pipeline_rank",
    "topology.cp": "context_parallel_size",
    "topology.ep": "expert_model_parallel_size",
    "topology.etp": "expert_tensor_parallel_size",
    "model.norm_epsilon": "layernorm_epsilon",
    "precision.fp8_format": "fp8",
    "train.iters": "train_iters",
}

# Keys that have no Megatron argument of their own: megaplug acts on them, or others follow from them.
OURS = frozenset(
    {
        "model.name", "model.vocab_size", "topology.dp", "topology.world_size", "topology.zero",
        "topology.fsdp", "topology.auto", "train.tokens", "train.epochs", "train.stop_at", "checkpoint.keep",
        "checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.async_save", "checkpoint.async_strategy",
        "logging.progress", "logging.tensorboard", "logging.level", "logging.mlflow_tracking_uri",
        "logging.mlflow_experiment", "logging.communication", "logging.peak_tflops",
        "train.early_stop_patience", "train.early_stop_min_delta",
        "train.loss_chunk_tokens", "moe.experts", "moe.experts_params", "moe.layers",
    }
)  # fmt: skip

# The sections whose keys bear the names of Megatron arguments, but for the two above.
SECTIONS = (
    "model", "topology", "moe", "train", "optimizer", "lr", "precision", "overlap", "cuda_graph",
    "checkpoint", "logging", "resilience",
)  # fmt: skip


def argument_keys() -> dict[str, str]:
    """Megatron's argument by the key of ours that sets it."""
    defaults = Job()
    return {
        ALIASES.get(f"{section}.{item.name}", item.name): f"{section}.{item.name}"
        for section in SECTIONS
        for item in dataclasses.fields(getattr(defaults, section))
        if f"{section}.{item.name}" not in OURS
    } | {"distributed_timeout_minutes": "launch.distributed_timeout_minutes"}
