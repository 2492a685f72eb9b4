from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from megaplug.errors import UserError
from megaplug.layers import spec
from megaplug.layers.attention.flash import FlashAttention
from megaplug.layers.attention.ring import RingAttention, RingDilatedAttention
from megaplug.layers.attention.rotary import RotarySelfAttention
from megaplug.layers.experts.grouped import GroupedExperts
from megaplug.layers.norm import LayerNorm, RMSNorm
from megaplug.layers.registry import AttentionLayers, ExpertsChoice
from megaplug.layers.spec import moe_pattern, transformer_layer_spec
from megaplug.layers.swiglu import SwiGLUMLP

PATTERN = {"segment_lengths": [8], "dilation_rates": [2]}


@pytest.fixture(autouse=True)
def pipeline_rank(monkeypatch):
    """A function that says which pipeline rank this process plays; the first, to begin with."""
    from megatron.core import parallel_state

    def play(rank):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: rank)

    play(0)
    return play


def alike(name, params):
    return AttentionLayers.alike(name, params)


def build(config, vp_stage=None, attention=None, experts=None):
    layers = attention or alike("flash", {})
    return transformer_layer_spec(layers, "native", experts)(SimpleNamespace(transformer=config), vp_stage)


def core_of(layer):
    """What builds a layer's core attention."""
    return layer.submodules.self_attention.submodules.core_attention


def is_moe(layer):
    """Whether a layer's MLP is a mixture of experts: the builder is a partial of its class."""
    mlp = layer.submodules.mlp
    assert isinstance(mlp, partial)
    return mlp.func is MoELayer


def test_a_layer_is_made_of_native_norms_and_the_named_attention(config):
    block = build(config(), attention=alike("flash", {"cuda_kernel": "cudnn"}))
    assert block.layer_norm is RMSNorm
    assert len(block.layer_specs) == 4
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    assert attention.core_attention.func is FlashAttention
    assert attention.core_attention.keywords == {"cuda_kernel": "cudnn"}
    assert attention.q_layernorm is attention.k_layernorm is IdentityOp
    assert layer.mlp.func == SwiGLUMLP.as_mlp_submodule
    assert layer.self_attention.module is RotarySelfAttention


def test_normalization_qk_layernorm_and_attention_follow_the_config(config):
    block = build(config(normalization="LayerNorm", qk_layernorm=True), attention=alike("local", {}))
    attention = block.layer_specs[0].submodules.self_attention.submodules
    assert block.layer_norm is attention.q_layernorm is attention.k_layernorm is LayerNorm
    assert attention.core_attention is DotProductAttention


def test_every_call_and_every_layer_has_a_spec_of_its_own(config):
    make = transformer_layer_spec(alike("flash", {}), "native")
    first, second = make(config()), make(config())
    submodules = [layer.submodules for block in (first, second) for layer in block.layer_specs]
    assert len({id(one) for one in submodules}) == 8
    assert len({id(one.self_attention.submodules) for one in submodules}) == 8
    assert len({id(one.sharded_state_dict_keys_map) for one in submodules}) == 8


def test_mixture_layers_follow_the_frequency_and_hold_the_named_experts(config):
    moe = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "add_bias_linear": False}
    named = {
        GroupedExperts: None,
        SequentialMLP: ExpertsChoice("sequential"),
    }
    for kind, choice in named.items():
        block = build(config(moe_layer_freq=[0, 1, 1, 0], **moe), experts=choice)
        assert [is_moe(layer) for layer in block.layer_specs] == [False, True, True, False]
        experts = block.layer_specs[1].submodules.mlp.keywords["submodules"].experts
        assert experts.func is kind
    chosen = build(config(**moe), experts=ExpertsChoice("grouped", {"kernel": "loop"}))
    assert chosen.layer_specs[1].submodules.mlp.keywords["submodules"].experts.keywords["kernel"] == "loop"
    assert moe_pattern(5, 4, 2) == [True, False, True, False, True]
    assert moe_pattern(3, None, 1) == [False] * 3
    with pytest.raises(UserError, match="for 3 layers"):
        moe_pattern(3, 4, [1, 0])


@pytest.mark.parametrize(
    ("rank", "vp_stage", "wanted"), [(0, 0, [0, 1]), (1, 0, [2, 3]), (0, 1, [4, 5]), (1, 1, [6, 7])]
)
def test_a_virtual_stage_builds_its_own_layers(config, pipeline_rank, rank, vp_stage, wanted):
    pattern = [1, 0, 0, 1, 1, 1, 0, 0]
    sizes = config(
        num_layers=8,
        num_moe_experts=4,
        add_bias_linear=False,
        moe_layer_freq=pattern,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype="float32",
    )
    pipeline_rank(rank)
    assert [is_moe(layer) for layer in build(sizes, vp_stage).layer_specs] == [
        bool(pattern[i]) for i in wanted
    ]


@pytest.mark.parametrize(
    ("rank", "vp_stage", "wanted"), [(0, 0, "rr"), (1, 0, "dr"), (0, 1, "rd"), (1, 1, "rr")]
)
def test_a_pattern_is_dealt_by_the_layers_of_the_whole_model(config, pipeline_rank, rank, vp_stage, wanted):
    """Stages of two layers begin in the middle of a unit of three."""
    sizes = config(
        num_layers=8,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype="float32",
    )
    pipeline_rank(rank)
    layers = AttentionLayers(("ring", "ring", "ring_dilated"), {"ring_dilated": PATTERN})
    found = [core_of(layer) for layer in build(sizes, vp_stage, layers).layer_specs]
    kinds = {"r": RingAttention, "d": RingDilatedAttention}
    assert [core.func for core in found] == [kinds[letter] for letter in wanted]
    for core in found:
        assert core.keywords["num_query_groups"] == 2
        assert core.keywords.get("segment_lengths", [8]) == [8]


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 2), (2, 3)])
def test_uneven_stages_build_as_many_layers_as_they_are_given(config, pipeline_rank, rank, count):
    sizes = config(
        num_layers=6,
        pipeline_model_parallel_size=3,
        num_layers_in_first_pipeline_stage=1,
        num_layers_in_last_pipeline_stage=3,
        pipeline_dtype="float32",
    )
    pipeline_rank(rank)
    assert len(build(sizes).layer_specs) == count


def test_the_final_norm_and_the_layers_build_from_the_spec(config, single_rank):
    """What Megatron's builders call them with."""
    block = build(config())
    assert block.layer_norm(config=config(), hidden_size=64, eps=1e-5).eps == 1e-5
    attention = block.layer_specs[0].submodules.self_attention
    core = attention.submodules.core_attention(
        config=config(),
        layer_number=1,
        attn_mask_type=attention.params["attn_mask_type"],
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=single_rank,
    )
    assert isinstance(core, FlashAttention)
    assert core.softmax_scale == pytest.approx(8**-0.5)


def test_mistakes_are_found_before_a_model_is_built():
    with pytest.raises(UserError, match="no core_attention called 'flahs'"):
        transformer_layer_spec(AttentionLayers(("flash", "flahs"), {}), "native")
    with pytest.raises(UserError, match="no parameter 'window'"):
        transformer_layer_spec(alike("flash", {"window": 3}), "native")
    with pytest.raises(UserError, match="no experts called 'gruoped'"):
        transformer_layer_spec(alike("flash", {}), "native", ExpertsChoice("gruoped"))
    with pytest.raises(UserError, match="'fast' is not possible"):
        transformer_layer_spec(alike("flash", {}), "native", ExpertsChoice("grouped", {"kernel": "fast"}))
    with pytest.raises(UserError, match="not 'auto'"):
        transformer_layer_spec(alike("flash", {}), "auto")


def test_layers_that_are_not_built_here_are_refused_by_name(config):
    variant = config()
    variant.experimental_attention_variant = "dsa"
    with pytest.raises(UserError, match="experimental_attention_variant"):
        build(variant)


def test_the_te_backend_keeps_its_attention_unless_another_is_named(config, monkeypatch):
    theirs = object()
    monkeypatch.setattr(
        spec,
        "get_gpt_layer_with_transformer_engine_submodules",
        lambda **_: SimpleNamespace(
            self_attention=SimpleNamespace(submodules=SimpleNamespace(core_attention=theirs))
        ),
    )
    block = spec._te_block(config(num_layers=3), None, AttentionLayers(("te", "flash"), {}))
    first, second, third = (core_of(layer) for layer in block.layer_specs)
    assert first is third is theirs
    assert second.func is FlashAttention
