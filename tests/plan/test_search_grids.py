"""What a search enumerates is exactly what `violations` lets through."""

from __future__ import annotations

from dataclasses import replace

import pytest
from search_by_force import by_brute_force

from megaplug.plan.search.grids import NAMES, Legal, legal
from megaplug.plan.search.space import Layout, Space, layouts, micro_batches, recomputes
from megaplug.plan.workload import Recompute
from megaplug.topology import ModelShape, Topology

DENSE = ModelShape(6, 96, 192, 6, 2, None, 96, 1000)
MOE = replace(DENSE, num_experts=8, moe_ffn_hidden_size=48, moe_router_topk=2)
LATENT = replace(MOE, multi_latent_attention=True, q_lora_rank=24, kv_lora_rank=12, qk_pos_emb_head_dim=12)


def space_of(shape: ModelShape, world_size: int, batch: int = 24, **options: object) -> Space:
    return Space(shape, world_size, batch, micro_batches(batch), **options)


def enumerated(found: Legal, world_size: int) -> list[tuple[Topology, int]]:
    rows = []
    for family in found.families:
        for row in range(len(family)):
            sizes = {name: int(family.sizes[name][row]) for name in NAMES}
            rows.append((family.topology(world_size, **sizes), sizes["micro_batch_size"]))
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("shape", [DENSE, MOE, LATENT], ids=["dense", "experts", "latent"])
def test_the_enumeration_equals_asking_for_every_product_of_sizes(shape, world_size):
    space = space_of(shape, world_size)
    rows = enumerated(legal(space), world_size)
    assert len(rows) == len(set(rows))
    assert set(rows) == set(by_brute_force(space))


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        (replace(DENSE, num_layers=7), 16),
        (replace(DENSE, seq_length=90), 24),
        (replace(MOE, moe_shared_expert_intermediate_size=64), 20),
        (replace(MOE, add_bias_linear=True, num_layers=5), 8),
        (replace(MOE, moe_layer_freq="[0,1,1,1,1,1]"), 12),
    ],
    ids=["seven layers", "a sequence of 90", "shared experts", "biases", "a first dense layer"],
)
def test_so_it_does_for_models_that_fit_badly(shape, batch):
    space = space_of(shape, 8, batch)
    assert set(enumerated(legal(space), 8)) == set(by_brute_force(space)) != set()


def test_without_overlap_interleaving_needs_three_stages():
    space = space_of(DENSE, 6, overlap_p2p_comm=False)
    found = enumerated(legal(space), 6)
    assert set(found) == set(by_brute_force(space))
    assert all(mesh.pp > 2 for mesh, _ in found if mesh.vpp)


@pytest.mark.parametrize(
    "fixed", [{"tp": 2}, {"pp": 2, "vpp": 3}, {"dp": 2}, {"cp": 1, "ep": 4}, {"etp": 1}, {"vpp": 0}], ids=str
)
def test_what_is_fixed_restricts_the_same_configurations(fixed):
    def keeps(mesh: Topology) -> bool:
        return all((getattr(mesh, key) or 0) == size for key, size in fixed.items())

    free = enumerated(legal(space_of(MOE, 8)), 8)
    held = enumerated(legal(space_of(MOE, 8, fixed=fixed)), 8)
    assert set(held) == {(mesh, micro) for mesh, micro in free if keeps(mesh)}
    assert 0 < len(held) < len(free)


def test_a_size_that_does_not_divide_the_world_leaves_nothing():
    for fixed in ({"tp": 3}, {"pp": 5}, {"cp": 7}, {"dp": 3}, {"ep": 3}, {"etp": 5}):
        assert legal(space_of(MOE, 8, fixed=fixed)).num_configurations == 0


def test_a_typed_share_of_the_stages_stays():
    found = legal(space_of(replace(DENSE, num_layers=7), 8, layout=Layout(first=1)))
    assert found.families
    assert {family.layout for family in found.families} == {Layout(first=1)}


def test_the_405b_model_gets_the_layouts_of_its_recipes_on_sixteen_stages():
    """126 layers: Meta's stages of 7, 14 times 8, and 7; NVIDIA counts embedding and loss as layers."""
    assert layouts(126, 16)[0] == Layout(embedding=True, loss=True)
    assert Layout(first=7, last=7) in layouts(126, 16)
    assert layouts(126, 9) == [Layout()]


def test_microbatches_divide_the_batch():
    assert micro_batches(256) == (1, 2, 4, 8)
    assert micro_batches(30) == (1, 2, 3, 5, 6)
    assert micro_batches(7) == (1, 7)


def test_what_a_model_can_compute_again_depends_on_what_it_has():
    dense = recomputes(DENSE, fused_attention=True, grouped_experts=True)
    assert dense[0] == Recompute()
    assert dense[-1] == Recompute("full", "uniform", 1)
    assert not any("moe" in choice.modules for choice in dense)
    experts = recomputes(MOE, fused_attention=False, grouped_experts=True)
    assert any("moe_act" in choice.modules for choice in experts)
    assert all("core_attn" in choice.modules for choice in experts if choice.granularity == "selective")
    assert not any("mlp" in choice.modules for choice in experts)
