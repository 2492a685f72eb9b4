"""A random Hugging Face model and the native model with the same weights give the same logits.

Tolerance 1e-5 absolute in fp32, for logits of order one: both sum the same products in another order, and
each of two layers adds an error of about 1e-7 of its values. What each planted fault changes is far larger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face import Faults, differences
from hugging_face_weights import gate_then_up, group_by_group
from small_jobs import SmallJobs

TOLERANCE = 1e-5
# What a fault must move at least: a hundred tolerances.
NOTICED = 1e-3

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
WORDS = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
]


def up_then_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate_then_up(up, gate)


def all_queries_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Any) -> torch.Tensor:
    return torch.cat([q, k, v])


def heads_dealt_out_in_turn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Any) -> torch.Tensor:
    """Query head h reads group h % G in place of h // (H / G)."""
    groups = config.num_key_value_heads
    heads = q.unflatten(0, (-1, groups, q.size(0) // config.num_attention_heads))
    return group_by_group(heads.transpose(0, 1).flatten(0, 2), k, v, config)


@dataclass(frozen=True)
class Case:
    """An architecture of Hugging Face's, the job that is the same model, and what must not go unnoticed."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    faults: Faults = field(default_factory=dict)


def rope(kind: str = "default", theta: float = 10000.0, **scaling: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


EXPERTS = ["moe.num_experts=8", "moe.moe_ffn_hidden_size=48", "moe.moe_router_topk=2"]
# Values have smaller heads than queries and keys, of which a part is rotated. The epsilon is DeepSeek's:
# Hugging Face's norms of the latents have that one built in.
LATENT_SIZES = {
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
LATENT = [
    "model.multi_latent_attention=true",
    "model.norm_epsilon=1e-6",
    "model.num_query_groups=4",
    "model.qk_layernorm=true",
    "model.kv_lora_rank=24",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=8",
    "model.v_head_dim=20",
]
CASES = {
    "llama": Case(
        "Llama",
        faults={
            "up in the place of the gate": ({"fc1": up_then_gate}, {}),
            "queries, keys and values one after the other": ({"qkv": all_queries_first}, {}),
            "query heads dealt out to the groups in turn": ({"qkv": heads_dealt_out_in_turn}, {}),
            "even and odd channels rotated as pairs": ({}, {"rotary_interleaved": True}),
            "another base of the rotary frequencies": ({}, {"rotary_base": 20000}),
            "another epsilon in the norms": ({}, {"layernorm_epsilon": 1e-2}),
        },
    ),
    "llama_tied": Case(
        "Llama", {"tie_word_embeddings": True}, ["model.untie_embeddings_and_output_weights=false"]
    ),
    "llama_3.1": Case(
        "Llama",
        rope(
            "llama3",
            500000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        ["model.rotary_base=500000", "model.use_rope_scaling=true", "model.rope_scaling_factor=4"],
        {
            "not scaled": ({}, {"rope_scaling": False}),
            "scaled by another factor": ({}, {"rope_scaling_factor": 8.0}),
        },
    ),
    "llama_linear": Case(
        "Llama",
        rope("linear", factor=4.0),
        ["model.rotary_seq_len_interpolation_factor=4"],
        {"not scaled": ({}, {"seq_len_interpolation_factor": None})},
    ),
    "llama_yarn": Case(
        "Llama",
        rope(
            "yarn", 100000.0, factor=4.0, original_max_position_embeddings=512, beta_fast=24.0, beta_slow=2.0
        ),
        [
            "model.position_embedding_type=yarn",
            "model.rotary_base=100000",
            "model.rotary_scaling_factor=4",
            "model.yarn_original_max_position_embeddings=512",
            "model.yarn_beta_fast=24",
            "model.yarn_beta_slow=2",
        ],
        {
            "scaled by another factor": ({}, {"yarn_rotary_scaling_factor": 8.0}),
            "another original context": ({}, {"yarn_original_max_position_embeddings": 4096}),
            "another lower bound": ({}, {"yarn_beta_slow": 8.0}),
            "bounds that are not rounded": ({}, {"yarn_correction_range_round_to_int": False}),
            "queries and keys not scaled": ({}, {"yarn_mscale_all_dim": 1.0}),
        },
    ),
    "mistral": Case(
        "Mistral",
        {"sliding_window": None, "head_dim": 32, **rope(theta=1e6)},
        ["model.kv_channels=32", "model.rotary_base=1000000"],
    ),
    "qwen3": Case(
        "Qwen3",
        {"head_dim": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, **rope(theta=1e6)},
        [
            "model.kv_channels=32",
            "model.norm_epsilon=1e-6",
            "model.rotary_base=1000000",
            "model.qk_layernorm=true",
            "model.untie_embeddings_and_output_weights=false",
        ],
        {"queries and keys are not normed": ({}, {"qk_layernorm": False})},
    ),
    "mixtral": Case(
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "sliding_window": None},
        EXPERTS,
        {
            "softmax over all experts": ({}, {"moe_router_pre_softmax": True}),
            "another expert's up in the place of the gate": ({"fc1": up_then_gate}, {}),
        },
    ),
    "mixtral_one_after_the_other": Case(
        "Mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "sliding_window": None},
        [*EXPERTS, "moe.experts=sequential"],
    ),
    "qwen2_moe": Case(
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,
        },
        [
            "model.add_qkv_bias=true",
            *EXPERTS,
            "moe.moe_router_pre_softmax=true",
            "moe.moe_shared_expert_intermediate_size=80",
            "moe.moe_shared_expert_gate=true",
        ],
        {
            "the gate of the shared expert is open": ({}, {"moe_shared_expert_gate": False}),
            "softmax over the chosen experts only": ({}, {"moe_router_pre_softmax": False}),
        },
    ),
    "deepseek_v3": Case(
        "DeepseekV3",
        {
            **LATENT_SIZES,
            "q_lora_rank": 32,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            **rope(
                "yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
            ),
        },
        [
            *LATENT,
            "model.rope_type=yarn",
            "model.rotary_scaling_factor=40",
            "model.mscale=1.0",
            "model.mscale_all_dim=1.0",
            "model.q_lora_rank=32",
            "moe=deepseek_v3",
            "moe.num_experts=8",
            "moe.moe_ffn_hidden_size=48",
            "moe.moe_shared_expert_intermediate_size=48",
            "moe.moe_router_topk=4",
            "moe.moe_router_num_groups=4",
            "moe.moe_router_group_topk=2",
            "moe.moe_layer_freq='[0]+[1]'",
        ],
        {
            "not scaled": ({}, {"rotary_scaling_factor": 1.0}),
            "no scale in the softmax": ({}, {"mscale_all_dim": 0.0, "mscale": 0.0}),
            "latents are not normed": ({}, {"qk_layernorm": False}),
            "no groups of experts": ({}, {"moe_router_group_topk": None}),
            "softmax in the router": (
                {},
                {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
            ),
            "weights not scaled": ({}, {"moe_router_topk_scaling_factor": None}),
        },
    ),
    "deepseek_v2": Case(
        "DeepseekV2",
        {
            **LATENT_SIZES,
            "q_lora_rank": None,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        [
            *LATENT,
            "model.rope_type=rope",
            "moe=deepseek_v2_lite",
            "moe.num_experts=8",
            "moe.moe_ffn_hidden_size=48",
            "moe.moe_shared_expert_intermediate_size=96",
            "moe.moe_router_topk=2",
            "moe.moe_layer_freq='[0]+[1]'",
        ],
        {
            "latents are not normed": ({}, {"qk_layernorm": False}),
            "softmax over the chosen experts only": ({}, {"moe_router_pre_softmax": False}),
        },
    ),
    "qwen3_moe": Case(
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
        ["model.kv_channels=32", "model.qk_layernorm=true", *EXPERTS],
        {"one expert fewer": ({}, {"moe_router_topk": 1})},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_hugging_face(name: str, small_jobs: SmallJobs, tmp_path: Path) -> None:
    import transformers

    case = CASES[name]
    config = getattr(transformers, f"{case.architecture}Config")(**(SIZES | rope() | case.config))
    theirs = getattr(transformers, f"{case.architecture}ForCausalLM")(config)
    found = differences(theirs, [*WORDS, *case.words], small_jobs, tmp_path, case.faults)
    assert found.pop("") < TOLERANCE
    missed = {fault: difference for fault, difference in found.items() if difference < NOTICED}
    assert not missed
