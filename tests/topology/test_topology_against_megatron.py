"""Our verdict and our groups against Megatron's own, under torch's fake process group."""

from __future__ import annotations

import random

import pytest

from megaplug.job.schema import TopologyConfig
from megaplug.topology import Batch, ModelShape, Topology, resolve, violations

# A model and a batch so divisible that only the mesh can be at fault.
SHAPE = ModelShape(
    num_layers=5040,
    hidden_size=5040,
    ffn_hidden_size=5040,
    num_attention_heads=5040,
    num_query_groups=5040,
    kv_channels=2,
    seq_length=5040 * 64,
    vocab_size=100,
    num_experts=5040,
)
BATCH = Batch(1, 5040 * 64)


def random_meshes(count: int) -> list[tuple[int, int, int, int, int, int | None]]:
    """World size, tp, pp, cp, ep, etp: half of them of powers of two, so that many are legal."""
    draw = random.Random(7)
    meshes = []
    for turn in range(count):
        sizes = (1, 2, 4, 8) if turn % 2 else (1, 2, 3, 4, 6)
        world_size = draw.choice((8, 16, 32) if turn % 2 else (1, 2, 6, 12, 16, 24))
        tp, pp, cp, ep = (draw.choice(sizes) for _ in range(4))
        meshes.append((world_size, tp, pp, cp, ep, draw.choice((None, 1, 2, tp))))
    return meshes


def megatron_accepts(world_size: int, tp: int, pp: int, cp: int, ep: int, etp: int | None) -> bool:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            create_gloo_process_groups=False,
        )
    except RuntimeError as error:
        assert "is not divisible by" in str(error)
        return False
    else:
        return True
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def test_our_verdict_on_a_mesh_is_megatrons():
    verdicts = []
    for mesh in random_meshes(300):
        world_size, tp, pp, cp, ep, etp = mesh
        request = TopologyConfig(
            world_size=world_size, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, sequence_parallel=tp > 1
        )
        topology, problems = resolve(request)
        assert topology is not None
        ours = not problems and not violations(topology, SHAPE, BATCH)
        assert ours == megatron_accepts(*mesh), mesh
        verdicts.append(ours)
    assert 60 < sum(verdicts) < 240  # both answers were asked for often


@pytest.mark.parametrize(
    ("pp", "vpp", "first", "last", "embedding", "loss"),
    [
        (1, None, None, None, False, False),
        (4, None, None, None, False, False),
        (4, 3, None, None, False, False),
        (4, None, 3, 3, False, False),
        (3, 2, 4, None, False, False),
        (3, 2, None, 8, False, False),
        (4, 2, 6, 2, False, False),
        (13, None, None, None, True, True),
        (2, 13, None, None, True, True),
        (5, None, None, None, False, True),
        (5, 5, None, None, True, False),
    ],
)
def test_each_stage_holds_the_layers_that_megatron_builds_there(pp, vpp, first, last, embedding, loss):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megaplug.topology import layer_ids

    config = megatron_config(pp, vpp, first, last, embedding, loss)
    topology = Topology(1, pp, vpp, 1, 1, 1, 1, pp, False, first, last, embedding, loss)
    seen = []
    for stage in range(pp):
        chunks = layer_ids(topology, 24, stage)
        assert topology.layers_of_stage(24)[stage] == sum(map(len, chunks))
        for chunk, layers in enumerate(chunks):
            vp_stage = chunk if vpp else None
            start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
            count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
            assert layers == list(range(start, start + count))
        seen += [layer for layers in chunks for layer in layers]
    assert sorted(seen) == list(range(24))


def megatron_config(pp, vpp, first, last, embedding, loss, num_layers=24):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )


def megatron_deals_out(num_layers, pp, vpp, first, last, embedding, loss) -> bool:
    """Whether Megatron's config, counts and offsets all work and every layer is built once."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = megatron_config(pp, vpp, first, last, embedding, loss, num_layers)
        built = []
        for stage in range(pp):
            for chunk in range(vpp or 1):
                vp_stage = chunk if vpp else None
                start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
                built += range(
                    start, start + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
                )
    except (ValueError, AssertionError, ZeroDivisionError):
        return False
    return sorted(built) == list(range(num_layers))


def test_our_verdict_on_uneven_stages_is_megatrons():
    draw = random.Random(11)
    legal = 0
    for _ in range(600):
        pp = draw.choice((1, 2, 3, 4))
        vpp = draw.choice((None, None, 2, 3)) if pp > 1 else None
        num_layers = draw.choice((4, 6, 8, 10, 12, 22, 24))
        first, last = draw.choice((None, None, 0, 2, 3, 4, 6)), draw.choice((None, None, 1, 2, 6, 9))
        if pp == 1 and first is not None:
            last = None  # Megatron takes the sum's accidents for legal; we refuse two named stages of one
        embedding, loss = draw.random() < 0.3, draw.random() < 0.3
        topology = Topology(1, pp, vpp, 1, 1, 1, 1, pp, False, first, last, embedding, loss)
        shape = ModelShape(num_layers, 8, 8, 2, 2, 4, 8, 8)
        ours = not violations(topology, shape, Batch(1, 12))
        case = (num_layers, pp, vpp, first, last, embedding, loss)
        assert ours == megatron_deals_out(*case), case
        legal += ours
    assert 40 < legal < 500
