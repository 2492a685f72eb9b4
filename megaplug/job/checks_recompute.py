"""What is computed again in the backward pass: which modules there are, and what they need."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.experts import are_grouped
from megaplug.job.recompute import granularity
from megaplug.job.schema import Job, TrainConfig

# transformer_config.py of megatron-core 0.19, recompute_modules.
MODULES = frozenset({"core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"})


def recompute_problems(job: Job, backend: str | None = None) -> list[Problem]:
    """Everything that is wrong with what is to be computed again.

    Args:
        job: As composed.
        backend: ``native`` or ``te`` where it is known.
    """
    train = job.train
    if granularity(train) == "full":
        return [*_full(job)]
    return [*_only_with_full(train), *_modules(job, backend or "native")]


def _full(job: Job) -> Iterator[Problem]:
    train, layers = job.train, job.train.recompute_num_layers
    if train.recompute_modules is not None:
        message = "goes with recompute_granularity=selective; full recomputes every module"
        yield Problem("train.recompute_modules", message, "keep one of the two")
    if layers is not None and layers > job.model.num_layers:
        yield Problem("train.recompute_num_layers", f"{layers} of {job.model.num_layers} layers", "use fewer")


def _only_with_full(train: TrainConfig) -> Iterator[Problem]:
    given = {"recompute_method": train.recompute_method, "recompute_num_layers": train.recompute_num_layers}
    for key, value in given.items():
        if value is not None:
            yield Problem(
                f"train.{key}", "only goes with recompute_granularity=full", "set it, or leave this out"
            )


def _modules(job: Job, backend: str) -> Iterator[Problem]:
    """Megatron's own rules for modules, and those that it computes as ever without a word."""
    key, modules = "train.recompute_modules", job.train.recompute_modules or []
    unknown = sorted(set(modules) - MODULES)
    if unknown:
        yield Problem(key, f"there is no {', '.join(unknown)}", f"known: {', '.join(sorted(MODULES))}")
    experts = bool(job.moe.num_experts)
    if "moe" in modules and not experts:
        yield Problem(key, "moe is a layer of experts, and the model has none", "use mlp, or moe=small")
    if "shared_experts" in modules and not (experts and job.moe.moe_shared_expert_intermediate_size):
        message = "the model has no shared experts"
        yield Problem(key, message, "leave it out, or set moe.moe_shared_expert_intermediate_size")
    if "moe_act" in modules and not (experts and are_grouped(job, backend)):
        yield Problem(key, "moe_act is the activation of grouped experts, and there are none", "leave it out")
    if "mlp" in modules and job.model.add_bias_linear:
        # CheckpointFunction returns the bias beside the output, and by that makes the parameter an output of
        # its own, whose backward pass calls it again, without end (tensor_parallel/random.py, 0.19.2).
        message = "Megatron cannot compute an MLP with biases again: its backward pass would never end"
        yield Problem(key, message, "leave mlp out, or set model.add_bias_linear=false; full recompute works")
