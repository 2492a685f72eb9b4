"""What makes a run the run it is: everything that decides its result, and nothing else.

Where it runs, how loudly, and where it stops for now do not count, so a repeated command finds its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megaplug.job.checks_model import uses_yarn
from megaplug.job.experts import layer_freq
from megaplug.job.schema import AttentionConfig, Job, MoeConfig

if TYPE_CHECKING:
    from megaplug.job.derive import Derived
    from megaplug.job.facts import DataFacts
    from megaplug.job.load import Source
    from megaplug.topology import Topology

# Given in another way (iterations, tokens, epochs), or of no influence (where to stop for now).
_TRAIN_LEFT_OUT = (
    "iters", "tokens", "epochs", "stop_at", "early_stop_patience", "early_stop_min_delta",
)  # fmt: skip

# Arguments of Megatron's that only say how loudly it speaks or how it stores.
_SILENT_MEGATRON_PREFIXES = ("log_", "tensorboard_", "wandb_", "profile", "timing_", "ckpt_")

# Sizes and kinds on which the shapes or the meaning of weights depend.
_MODEL_WEIGHT_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "norm_epsilon", "qk_layernorm", "swiglu", "add_bias_linear", "add_qkv_bias",
    "position_embedding_type", "rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor",
    "untie_embeddings_and_output_weights",
)  # fmt: skip
_YARN_KEYS = (
    "rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_correction_range_round_to_int", "mscale", "mscale_all_dim",
)  # fmt: skip
_LATENT_KEYS = (
    "multi_latent_attention", "rope_type", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim",
)  # fmt: skip
_MOE_WEIGHT_KEYS = (
    "num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size", "moe_layer_freq",
)  # fmt: skip
_NEWER_MOE_KEYS = (
    "experts", "experts_params", "moe_z_loss_coeff", "moe_flex_dispatcher_backend", "moe_token_drop_policy",
    "moe_pad_expert_input_to_capacity", "moe_shared_expert_gate", "moe_shared_expert_overlap", "layers",
)  # fmt: skip
# Left out of a fingerprint where they are as here, which is what older checkpoints were written with.
_MOE_KEYS_WITH_DEFAULT = {
    "moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None, "moe_router_group_topk": None, "moe_router_enable_expert_bias": False,
    "moe_shared_expert_gate": False,
}  # fmt: skip


def identity(
    job: Job, topology: Topology, derived: Derived, facts: DataFacts, source: Source | None = None
) -> dict[str, Any]:
    """All that decides a run's result, as plain values.

    Args:
        job: The job.
        topology: Its resolved rank grid.
        derived: The number of iterations stands for iters, tokens or epochs: it sets the learning-rate
            horizon and the shuffling.
        facts: The data's fingerprint stands for its path.
        source: What the run starts from, if not from scratch.
    """
    train = {key: value for key, value in dataclasses.asdict(job.train).items() if key not in _TRAIN_LEFT_OUT}
    if train["loss_chunk_tokens"] is None:
        # As it was before there was this key: older runs are still found.
        del train["loss_chunk_tokens"]
    model = {key: value for key, value in dataclasses.asdict(job.model).items() if key != "name"}
    megatron = {k: v for k, v in job.megatron.items() if not k.startswith(_SILENT_MEGATRON_PREFIXES)}
    return {
        "model": model | {"vocab_size": derived.vocab_size},
        "topology": dataclasses.asdict(topology) | {"zero": job.topology.zero, "fsdp": job.topology.fsdp},
        "attention": _attention(job.attention),
        "moe": _experts(job.moe) if job.moe.num_experts else None,
        # Covers content, tokenizer and split.
        "data": facts.fingerprint,
        "train": train | {"iters": derived.iters},
        "optimizer": dataclasses.asdict(job.optimizer),
        "lr": dataclasses.asdict(job.lr),
        "precision": dataclasses.asdict(job.precision),
        "backend": derived.backend,
        "kernels": {"apex": derived.apex, "te": derived.te},
        "overlap": dataclasses.asdict(job.overlap),
        "cuda_graph": dataclasses.asdict(job.cuda_graph),
        "megatron": megatron,
        "load": _loaded(job, source),
    }


def _experts(config: MoeConfig) -> dict[str, Any]:
    """Without newer keys that are as they are by default: so a run keeps its folder when there are more."""
    default = dataclasses.asdict(MoeConfig())
    values = dataclasses.asdict(config)
    return {k: v for k, v in values.items() if k not in _NEWER_MOE_KEYS or v != default[k]}


def _attention(config: AttentionConfig) -> dict[str, Any]:
    """Without what is as it is by default: so a run keeps its folder when there are more keys."""
    default = dataclasses.asdict(AttentionConfig())
    values = dataclasses.asdict(config)
    return {k: v for k, v in values.items() if k in ("name", "params") or v != default[k]}


def _loaded(job: Job, source: Source | None) -> dict[str, Any] | None:
    if source is None:
        return None
    # The run that wrote it stands for its path, so that a run that was moved is still the same.
    origin = source.frozen.digest if source.frozen is not None else str(source.checkpoint.path.resolve())
    return {"from": origin, "iteration": source.checkpoint.iteration, "state": job.load_state}


def digest(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits for an :func:`identity`, whatever the order of its keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def model_fingerprint(job: Job, derived: Derived, facts: DataFacts) -> dict[str, Any]:
    """The model as its weights know it, under the configuration's key names.

    Two jobs with equal fingerprints can exchange weights under any topology.
    """
    values = {f"model.{key}": getattr(job.model, key) for key in _MODEL_WEIGHT_KEYS}
    values["model.kv_channels"] = (
        job.model.kv_channels or job.model.hidden_size // job.model.num_attention_heads
    )
    values["model.vocab_size"] = derived.vocab_size
    if not job.model.use_rope_scaling:
        del values["model.rope_scaling_factor"]
    keys = [
        *(("squared_relu",) if job.model.squared_relu else ()),
        *(
            ()
            if job.model.rotary_seq_len_interpolation_factor is None
            else ("rotary_seq_len_interpolation_factor",)
        ),
        *(_YARN_KEYS if uses_yarn(job) else ()),
        *(_LATENT_KEYS if job.model.multi_latent_attention else ()),
    ]
    values |= {f"model.{key}": getattr(job.model, key) for key in keys}
    if job.model.position_embedding_type == "learned_absolute":
        values["model.seq_length"] = job.model.seq_length
    if job.moe.num_experts:
        values |= {f"moe.{key}": getattr(job.moe, key) for key in _MOE_WEIGHT_KEYS}
        routing = {key: getattr(job.moe, key) for key in _MOE_KEYS_WITH_DEFAULT}
        values |= {f"moe.{k}": v for k, v in routing.items() if v != _MOE_KEYS_WITH_DEFAULT[k]}
        values["moe.moe_layer_freq"] = layer_freq(job.moe, job.model.num_layers)
        values["moe.moe_ffn_hidden_size"] = job.moe.moe_ffn_hidden_size or job.model.ffn_hidden_size
    else:
        values["moe.num_experts"] = None
    if job.attention.sub_layer_norm:
        values["attention.sub_layer_norm"] = True
    values["tokenizer.type"] = job.tokenizer.type
    values["the vocabulary of the tokenizer"] = facts.tokenizer_fingerprint
    return values


def differing_keys(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every key in which two fingerprints differ, with both values."""
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            yield key, theirs.get(key), ours.get(key)
