"""Our counts per rank against the real GPTModel on the meta device, under torch's fake process group."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megaplug.plan.parameters import rank_parameters, stage_parameters
from megaplug.topology import Batch, ModelShape, Topology, violations

DENSE = ModelShape(
    num_layers=6,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    seq_length=32,
    vocab_size=300,
    make_vocab_size_divisible_by=16,
)
GPT2 = replace(
    DENSE,
    num_query_groups=8,
    swiglu=False,
    add_bias_linear=True,
    normalization="LayerNorm",
    untie_embeddings_and_output_weights=False,
    position_embedding_type="learned_absolute",
)
QWEN = replace(DENSE, add_qkv_bias=True, qk_layernorm=True, kv_channels=12)
MOE = replace(
    DENSE,
    num_experts=8,
    moe_ffn_hidden_size=48,
    moe_shared_expert_intermediate_size=32,
    moe_layer_freq="[0]+[1,0]*2+[1]",
)
LATENT = replace(
    DENSE,
    num_query_groups=8,
    kv_channels=None,
    multi_latent_attention=True,
    qk_layernorm=True,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
)


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    """Tied embeddings are moved to the GPU when they are built; meta tensors stay where they are."""
    import torch

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def topology(tp=1, pp=1, vpp=None, cp=1, ep=1, etp=None, dp=1, **stages) -> Topology:
    return Topology(tp, pp, vpp, cp, ep, etp or tp, dp, tp * pp * cp * dp, **stages)


def real_parameters(shape: ModelShape, mesh: Topology, rank: int) -> tuple[int, int]:
    """Dense and expert parameters that Megatron builds on a rank, all its virtual stages together."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world_size)
    try:
        parallel_state.initialize_model_parallel(
            mesh.tp,
            mesh.pp,
            mesh.vpp,
            context_parallel_size=mesh.cp,
            expert_model_parallel_size=mesh.ep,
            expert_tensor_parallel_size=mesh.etp,
            create_gloo_process_groups=False,
        )
        dense = expert = 0
        with torch.device("meta"):
            for chunk in range(mesh.vpp or 1):
                for name, parameter in build(shape, mesh, chunk if mesh.vpp else None).named_parameters():
                    if ".experts." in name and "shared" not in name:
                        expert += parameter.numel()
                    else:
                        dense += parameter.numel()
        return dense, expert
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build(shape: ModelShape, mesh: Topology, vp_stage: int | None):
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from megaplug.layers.registry import AttentionLayers
    from megaplug.layers.spec import transformer_layer_spec

    experts = {}
    if shape.is_moe:
        experts = {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.expert_ffn_size,
            "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
            "moe_layer_freq": [int(flag) for flag in shape.moe_layers],
            "moe_router_topk": shape.moe_router_topk,
            "moe_router_pre_softmax": shape.moe_router_topk == 1,
        }
    latent = {}
    if shape.multi_latent_attention:
        sizes = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        latent = {"rope_type": "rope"} | {size: getattr(shape, size) for size in sizes}
    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        gated_linear_unit=shape.swiglu,
        activation_func=torch.nn.functional.silu if shape.swiglu else torch.nn.functional.gelu,
        bias_activation_fusion=False,
        add_bias_linear=shape.add_bias_linear,
        add_qkv_bias=shape.add_qkv_bias,
        normalization=shape.normalization,
        qk_layernorm=shape.qk_layernorm,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        virtual_pipeline_model_parallel_size=mesh.vpp,
        expert_model_parallel_size=mesh.ep,
        expert_tensor_parallel_size=mesh.etp,
        num_layers_in_first_pipeline_stage=mesh.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=mesh.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=mesh.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=mesh.account_for_loss_in_pipeline_split,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        **experts,
        **latent,
    )
    if latent:
        # Megatron's own local layers cannot be built so: their core attention takes no sizes of heads.
        spec = transformer_layer_spec(AttentionLayers.alike("flash", {}), "native")(config, vp_stage)
    elif shape.is_moe:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=shape.normalization, vp_stage=vp_stage
        )
    else:
        spec = get_gpt_layer_local_spec(normalization=shape.normalization, qk_layernorm=shape.qk_layernorm)
    return GPTModel(
        config,
        spec,
        vocab_size=shape.padded_vocab_size(mesh.tp),
        max_sequence_length=shape.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        position_embedding_type=shape.position_embedding_type,
        vp_stage=vp_stage,
    )


@pytest.mark.parametrize(
    ("shape", "mesh"),
    [
        (DENSE, topology()),
        (DENSE, topology(tp=2, pp=3, dp=2)),
        (DENSE, topology(tp=4, cp=2)),
        (DENSE, topology(pp=2, vpp=3)),
        (DENSE, topology(pp=4, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=3)),
        (
            DENSE,
            topology(
                pp=8, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
            ),
        ),
        (
            ModelShape(126, 16384, 53248, 128, 8, None, 8192, 128256),
            topology(
                tp=8,
                pp=16,
                account_for_embedding_in_pipeline_split=True,
                account_for_loss_in_pipeline_split=True,
            ),
        ),
        (GPT2, topology()),
        (GPT2, topology(tp=2, pp=2)),
        (QWEN, topology(tp=2)),
        (LATENT, topology()),
        (LATENT, topology(tp=2, pp=2)),
        (replace(LATENT, q_lora_rank=None, qk_layernorm=False, add_bias_linear=True), topology(tp=4)),
        (replace(MOE, ffn_hidden_size=97, moe_layer_freq=1), topology(tp=2, etp=1, ep=2)),
        (MOE, topology()),
        (MOE, topology(tp=2, pp=2, ep=2, etp=1)),
        (MOE, topology(tp=2, pp=3, ep=4, dp=4)),
        (MOE, topology(pp=2, vpp=3, ep=2, dp=2)),
        (MOE, topology(pp=2, decoder_first_pipeline_num_layers=2, ep=8, dp=8)),
        (replace(MOE, moe_layer_freq=2, moe_shared_expert_intermediate_size=None), topology(ep=2, dp=2)),
        (
            replace(MOE, moe_layer_freq=None, add_bias_linear=True, moe_shared_expert_intermediate_size=None),
            topology(tp=2, ep=2, etp=1),
        ),
    ],
)
def test_every_stage_holds_as_many_parameters_as_megatron_builds(shape, mesh):
    allowed = replace(mesh, sequence_parallel=mesh.tp > 1)
    assert not violations(allowed, shape, Batch(1, 24 * mesh.dp))
    ranks_per_stage = mesh.world_size // mesh.pp
    for stage in range(mesh.pp):
        rank = stage * ranks_per_stage + (7 * stage + 5) % ranks_per_stage
        ours = rank_parameters(shape, mesh, rank)
        assert (ours.dense, ours.expert) == real_parameters(shape, mesh, rank), (stage, rank)
        assert ours == stage_parameters(shape, mesh, stage)


def test_the_sizes_we_refuse_are_those_that_megatron_refuses():
    """Heads, KV groups, MLP and experts, drawn at random against the real model."""
    draw = random.Random(3)
    legal = 0
    for _ in range(80):
        tp, etp, ep = draw.choice((1, 2, 3, 4, 6)), draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
        groups = draw.choice((1, 2, 3, 4, 6))
        shape = replace(
            MOE,
            num_layers=2,
            num_attention_heads=groups * draw.choice((1, 2, 4)),
            num_query_groups=groups,
            kv_channels=draw.choice((3, 4, 6)),
            ffn_hidden_size=draw.choice((24, 32)),
            num_experts=draw.choice((None, 4, 6)),
            moe_ffn_hidden_size=draw.choice((24, 32)),
            moe_shared_expert_intermediate_size=draw.choice((None, 12, 16)),
            moe_layer_freq=draw.choice(("[1,1]", "[0,1]", "[1]")),
        )
        shape = shape if shape.is_moe else replace(shape, moe_ffn_hidden_size=None)
        mesh = topology(tp=tp, ep=ep, etp=etp, dp=6 * ep // draw.choice((1, ep)))
        mesh = replace(mesh, sequence_parallel=tp > 1)
        if mesh.world_size % (ep * etp):
            continue
        ours = not violations(mesh, replace(shape, seq_length=24), Batch(1, mesh.dp))
        try:
            dense, expert = real_parameters(shape, mesh, mesh.world_size - 1)
            theirs = True
        except (ValueError, AssertionError, ZeroDivisionError) as error:
            theirs, why = False, error
        else:
            why = None
        if shape.moe_layer_freq == "[1]":
            theirs = theirs and not shape.is_moe
        assert ours == theirs, (shape, mesh, why)
        if ours:
            found = stage_parameters(shape, mesh, 0)
            assert (found.dense, found.expert) == (dense, expert), (shape, mesh)
        legal += ours
    assert 8 < legal < 60
