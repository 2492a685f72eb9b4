"""What the chosen attentions do not know, cannot do, or cannot do together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.job.attention import attention_layers, name_key, params_key
from megaplug.job.packages import resolve_backend
from megaplug.job.schema import Job, ModelConfig
from megaplug.layers import registry
from megaplug.layers.registry import AttentionLayers

# What asks for the largest score of every head.
_LARGEST_SCORES = ("qk_clip", "log_max_attention_logit")
# What says how ranks exchange a sequence.
_COMMUNICATION = ("cp_comm_type", "hierarchical_context_parallel_sizes")
# What Megatron builds layers of another kind for.
_OTHER_LAYERS = (
    "experimental_attention_variant", "use_kitchen_attention", "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json", "hybrid_layer_pattern", "hybrid_override_pattern",
    "is_hybrid_model",
)  # fmt: skip


def attention_problems(job: Job, device: str | None = None, *, sizes_hold: bool = True) -> list[Problem]:
    """What is wrong with the attention of every layer.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda`` where it is known.
        sizes_hold: Whether sizes are sizes; only then it is asked what a plugin can do.
    """
    if problems := list(_pattern(job)):
        return problems
    layers = attention_layers(job.attention)
    problems = []
    for name in layers.names:
        try:
            plugin = registry.lookup(registry.CORE_ATTENTION, name)
        except UserError as error:
            problems.append(Problem(name_key(job.attention), error.message, error.hint))
            continue
        key = params_key(job.attention, name)
        params = layers.params_of(name)
        wrong = registry.validate_params(plugin, params, key)
        problems += wrong or _needs(job, plugin, params, key, device)
        if sizes_hold:
            problems += _limits(job, plugin, device)
    if "flash" in layers.names and not job.precision.attention_softmax_in_fp32:
        key, message = (
            "precision.attention_softmax_in_fp32",
            "flash attention always computes its softmax in fp32",
        )
        problems.append(Problem(key, message, "leave it true, or use attention=local"))
    problems += [*_cuda_kernel(job, layers, device), *_other_layers(job), *_sub_norm(job, device)]
    problems += _prediction_layers(job, layers, device)
    # Layouts are parameters: of such as are wrong nothing can be asked.
    return problems or list(_token_layouts(job, layers))


def _pattern(job: Job) -> Iterator[Problem]:
    """What is wrong with the unit of names, whatever the plugins are."""
    config = job.attention
    key, of_others = "attention.pattern", "attention.pattern_params"
    if config.pattern is None:
        if config.pattern_params:
            message = "is for the layers of attention.pattern, which is null"
            yield Problem(of_others, message, "attention.params is for all layers where there is no pattern")
        return
    if config.name not in config.pattern:
        named = " and ".join(dict.fromkeys(config.pattern)) or "nothing"
        choice = config.pattern[0] if config.pattern else "ring"
        hint = f"begin with attention={choice}: the group's keys are those of one of the pattern's names"
        yield Problem(key, f"names {named}, and not attention.name={config.name}", hint)
    if len(config.pattern) > job.model.num_layers:
        message = f"names {len(config.pattern)} layers, and the model has {job.model.num_layers}"
        yield Problem(key, message, "it is a unit that is repeated: name each layer once at most")
    for name, params in config.pattern_params.items():
        if name == config.name:
            yield Problem(f"{of_others}.{name}", "is the attention of attention.name", "use attention.params")
        elif name not in config.pattern:
            named = ", ".join(dict.fromkeys(config.pattern))
            yield Problem(f"{of_others}.{name}", "no layer has that attention", f"the pattern has: {named}")
        elif not isinstance(params, dict):
            hint = f"such as {of_others}.{name}.kernel=auto"
            yield Problem(f"{of_others}.{name}", f"holds parameters by name, not {params!r}", hint)


def _token_layouts(job: Job, layers: AttentionLayers) -> Iterator[Problem]:
    """All layers, batches and rotary angles have one."""
    layouts = layers.token_layouts(job.topology.cp)
    wanted = layouts.get(job.attention.name, "zigzag")
    for name, layout in layouts.items():
        if layout != wanted:
            message = (
                f"the layers of {name} have {layout} tokens, and those of {job.attention.name} {wanted} ones"
            )
            key = f"{params_key(job.attention, name)}.token_layout"
            takes = "token_layout" in registry.lookup(registry.CORE_ATTENTION, name).parameters
            other = f"{params_key(job.attention, job.attention.name)}.token_layout={layout}"
            yield Problem(key, message, f"use {key}={wanted}" if takes else f"use {other}")


def _cuda_kernel(job: Job, layers: AttentionLayers, device: str | None) -> Iterator[Problem]:
    """Fused kernels of torch's that would refuse on a GPU (``can_use_*`` of torch's ``sdp_utils.cpp``)."""
    if "flash" not in layers.names or device != "cuda":
        return
    kernel = layers.params_of("flash").get("cuda_kernel", "auto")
    key = f"{params_key(job.attention, 'flash')}.cuda_kernel"
    if kernel in ("flash", "cudnn") and job.precision.dtype == "fp32":
        yield Problem(key, f"torch's {kernel} kernel has no fp32", "use auto or efficient, or precision=bf16")
    if kernel == "cudnn" and job.train.deterministic_mode:
        yield Problem(key, "cuDNN's attention is not deterministic", "use auto, or flash with precision=bf16")


def _other_layers(job: Job) -> Iterator[Problem]:
    """The layer builder would refuse them, or build its own without a word."""
    for name in _OTHER_LAYERS:
        if job.megatron.get(name):
            yield Problem(f"megatron.{name}", "is of layers that megaplug does not build", "leave it out")


def _sub_norm(job: Job, device: str | None) -> Iterator[Problem]:
    """What a norm inside the attention, and its initial weights, do not go with."""
    gamma, key = job.attention.gamma_init, "attention.gamma_init"
    backend = job.backend if device is None else resolve_backend(job.backend, device, job.kernels.te)
    if gamma is not None and gamma <= 0:
        yield Problem(key, f"{gamma} is no gain", "give a number above 0, such as 1")
    if gamma is not None and job.megatron.get("attention_output_gate"):
        yield Problem(key, "knows no gate (megatron.attention_output_gate)", "leave one of them out")
    wanted = {"sub_layer_norm": job.attention.sub_layer_norm, "gamma_init": gamma is not None}
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        if job.model.multi_latent_attention:
            yield Problem(f"attention.{name}", "is not in latent attention", "leave it out")
        elif backend == "te":
            yield Problem(
                f"attention.{name}", "is not in the layers of Transformer Engine", "use backend=native"
            )


def _prediction_layers(job: Job, layers: AttentionLayers, device: str | None) -> Iterator[Problem]:
    """Megatron builds layers of multi-token prediction itself: plain ones, of the backend."""
    if not job.megatron.get("mtp_num_layers"):
        return
    if job.attention.sub_layer_norm:
        message = "is not in the layers of multi-token prediction (megatron.mtp_num_layers)"
        yield Problem("attention.sub_layer_norm", message, "leave one of them out")
    backend = job.backend if device is None else resolve_backend(job.backend, device, job.kernels.te)
    if backend == "native" and job.topology.cp > 1 and layers.names == ("te",):
        message = (
            f"native layers of multi-token prediction cannot split a sequence over {job.topology.cp} ranks"
        )
        yield Problem("topology.cp", message, "use backend=te, or leave megatron.mtp_num_layers out")


def _needs(
    job: Job, plugin: registry.Plugin, params: Mapping[str, Any], key: str, device: str | None
) -> list[Problem]:
    place, dtype = _device(job, device), job.precision.dtype
    return registry.needs_problems(plugin, params, device=place, dtype=dtype, key=key)


def _device(job: Job, device: str | None) -> str | None:
    """The one that is known, or that the job names."""
    return device if device is not None or job.device == "auto" else job.device


def _limits(job: Job, plugin: registry.Plugin, device: str | None) -> list[Problem]:
    asked = job.megatron
    return registry.limits_problems(
        plugin,
        key=name_key(job.attention),
        attention_dropout=job.model.attention_dropout,
        context_parallel_size=job.topology.cp,
        head_dim=_head_dim(job.model),
        dtype=job.precision.dtype,
        device=_device(job, device),
        attention_bias=job.model.position_embedding_type == "relative",
        latent_attention=job.model.multi_latent_attention,
        sliding_window=asked.get("window_size") is not None,
        softmax_type=asked.get("softmax_type") or "vanilla",
        largest_scores=next((name for name in _LARGEST_SCORES if asked.get(name)), ""),
        batch_invariant=bool(asked.get("batch_invariant_mode")),
        multi_token_prediction=bool(asked.get("mtp_num_layers")),
        communication=next((name for name in _COMMUNICATION if asked.get(name)), ""),
        mask="arbitrary" if asked.get("create_attention_mask_in_dataloader") else "causal",
    )


def _head_dim(model: ModelConfig) -> int:
    """Elements of the largest head."""
    if model.multi_latent_attention:
        return max(model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim)
    return model.kv_channels or model.hidden_size // model.num_attention_heads
