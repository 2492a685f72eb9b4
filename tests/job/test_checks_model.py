"""Keys of the model that would be left out in silence, or contradict each other, are named."""

from __future__ import annotations

import pytest
from job_factory import small_job

from megaplug.job.checks import check

LATENT = [
    "model.multi_latent_attention=true",
    "model.rope_type=rope",
    "model.num_query_groups=8",
    "model.qk_layernorm=true",
]
YARN = ["model.position_embedding_type=yarn", "model.rotary_scaling_factor=4"]
MOE = ["moe=small"]
GROUPS = ["moe.moe_router_num_groups=2", "moe.moe_router_group_topk=1"]


@pytest.mark.parametrize(
    "words",
    [
        LATENT,
        [*LATENT, "model.rope_type=yarn", "model.rotary_scaling_factor=40", "model.q_lora_rank=64"],
        [*LATENT, "train.recompute_granularity=selective", "train.recompute_modules=[mla_up_proj]"],
        [*YARN, "model.yarn_original_max_position_embeddings=64", "model.yarn_beta_fast=16"],
        ["model.use_rope_scaling=true"],
        ["model.swiglu=false", "model.squared_relu=true"],
        ["model.rotary_seq_len_interpolation_factor=2"],
        [*MOE, *GROUPS],
        [*MOE, "moe.moe_router_score_function=sigmoid", "moe.moe_router_enable_expert_bias=true"],
        [*MOE, "moe.moe_router_score_function=sigmoid", "moe.moe_router_topk=1"],
        ["attention=local", "megatron.window_size='(64,0)'"],
    ],
)
def test_what_fits_together_passes(words: list[str]) -> None:
    assert check(small_job(*words)) == []


@pytest.mark.parametrize(
    ("words", "key", "message"),
    [
        (
            ["model.use_rope_scaling=true", "model.rotary_seq_len_interpolation_factor=2"],
            "model.rotary_seq_len_interpolation_factor",
            "beside use_rope_scaling",
        ),
        ([*YARN, "model.use_rope_scaling=true"], "model.use_rope_scaling", "position_embedding_type is yarn"),
        ([*LATENT, "model.use_rope_scaling=true"], "model.use_rope_scaling", "under multi_latent_attention"),
        (["model.squared_relu=true"], "model.squared_relu", "without a gate"),
        (["model.rotary_scaling_factor=4"], "model.rotary_scaling_factor", "without YaRN"),
        (["model.yarn_beta_slow=2"], "model.yarn_beta_slow", "without YaRN"),
        (["model.position_embedding_type=yarn"], "model.rotary_scaling_factor", "scales nothing"),
        ([*YARN, "model.yarn_beta_slow=32"], "model.yarn_beta_fast", "not above yarn_beta_slow = 32"),
        ([*YARN, "model.rotary_percent=0.5"], "model.rotary_percent", "whole heads, but 0.5"),
        (
            [*LATENT, "model.rope_type=yarn", "model.rotary_scaling_factor=4", "model.yarn_beta_fast=16"],
            "model.yarn_beta_fast",
            "32.0 built in, not 16",
        ),
        (["model.kv_lora_rank=64"], "model.kv_lora_rank", "without latent attention"),
        (["model.rope_type=rope"], "model.rope_type", "without latent attention"),
        ([*LATENT, "model.rope_type=null"], "model.rope_type", "by rope or yarn"),
        (
            [*LATENT, "model.position_embedding_type=learned_absolute"],
            "model.position_embedding_type",
            "brings RoPE",
        ),
        (
            [*LATENT, "topology.tp=2", "topology.sequence_parallel=false"],
            "topology.sequence_parallel",
            "latent attention with tp 2 needs sequence parallelism; Megatron accepts it",
        ),
        ([*LATENT, "model.num_query_groups=2"], "model.num_query_groups", "no groups of heads, but 2"),
        ([*LATENT, "model.kv_channels=32"], "model.kv_channels", "qk_head_dim"),
        ([*LATENT, "model.add_qkv_bias=true"], "model.add_qkv_bias", "no biases"),
        ([*LATENT, "model.qk_pos_emb_head_dim=7"], "model.qk_pos_emb_head_dim", "in pairs, but 7"),
        ([*LATENT, "attention=local"], "attention.name", "no heads of latent attention"),
        ([*LATENT, "backend=te"], "backend", "norm their input once more"),
        (
            [*LATENT, "topology.tp=2", "model.q_lora_rank=33"],
            "model.q_lora_rank",
            "33 is not a multiple of tp 2",
        ),
        ([*LATENT, "topology.tp=2", "model.kv_lora_rank=33"], "model.kv_lora_rank", "97 is not a multiple"),
        (
            ["train.recompute_granularity=selective", "train.recompute_modules=[mla_up_proj]"],
            "train.recompute_modules",
            "latent attention only",
        ),
        (
            [*MOE, "moe.moe_router_enable_expert_bias=true"],
            "moe.moe_router_enable_expert_bias",
            "sigmoid and sqrtsoftplus",
        ),
        ([*MOE, GROUPS[0]], "moe.moe_router_group_topk", "Megatron accepts the number alone"),
        ([*MOE, GROUPS[1]], "moe.moe_router_num_groups", "the number of groups"),
        ([*MOE, "moe.moe_router_num_groups=3", GROUPS[1]], "moe.moe_router_num_groups", "4 experts"),
        ([*MOE, GROUPS[0], "moe.moe_router_group_topk=3"], "moe.moe_router_group_topk", "3 of 2 groups"),
        (
            [*MOE, "moe.moe_router_num_groups=4", "moe.moe_router_group_topk=1"],
            "moe.moe_router_group_topk",
            "2 experts cannot come evenly from 1 groups of 1",
        ),
        ([*MOE, "moe.moe_router_num_groups=0", GROUPS[1]], "moe.moe_router_num_groups", "must be above 0"),
        ([*MOE, GROUPS[0], "moe.moe_router_group_topk=0"], "moe.moe_router_group_topk", "must be above 0"),
        (["megatron.window_size='(64,0)'"], "attention.name", "no sliding window"),
    ],
)
def test_what_contradicts_or_would_do_nothing_is_refused(words: list[str], key: str, message: str) -> None:
    found = [str(problem) for problem in check(small_job(*words)) if problem.key == key]
    assert any(message in text for text in found), check(small_job(*words))
