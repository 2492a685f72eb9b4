"""Rules that tie keys of the model together: how positions are encoded, latent attention, routing.

Megatron leaves most of these out without a word: a key that would do nothing is a mistake here.
"""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job, ModelConfig

_YARN_DEFAULTS = {
    key: getattr(ModelConfig(), key)
    for key in (
        "rotary_scaling_factor",
        "yarn_original_max_position_embeddings",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "yarn_correction_range_round_to_int",
        "mscale",
        "mscale_all_dim",
    )
}
# Megatron's command line has no argument for these under latent attention.
_FIXED_IN_LATENT_YARN = (
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)
_LATENT_DEFAULTS = {
    key: getattr(ModelConfig(), key)
    for key in (
        "rope_type",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    )
}


def model_problems(job: Job) -> list[Problem]:
    """Everything that is wrong with activation, positions, latent attention and routing."""
    return [*_activation(job.model), *_rope(job.model), *_yarn(job), *_latent(job), *_routing(job)]


def uses_yarn(job: Job) -> bool:
    """Whether RoPE is scaled as YaRN does."""
    model = job.model
    return (model.rope_type if model.multi_latent_attention else model.position_embedding_type) == "yarn"


def _activation(model: ModelConfig) -> Iterator[Problem]:
    if model.squared_relu and model.swiglu:
        yield Problem(
            "model.squared_relu", "is of an MLP without a gate, but swiglu is true", "set model.swiglu=false"
        )


def _rope(model: ModelConfig) -> Iterator[Problem]:
    scaled = {
        "use_rope_scaling": model.use_rope_scaling,
        "rotary_seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor is not None,
    }
    wanted = [key for key, is_wanted in scaled.items() if is_wanted]
    if len(wanted) > 1:
        yield Problem(f"model.{wanted[1]}", f"scales RoPE beside {wanted[0]}", "keep one kind of scaling")
    elif wanted and model.multi_latent_attention:
        message = "does nothing under multi_latent_attention"
        yield Problem(f"model.{wanted[0]}", message, "use model.rope_type=yarn, or leave it out")
    elif wanted and model.position_embedding_type != "rope":
        message = f"does nothing where position_embedding_type is {model.position_embedding_type}"
        yield Problem(
            f"model.{wanted[0]}", message, "use model.position_embedding_type=rope, or leave it out"
        )


def _yarn(job: Job) -> Iterator[Problem]:
    model = job.model
    if not uses_yarn(job):
        where = "rope_type" if model.multi_latent_attention else "position_embedding_type"
        for key, default in _YARN_DEFAULTS.items():
            if getattr(model, key) != default:
                yield Problem(
                    f"model.{key}", "does nothing without YaRN", f"use model.{where}=yarn, or leave it out"
                )
        return
    if model.rotary_scaling_factor <= 1:
        message = f"YaRN by {model.rotary_scaling_factor:g} scales nothing"
        yield Problem("model.rotary_scaling_factor", message, "use more than 1, or rope in place of yarn")
    if model.yarn_beta_fast <= model.yarn_beta_slow:
        message = f"{model.yarn_beta_fast:g} is not above yarn_beta_slow = {model.yarn_beta_slow:g}"
        yield Problem("model.yarn_beta_fast", message, "32 and 1 are usual")
    if model.rotary_percent != 1:
        message = f"Megatron's YaRN rotates whole heads, but {model.rotary_percent:g} is given"
        yield Problem("model.rotary_percent", message, "use 1.0")
    if model.multi_latent_attention:
        for key in _FIXED_IN_LATENT_YARN:
            if (value := getattr(model, key)) != _YARN_DEFAULTS[key]:
                message = (
                    f"under multi_latent_attention Megatron has {_YARN_DEFAULTS[key]} built in, not {value}"
                )
                yield Problem(f"model.{key}", message, "leave it out")


def _latent(job: Job) -> Iterator[Problem]:
    model = job.model
    if not model.multi_latent_attention:
        for key, default in _LATENT_DEFAULTS.items():
            if getattr(model, key) != default:
                message = "does nothing without latent attention"
                yield Problem(
                    f"model.{key}", message, "set model.multi_latent_attention=true, or leave it out"
                )
        if "mla_up_proj" in (job.train.recompute_modules or ()):
            message = "mla_up_proj is there in latent attention only"
            yield Problem("train.recompute_modules", message, "leave it out")
        return
    if model.rope_type not in ("rope", "yarn"):
        message = f"latent attention rotates by rope or yarn, but rope_type is {model.rope_type}"
        yield Problem("model.rope_type", message, "set model.rope_type=rope")
    if model.position_embedding_type != "rope":
        message = f"latent attention brings RoPE, but this is {model.position_embedding_type}"
        yield Problem("model.position_embedding_type", message, "use rope; model.rope_type says which")
    if model.num_query_groups != model.num_attention_heads:
        message = f"latent attention has no groups of heads, but {model.num_query_groups} are given"
        yield Problem("model.num_query_groups", message, f"use as many as heads: {model.num_attention_heads}")
    if model.kv_channels is not None:
        message = "latent attention has heads of qk_head_dim + qk_pos_emb_head_dim and v_head_dim"
        yield Problem("model.kv_channels", message, "use null")
    if model.add_qkv_bias:
        yield Problem("model.add_qkv_bias", "latent attention has no biases there", "use false")
    if model.qk_pos_emb_head_dim % 2:
        message = f"channels are rotated in pairs, but {model.qk_pos_emb_head_dim} are given"
        yield Problem("model.qk_pos_emb_head_dim", message, "use an even number")
    if job.backend == "te" and model.q_lora_rank is None and model.qk_layernorm:
        message = (
            "without a latent of the queries Megatron's Transformer Engine layers norm their input once more"
        )
        yield Problem("backend", message, "use backend=native, or model.q_lora_rank")


def _routing(job: Job) -> Iterator[Problem]:
    moe = job.moe
    if not moe.num_experts:
        return
    if moe.moe_router_enable_expert_bias and moe.moe_router_score_function == "softmax":
        message = "only goes with the score functions sigmoid and sqrtsoftplus"
        yield Problem(
            "moe.moe_router_enable_expert_bias", message, "set moe.moe_router_score_function=sigmoid"
        )
    yield from _balancing(job)
    groups, chosen = moe.moe_router_num_groups, moe.moe_router_group_topk
    if (groups is None) != (chosen is None):
        missing = "moe_router_num_groups" if groups is None else "moe_router_group_topk"
        message = "group-limited routing needs the number of groups and how many of them a token may use"
        accepts = chosen is None
        if accepts:
            message += "; Megatron accepts the number alone and routes without groups"
        yield Problem(f"moe.{missing}", message, "give both or neither", megatron_accepts=accepts)
    elif groups is not None and chosen is not None and groups > 0 and chosen > 0:
        if moe.num_experts % groups:
            message = f"{moe.num_experts} experts cannot be divided into {groups} groups"
            yield Problem("moe.moe_router_num_groups", message, f"use a divisor of {moe.num_experts}")
        elif chosen > groups:
            yield Problem("moe.moe_router_group_topk", f"{chosen} of {groups} groups cannot be chosen")
        elif moe.moe_router_topk % chosen or moe.moe_router_topk // chosen > moe.num_experts // groups:
            # Megatron scores a group by its best topk // group_topk experts.
            message = f"{moe.moe_router_topk} experts cannot come evenly from {chosen} groups of "
            hint = f"use a divisor of moe_router_topk = {moe.moe_router_topk}"
            yield Problem("moe.moe_router_group_topk", f"{message}{moe.num_experts // groups}", hint)


def _balancing(job: Job) -> Iterator[Problem]:
    """What Megatron's router asserts in its first forward pass (``transformer/moe/router.py``)."""
    moe = job.moe
    kind = moe.moe_router_load_balancing_type
    if kind == "sinkhorn" and moe.moe_aux_loss_coeff != 0:
        message = f"is {moe.moe_aux_loss_coeff:g}, but sinkhorn balances without a loss"
        yield Problem("moe.moe_aux_loss_coeff", message, "set moe.moe_aux_loss_coeff=0")
    if kind == "quantile_balancing" and moe.moe_router_num_groups is not None:
        message = "quantile_balancing does not know groups of experts"
        yield Problem("moe.moe_router_load_balancing_type", message, "leave out moe.moe_router_num_groups")
    if kind == "quantile_balancing" and moe.moe_router_topk == moe.num_experts:
        message = (
            f"{moe.moe_router_topk} of {moe.num_experts} are all experts: quantile_balancing needs another"
        )
        yield Problem("moe.moe_router_topk", message, f"use less than {moe.num_experts}")
    if moe.moe_expert_capacity_factor is not None and kind in ("sinkhorn", "quantile_balancing"):
        message = f"Megatron drops tokens with other ways of balancing than {kind} only"
        yield Problem("moe.moe_expert_capacity_factor", message, "leave it out")
