"""What can wait in the CPU's memory, and what it takes: Megatron's rules, before a start."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job

# transformer_config.py of megatron-core 0.19, offload_modules.
OFFLOAD_MODULES = frozenset(
    {
        "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act",
        "fused_group_mlp",
    }
)  # fmt: skip
_OF_EXPERTS = frozenset({"expert_fc1", "moe_act", "fused_group_mlp"})


def offload_problems(job: Job, device: str | None, backend: str | None) -> list[Problem]:
    """Everything that is wrong with what is to be kept on the CPU.

    Args:
        job: The job.
        device: ``cpu`` or ``cuda``; None where it is not known yet.
        backend: ``native`` or ``te``; None where it is not known yet.
    """
    return [*_optimizer(job, device, backend), *_layers(job, backend), *_modules(job, backend)]


def _optimizer(job: Job, device: str | None, backend: str | None) -> Iterator[Problem]:
    optimizer = job.optimizer
    if not 0 <= optimizer.optimizer_offload_fraction <= 1:
        yield Problem(
            "optimizer.optimizer_offload_fraction",
            f"must be between 0 and 1, but is {optimizer.optimizer_offload_fraction}",
        )
    if not optimizer.optimizer_cpu_offload:
        if optimizer.overlap_cpu_optimizer_d2h_h2d:
            message = "nothing is moved to the CPU that could be overlapped"
            yield Problem(
                "optimizer.overlap_cpu_optimizer_d2h_h2d", message, "add optimizer.optimizer_cpu_offload=true"
            )
        if optimizer.use_precision_aware_optimizer and (device == "cpu" or backend == "native"):
            message = "is Transformer Engine's Adam, which is not used on this device and backend"
            yield Problem(
                "optimizer.use_precision_aware_optimizer", message, "use backend=te on a GPU, or leave it out"
            )
        return
    if device == "cpu":
        message = "needs a GPU to offload from; the device is cpu, where the state is on the CPU already"
        yield Problem("optimizer.optimizer_cpu_offload", message, "leave it out")
    if optimizer.use_precision_aware_optimizer is False:
        message = "optimizer_cpu_offload goes the precision-aware optimizer's way through Megatron"
        yield Problem("optimizer.use_precision_aware_optimizer", message, "set it to true or null")
    if job.precision.fp8_param_gather and job.precision.fp8_recipe != "delayed":
        message = f"with FP8 weights, offload knows the recipe delayed only, not {job.precision.fp8_recipe}"
        yield Problem("precision.fp8_recipe", message, "use delayed, or leave out precision.fp8_param_gather")


def _layers(job: Job, backend: str | None) -> Iterator[Problem]:
    key, layers = "train.cpu_offloading_num_layers", job.train.cpu_offloading_num_layers
    if not layers:
        return
    if backend == "native":
        yield Problem(key, "Transformer Engine moves the activations; the backend is native", _need_te())
    if not 0 <= layers < job.model.num_layers:
        message = f"{layers} of {job.model.num_layers} layers"
        yield Problem(key, message, f"at most {job.model.num_layers - 1}: the last layer is needed at once")
    if job.topology.pp > 1:
        message = f"does not go with pipeline parallelism; {job.topology.pp} stages were asked"
        yield Problem(key, message, "set topology.pp=1, or train.fine_grained_activation_offloading=true")
    if job.train.recompute_granularity is not None or job.train.recompute_modules is not None:
        yield Problem(
            key, "what is recomputed is not kept, so there is nothing to move", "keep one of the two"
        )
    if job.train.fine_grained_activation_offloading:
        message = "moves whole layers, and fine_grained_activation_offloading parts of them"
        yield Problem(key, message, "keep one of the two")


def _modules(job: Job, backend: str | None) -> Iterator[Problem]:
    modules = job.train.offload_modules or []
    if not job.train.fine_grained_activation_offloading:
        if modules:
            message = "names what is moved to the CPU, but nothing is"
            yield Problem(
                "train.offload_modules", message, "add train.fine_grained_activation_offloading=true"
            )
        return
    key = "train.fine_grained_activation_offloading"
    if backend == "native":
        yield Problem(key, "is only there with Transformer Engine; the backend is native", _need_te())
    if not modules:
        yield Problem("train.offload_modules", "is not given", "for example [attn_norm,core_attn,attn_proj]")
    unknown = sorted(set(modules) - OFFLOAD_MODULES)
    if unknown:
        known = ", ".join(sorted(OFFLOAD_MODULES))
        yield Problem("train.offload_modules", f"there is no {', '.join(unknown)}", f"known: {known}")
    if "attn_proj" in modules and "core_attn" not in modules:
        message = "attn_proj reads what core_attn keeps, so it cannot go alone"
        yield Problem("train.offload_modules", message, "add core_attn")
    experts = sorted(set(modules) & _OF_EXPERTS)
    if experts and not job.moe.num_experts:
        message = f"{', '.join(experts)} is a part of experts, and the model has none"
        yield Problem("train.offload_modules", message, "leave it out")
    if experts and "moe" in (job.train.recompute_modules or ()):
        message = f"{', '.join(experts)} lies in the layer that recompute_modules=[moe] computes again"
        yield Problem("train.offload_modules", message, "keep one of the two")


def _need_te() -> str:
    return "use backend=te on a GPU, or train.recompute_modules"
