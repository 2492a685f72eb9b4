"""The closed form against published counts and against counts of the real model that were written down."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from megaplug.job.checks import job_shape
from megaplug.job.compose import compose_job
from megaplug.plan.parameters import active_parameters, rank_parameters, stage_parameters, total_parameters
from megaplug.topology import ModelShape, Topology

CONF = Path(__file__).parents[2] / "conf"
SEED_200B = ModelShape(96, 12288, 49152, 96, 12, 128, 2048, 32000)
SEED_400B = ModelShape(120, 16384, 65536, 128, 16, 128, 2048, 32000)
SEED_30B = ModelShape(16, 1024, 14336, 16, 16, 64, 2048, 32000, swiglu=False, num_experts=64)


def preset(name: str, **changes: object) -> ModelShape:
    return replace(_composed(name), **changes)


@functools.cache
def _composed(name: str) -> ModelShape:
    return job_shape(compose_job([f"model={name}"]))


def topology(tp: int, pp: int, ep: int = 1, etp: int | None = None, dp: int = 1, **stages: bool) -> Topology:
    return Topology(tp, pp, None, 1, ep, etp or tp, dp, tp * pp * dp, **stages)


# As the published weights have them (the totals of their safetensors files), but for DeepSeek-V3 and Kimi K2:
# Megatron keeps the biases of their routers as buffers.
PUBLISHED = {
    "llama1_7b": 6738415616,
    "llama2_7b": 6738415616,
    "llama2_13b": 13015864320,
    "llama2_70b": 68976648192,
    "llama3_8b": 8030261248,
    "llama3_70b": 70553706496,
    "llama3_405b": 405853388800,
    "llama3_1_8b": 8030261248,
    "llama3_1_70b": 70553706496,
    "code_llama_7b": 6738546688,
    "mistral_7b": 7248023552,
    "mixtral_8x7b": 46702792704,
    "mixtral_8x22b": 140620634112,
    "qwen3_0_6b": 596049920,
    "qwen3_1_7b": 1720574976,
    "qwen3_4b": 4022468096,
    "qwen3_8b": 8190735360,
    "qwen3_14b": 14768307200,
    "qwen3_32b": 32762123264,
    "qwen3_30b_a3b": 30532122624,
    "deepseek_v2_lite": 15706484224,
    "qwen3_235b_a22b": 235093634560,
    "deepseek_v3": 671026419200 - 58 * 256,
    "kimi_k2": 1026408232448 - 60 * 384,
    # Without the sinks of the attention: one for each of 64 heads of every layer.
    "gpt_oss_20b": 20914757184 - 24 * 64,
    "gpt_oss_120b": 116829156672 - 36 * 64,
}
# Megatron's own model of the first two was counted; the others follow by the same formula.
BY_DIMENSIONS = {
    "arbor_200b": 207349886976,
    "arbor_400b": 460077154304,
    "arbor_1t_moe": 96780032020480,
    "moe_30b": 30131389440,
}


@pytest.mark.parametrize(("name", "count"), [*PUBLISHED.items(), *BY_DIMENSIONS.items()])
def test_a_preset_has_the_number_of_parameters_that_its_file_states(name, count):
    assert total_parameters(preset(name)) == count
    assert f"{count:,}" in (CONF / "model" / f"{name}.yaml").read_text()


def test_every_model_but_the_tiny_ones_states_its_number_of_parameters():
    for path in sorted((CONF / "model").glob("*.yaml")):
        if not path.stem.startswith("tiny"):
            assert f"{total_parameters(preset(path.stem)):,}" in path.read_text(), path


# Billions of parameters as printed, of models whose exact number is not published: by their own formula,
# 12 l h^2 (1 + 13 / 12 h + (V + s) / 12 l h), where a paper gives one.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *((f"gpt3_{size}b", float(size.replace("_", "."))) for size in (
            "1_7", "3_6", "7_5", "18_4", "39_1", "76_1", "145_6", "310_1", "529_6", "1008"
        )),
        ("gpt3_175b", 174.6),
        ("gpt3_22b", 22.1),
        ("gpt3_5b", 5.1),
        ("gpt3_20b", 20.3),
        ("nemotron4_15b", 15.6),
        ("nemotron4_340b", 341.0),
    ],
)  # fmt: skip
def test_a_preset_has_the_size_that_it_is_named_for(name, billions):
    assert round(total_parameters(preset(name)) / 1e9, 1) == billions


@pytest.mark.parametrize(
    "name",
    [
        "mixtral_8x7b",
        "mixtral_8x22b",
        "qwen3_30b_a3b",
        "qwen3_235b_a22b",
        "gpt_oss_120b",
        "kimi_k2",
        "deepseek_v2_lite",
    ],
)
def test_a_model_with_experts_states_how_much_of_it_a_token_uses(name):
    assert f"{active_parameters(preset(name)):,}" in (CONF / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(("name", "millions"), [("tiny_llama3_50m", 50.9), ("tiny_llama3_150m", 149.8)])
def test_the_tiny_llama_presets_have_the_size_that_they_are_named_for(name, millions):
    assert round(total_parameters(preset(name, vocab_size=32000)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (SEED_200B, 207349886976),
        (replace(SEED_200B, swiglu=False), 149367828480),
        (replace(SEED_200B, vocab_size=128256), 209715474432),
        (SEED_400B, 460077154304),
        (replace(SEED_400B, swiglu=False), 331228135424),
        (ModelShape(150, 20480, 81920, 160, 20, 128, 2048, 32000), 897849364480),
        (SEED_30B, 30198498304),
        (replace(SEED_30B, ffn_hidden_size=2048), 4428694528),
        (replace(SEED_30B, moe_ffn_hidden_size=2048, swiglu=True), 6576178176),
    ],
)
def test_the_seed_models_are_counted_as_megatron_counts_them(shape, count):
    assert total_parameters(shape) == count


def test_a_token_uses_only_its_experts():
    dense = ModelShape(150, 20480, 81920, 160, 20, 128, 2048, 32000)
    moe = replace(dense, num_experts=128)
    assert round(total_parameters(moe) / 1e12, 2) == 96.78
    assert round(active_parameters(replace(moe, moe_router_topk=1)) / 1e9, 1) == 898.2
    assert round(active_parameters(moe) / 1e9, 1) == 1653.2
    assert active_parameters(dense) == total_parameters(dense)


def test_the_padded_vocabulary_is_counted_on_request():
    llama = preset("llama2_7b", make_vocab_size_divisible_by=1024)
    padding = 2 * (32768 - 32000) * 4096
    assert total_parameters(llama, padded_for_tp=8) == total_parameters(llama) + padding


@pytest.mark.parametrize(
    ("shape", "mesh", "rank", "count"),
    [
        (SEED_200B, topology(4, 8), 0, 6554419200),
        (SEED_400B, topology(8, 15), 0, 3892576256),
        (SEED_30B, topology(2, 4, ep=4, etp=1, dp=2), 0, 1904091136),
        (SEED_30B, topology(2, 4, ep=4, etp=1, dp=2), 8, 1887707136),
        (SEED_30B, topology(2, 4, ep=4, etp=1, dp=2), 15, 1904092160),
    ],
)
def test_a_rank_holds_what_the_real_model_held_there(shape, mesh, rank, count):
    # The counts are of models that Megatron had padded, which it does to a multiple of 128 x tp.
    shape = replace(shape, make_vocab_size_divisible_by=128 * mesh.tp)
    assert rank_parameters(shape, mesh, rank).total == count
    if shape.is_moe:
        assert rank_parameters(shape, mesh, rank).expert == 1879048192


@pytest.mark.parametrize(("rank", "count"), [(0, 3450601472), (2047, 3450617856)])
def test_llama_405b_with_eight_layers_a_stage_and_no_padding_on_2048_ranks(rank, count):
    shape = preset("llama3_405b", num_layers=128, make_vocab_size_divisible_by=1)
    assert rank_parameters(shape, topology(8, 16, dp=16), rank).total == count


@pytest.mark.parametrize("mesh", [topology(1, 1), topology(1, 2), topology(1, 4)])
def test_the_stages_together_hold_the_model(mesh):
    shape = replace(SEED_30B, add_bias_linear=True, position_embedding_type="learned_absolute")
    stages = [stage_parameters(shape, mesh, stage).total for stage in range(mesh.pp)]
    assert sum(stages) == total_parameters(shape, padded_for_tp=1)
