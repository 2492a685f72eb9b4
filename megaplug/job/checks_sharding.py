"""What ``topology.zero`` and ``topology.fsdp`` do not go with: Megatron's asserts, before a start."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from megaplug import topology as meshes
from megaplug.errors import Problem
from megaplug.job.schema import Job
from megaplug.job.sharding import LEVELS, implementation

_WITHOUT_DISTRIBUTED_OPTIMIZER = "use topology.zero=1, Megatron's distributed optimizer"


def sharding_problems(job: Job, device: str | None) -> list[Problem]:
    """Everything that the chosen sharding excludes.

    Args:
        job: The job.
        device: ``cpu`` or ``cuda``; None, where it is not known yet, asks only what no device can do.
    """
    zero, fsdp = job.topology.zero, job.topology.fsdp
    if zero not in LEVELS:
        return [Problem("topology.zero", f"cannot be {zero}", "0, 1, 2 or 3: how much is shared out")]
    if zero < 2 and fsdp == "torch":
        return [
            Problem(
                "topology.fsdp",
                f"torch's FSDP2 shares out gradients, but topology.zero is {zero}",
                "topology.zero=3 (or 2: gathered weights are kept until the backward pass)",
            )
        ]
    kind = implementation(job)
    if kind == "plain":
        return [*_needs_distributed_optimizer(job, "topology.zero=0")]
    if kind == "torch_fsdp2":
        return [*_torch_fsdp2(job), *_needs_distributed_optimizer(job, "topology.fsdp=torch")]
    return [*_megatron_fsdp(job, device)] if kind == "megatron_fsdp" else []


def _needs_distributed_optimizer(job: Job, what: str) -> Iterator[Problem]:
    wanted = {
        "optimizer.optimizer_cpu_offload": job.optimizer.optimizer_cpu_offload,
        "optimizer.use_precision_aware_optimizer": job.optimizer.use_precision_aware_optimizer,
    }
    for key, is_wanted in wanted.items():
        if is_wanted:
            yield Problem(
                key,
                f"needs the distributed optimizer, which {what} is without",
                _WITHOUT_DISTRIBUTED_OPTIMIZER,
            )
    instances = job.megatron.get("num_distributed_optimizer_instances") or 1
    if instances > 1:
        message = f"asks for {instances} instances of the distributed optimizer, and {what} has none"
        yield Problem("megatron.num_distributed_optimizer_instances", message, _WITHOUT_DISTRIBUTED_OPTIMIZER)
    if job.precision.fp8_param_gather:
        message = f"weights are gathered by the distributed optimizer or Megatron-FSDP, not with {what}"
        yield Problem("precision.fp8_param_gather", message, "leave it out, or use topology.zero=1")


def _torch_fsdp2(job: Job) -> Iterator[Problem]:
    """``validate_args`` of megatron-core 0.19, under ``use_torch_fsdp2``."""
    mesh = job.topology
    for key, size, what in (("pp", mesh.pp, "pipeline"), ("ep", mesh.ep, "expert")):
        if size > 1:
            message = f"torch's FSDP2 has no {what} parallelism; {size} ranks were asked"
            yield Problem(f"topology.{key}", message, f"set topology.{key}=1, or use topology.zero=1")
    if mesh.tp > 1:
        message = f"checkpoints of torch's FSDP2 know no tensor parallelism; {mesh.tp} ranks were asked"
        yield Problem("topology.tp", message, "set topology.tp=1, or use topology.zero=1")
    if job.moe.num_experts:
        message = "Megatron cannot save experts that torch's FSDP2 shares out"
        yield Problem("moe.num_experts", message, "use topology.zero=1")
    yield from _even_shards(job)
    if not job.model.untie_embeddings_and_output_weights:
        message = "torch's FSDP2 cannot share one weight between embedding and output layer"
        yield Problem(
            "model.untie_embeddings_and_output_weights", message, "set it to true, or use topology.zero=1"
        )
    if job.precision.fp16:
        yield Problem("precision.fp16", "Megatron scales no loss for torch's FSDP2", "use precision=bf16")
    if job.megatron.get("gradient_accumulation_fusion"):
        message = "torch's FSDP2 accumulates gradients itself"
        yield Problem("megatron.gradient_accumulation_fusion", message, "leave it out")


def _even_shards(job: Job) -> Iterator[Problem]:
    """Megatron saves the shards of FSDP2 as equal parts of the first dimension of every weight."""
    topology, _ = meshes.resolve(job.topology)
    ranks = topology.dp * topology.cp if topology is not None else 1
    if ranks <= 1:
        return
    model = job.model
    head = model.kv_channels or model.hidden_size // max(1, model.num_attention_heads)
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size * (2 if model.swiglu else 1),
        "model.num_query_groups": head * (model.num_attention_heads + 2 * model.num_query_groups),
        "model.make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
    }
    for key, size in sizes.items():
        if size % ranks:
            message = f"{size} rows cannot be cut into equal parts for the {ranks} ranks of FSDP2"
            yield Problem(key, message, "use topology.zero=1, or another topology.dp")
    if model.swiglu and ranks % 2:
        message = f"gate and up-projection lie in one weight, which {ranks} ranks cannot cut between them"
        yield Problem("topology.dp", message, "use an even number of ranks, or topology.zero=1")


def _megatron_fsdp(job: Job, device: str | None) -> Iterator[Problem]:
    if device == "cpu":
        yield Problem(
            "topology.fsdp",
            f"Megatron-FSDP (topology.zero={job.topology.zero}) needs a GPU, and the device is cpu",
            "topology.fsdp=torch runs on the CPU; topology.zero=1 shares out the optimizer's state",
        )
    elif device == "cuda" and importlib.util.find_spec("einops") is None:
        message = "Megatron-FSDP needs einops, which is not installed"
        hint = "pip install einops, or topology.fsdp=torch"
        yield Problem("topology.fsdp", message, hint, lacks="einops")
    interval = job.megatron.get("check_weight_hash_across_dp_replicas_interval")
    if job.topology.zero == 3 and interval is not None:
        message = "no rank holds whole weights under topology.zero=3"
        yield Problem("megatron.check_weight_hash_across_dp_replicas_interval", message, "leave it out")
    for argument in ("moe_single_grouped_weight", "moe_single_grouped_bias"):
        if job.megatron.get(argument):
            yield Problem(f"megatron.{argument}", "Megatron-FSDP does not know it", "use topology.zero=1")
