"""What is wrong with the experts that a job names, and with how tokens come to them."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem, UserError
from megaplug.job.experts import experts_choice
from megaplug.job.schema import Job
from megaplug.job.sharding import implementation
from megaplug.layers import registry
from megaplug.layers.registry.needs import is_found

_NAME, _PARAMS, _LAYERS = "moe.experts", "moe.experts_params", "moe.layers"
_SET_CAPACITY = "set moe.moe_expert_capacity_factor, or leave it out"
_USE_ALLTOALL = "use moe.moe_token_dispatcher_type=alltoall"
# What grouped experts are not written for, in Megatron's words.
_NOT_GROUPED = ("moe_latent_size", "use_te_activation_func", "delay_wgrad_compute")


def experts_problems(job: Job, device: str | None, backend: str | None) -> list[Problem]:
    """What is wrong with them.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda`` where it is known.
        backend: ``native`` or ``te`` where it is known.
    """
    if not job.moe.num_experts:
        return []
    routing = [*_layers(job), *_weights(job), *_capacity(job), *_shared(job, device), *_flex(job, device)]
    return [*routing, *_named(job, device, backend)]


def _named(job: Job, device: str | None, backend: str | None) -> list[Problem]:
    choice = experts_choice(job, backend or "native")
    if choice.name is None:
        if choice.params:
            message = "Transformer Engine's experts have no parameters"
            return [Problem(_PARAMS, message, "leave it out, or use backend=native")]
        return []
    try:
        plugin = registry.lookup(registry.EXPERTS, choice.name)
    except UserError as error:
        return [Problem(_NAME, error.message, error.hint)]
    dtype = job.precision.dtype
    problems = registry.validate_params(plugin, choice.params, _PARAMS)
    problems = problems or registry.needs_problems(
        plugin, choice.params, device=device, dtype=dtype, key=_PARAMS
    )
    problems += registry.limits_problems(plugin, key=_NAME, dtype=dtype, device=device)
    if backend is None and job.moe.experts == "auto":
        # Transformer Engine's, perhaps, which can do more.
        return problems
    own = [*_not_grouped(job, choice.name), *_not_sequential(job, choice.name)]
    return [*problems, *_of_backend(choice.name, backend), *own]


def _layers(job: Job) -> Iterator[Problem]:
    named, count = job.moe.layers, job.model.num_layers
    if named is None:
        return
    if job.moe.moe_layer_freq is not None:
        yield Problem(_LAYERS, "names layers with experts, and so does moe.moe_layer_freq", "keep one")
    if wrong := [number for number in named if not 1 <= number <= count]:
        yield Problem(_LAYERS, f"there is no layer {wrong[0]}", f"layers are numbered from 1 to {count}")
    elif len(set(named)) < len(named):
        twice = next(number for number in named if named.count(number) > 1)
        yield Problem(_LAYERS, f"names layer {twice} twice", "name each once")
    elif not named:
        yield Problem(_LAYERS, "names no layer, and there are experts", "name some, or use moe=none")


def _weights(job: Job) -> Iterator[Problem]:
    """``SequentialMLP`` asserts it; another function would be computed without a word."""
    if job.megatron.get("moe_apply_probs_on_input") and job.moe.moe_router_topk != 1:
        message = f"a token's {job.moe.moe_router_topk} experts would be weighed before what they do to it"
        yield Problem(
            "megatron.moe_apply_probs_on_input", message, "use moe.moe_router_topk=1, or leave it out"
        )


def _capacity(job: Job) -> Iterator[Problem]:
    moe = job.moe
    if moe.moe_expert_capacity_factor is not None:
        return
    if moe.moe_pad_expert_input_to_capacity:
        message = "experts without a capacity have nothing to be filled up to"
        yield Problem("moe.moe_pad_expert_input_to_capacity", message, _SET_CAPACITY)
    if moe.moe_token_drop_policy == "position":
        message = "experts without a capacity drop no token"
        yield Problem("moe.moe_token_drop_policy", message, _SET_CAPACITY, megatron_accepts=True)


def _shared(job: Job, device: str | None) -> Iterator[Problem]:
    moe = job.moe
    asked = {name: getattr(moe, name) for name in ("moe_shared_expert_gate", "moe_shared_expert_overlap")}
    if not moe.moe_shared_expert_intermediate_size:
        for name in (name for name, is_asked in asked.items() if is_asked):
            message = "there is no expert that every token passes"
            hint = "set moe.moe_shared_expert_intermediate_size, or leave it out"
            yield Problem(f"moe.{name}", message, hint, megatron_accepts=True)
    elif moe.moe_shared_expert_overlap:
        key = "moe.moe_shared_expert_overlap"
        if moe.moe_token_dispatcher_type == "allgather":
            yield Problem(key, "does not go with the allgather dispatcher", _USE_ALLTOALL)
        if device == "cpu":
            yield Problem(key, "needs a stream of CUDA", "leave it out on a CPU")


def _flex(job: Job, device: str | None) -> Iterator[Problem]:
    """Megatron's flex dispatcher (``token_dispatcher.py``): kernels of another package, between GPUs."""
    if job.moe.moe_token_dispatcher_type != "flex":
        return
    key = "moe.moe_token_dispatcher_type"
    if device == "cpu":
        yield Problem(key, "flex sends between GPUs only", _USE_ALLTOALL)
    elif device == "cuda" and not is_found("deep_ep"):
        message = "flex needs DeepEP, which is not installed: there is no deep_ep"
        yield Problem(key, message, f"install it, or {_USE_ALLTOALL}", lacks="deep_ep")
    if job.precision.dtype == "fp32":
        yield Problem(key, "flex sends bf16 only", f"use precision=bf16, or {_USE_ALLTOALL}")
    if job.moe.moe_pad_expert_input_to_capacity and job.moe.moe_flex_dispatcher_backend == "deepep":
        message = "DeepEP does not fill experts up to their capacity"
        yield Problem("moe.moe_pad_expert_input_to_capacity", message, "leave it out, or use alltoall")


def _of_backend(name: str, backend: str | None) -> Iterator[Problem]:
    if backend == "te":
        message = f"the layers of Transformer Engine have their own experts, not {name}"
        yield Problem(_NAME, message, "use moe.experts=auto, or backend=native")


def _not_grouped(job: Job, name: str) -> Iterator[Problem]:
    if name != "grouped":
        return
    for argument in _NOT_GROUPED:
        if job.megatron.get(argument):
            yield Problem(f"megatron.{argument}", "is not in grouped experts", "use moe.experts=sequential")
    if implementation(job) == "megatron_fsdp":
        # It looks for an expert's number at the end of a weight's name when it saves.
        message = "Megatron-FSDP knows experts by their numbers, and grouped ones are one weight"
        yield Problem("topology.zero", message, "use topology.zero=1, or moe.experts=sequential")


def _not_sequential(job: Job, name: str) -> Iterator[Problem]:
    if name == "sequential" and job.model.add_bias_linear:
        # ``MLP.forward`` adds the second bias in place, into what a reduction over one rank has returned.
        message = "Megatron's own experts raise in their forward pass where they have biases"
        hint = "use moe.experts=grouped, or model.add_bias_linear=false"
        yield Problem(_NAME, message, hint, megatron_accepts=True)
