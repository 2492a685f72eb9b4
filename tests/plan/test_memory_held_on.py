"""The modelled memory of what is held longer than its turn: by schedules, by kernels, by a copy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaplug.layers.experts.in_cache import swiglu_experts
from megaplug.plan.attention_memory import attention_memory
from megaplug.plan.expert_memory import experts_backward, experts_kept
from megaplug.plan.layer_memory import layer_memory
from megaplug.plan.memory import stage_memory
from megaplug.plan.pipeline_memory import held_after, held_in_backward
from megaplug.plan.telling_stages import stages_unlike
from megaplug.plan.workload import Implementation, Overlaps, Precision, Recompute, Workload
from megaplug.runtime.rehearsal.inside import made_inside
from megaplug.topology import Batch, ModelShape, Topology

TINY = ModelShape(4, 256, 688, 8, 8, 32, 256, 256)
WITHOUT, WITH = Overlaps(p2p=False), Overlaps(p2p=True)


def interleaved(pp: int, vpp: int, microbatches: int, overlaps: Overlaps = WITHOUT) -> Workload:
    """One layer a virtual stage, of which full recompute keeps the input alone."""
    shape = replace(TINY, num_layers=pp * vpp)
    topology = Topology(1, pp, vpp, 1, 1, 1, 1, pp)
    recompute = Recompute("full", "uniform", 1)
    return Workload(topology, shape, Batch(1, microbatches), recompute=recompute, overlaps=overlaps)


def test_the_last_virtual_stages_last_input_is_named_until_its_next_turn():
    """Stage 2 of 4 has two passes more in its warm-up than the last: its third turn begins at pass 11."""
    load = interleaved(4, 3, 16)
    counts = [held_in_backward(load, 2, backward) for backward in range(1, 13)]
    # The input that comes next, from the second on the gradient before; then that input and its gradient.
    assert counts == [1, 2, 2, 2, 3, 4, 4, 4, 4, 4, 2, 2]


def test_with_overlap_the_later_half_of_the_stages_goes_on_naming_one_more_input():
    plain, overlapped = interleaved(4, 3, 16), interleaved(4, 3, 16, WITH)
    for stage, left in ((1, 0), (2, 2), (3, 2)):
        more = held_in_backward(overlapped, stage, 10) - held_in_backward(plain, stage, 10)
        assert more == left + 1, stage  # what was computed last is being sent, too


@pytest.mark.parametrize("overlaps", [WITHOUT, WITH])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("pp", range(3, 10))
@pytest.mark.parametrize("vpp", [2, 3, 4])
def test_a_few_stages_tell_which_one_is_the_fullest(pp, vpp, microbatches, overlaps):
    load = interleaved(pp, vpp, pp * microbatches, overlaps)
    telling = stages_unlike(load.topology, load.shape)
    assert len(telling) <= 5
    totals = [stage_memory(load, stage).total for stage in range(pp)]
    assert max(totals[stage] for stage in telling) == max(totals)
    between = [totals[stage] for stage in telling if 0 < stage < pp - 1]
    assert max(between) == max(totals[1:-1])


LATENT = replace(
    TINY,
    multi_latent_attention=True,
    q_lora_rank=None,
    kv_lora_rank=64,
    qk_head_dim=64,
    qk_pos_emb_head_dim=32,
    v_head_dim=64,
)


def test_core_attention_that_runs_again_lets_go_of_what_was_filled_up_or_is_cut():
    load = Workload(Topology(1, 1, None, 1, 1, 1, 1, 1), LATENT, Batch(1, 1))
    again = replace(load, recompute=Recompute("selective", None, None, ("core_attn",)))
    freed = layer_memory(load, has_experts=False).kept - layer_memory(again, has_experts=False).kept
    logarithms, output = 4 * 256 * 8, 4 * 256 * 8 * (64 + 32)
    # Values are kept as they are, not filled up to the size of a query.
    assert freed == logarithms + output + 4 * 256 * 8 * 32


@pytest.mark.parametrize(
    ("modules", "channels"),
    [(("mla_up_proj",), 2 * (64 + 32)), (("mla_up_proj", "core_attn"), 2 * (64 + 32) + 64)],
    ids=["a filled-up copy of the values stays", "nothing stays"],
)
def test_queries_keys_and_values_are_made_anew_but_for_what_the_kernel_took_a_copy_of(modules, channels):
    load = Workload(Topology(1, 1, None, 1, 1, 1, 1, 1), LATENT, Batch(1, 1))
    before = replace(load, recompute=Recompute("selective", None, None, modules[1:]))
    again = replace(load, recompute=Recompute("selective", None, None, modules))
    freed = layer_memory(before, has_experts=False).kept - layer_memory(again, has_experts=False).kept
    assert freed == 4 * 256 * 8 * channels


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("length", [256, 200])
@pytest.mark.parametrize("head", [32, 80, 96, 160])
def test_the_plan_and_rehearsals_say_the_same_of_what_kernels_make_for_themselves(size, length, head):
    shape = replace(TINY, kv_channels=head, seq_length=length)
    precision = Precision.of(bf16=size == 2)
    load = Workload(Topology(1, 1, None, 1, 1, 1, 1, 1), shape, Batch(2, 2), precision=precision)
    kind = torch.bfloat16 if size == 2 else torch.float32
    query = torch.empty(2, 8, length, head, dtype=kind, device="meta")
    aten = torch.ops.aten
    func = aten._scaled_dot_product_efficient_attention_backward if size == 4 else None
    func = func or aten._scaled_dot_product_flash_attention_backward
    inside = sum(made.numel() * made.element_size() for made in made_inside(func.default, [query] * 3))
    gradients = size * 2 * length * 8 * head * 4  # of what comes out, queries, keys and values
    assert attention_memory(load).backward == gradients + inside


def test_of_a_ranks_only_expert_the_outputs_gradient_goes_before_the_first_projections_comes():
    mesh = Topology(4, 1, None, 1, 4, 4, 1, 4, sequence_parallel=True)
    shape = replace(TINY, num_experts=4, moe_ffn_hidden_size=344, moe_router_topk=1)
    several = replace(shape, num_experts=8)
    one = experts_backward(Workload(mesh, shape, Batch(1, 1)))
    two = experts_backward(Workload(mesh, several, Batch(1, 1)))
    seen = 4 * 256 * 256  # a copy of each of the four ranks' tokens
    assert one < two
    assert seen < one < 2 * seen <= two


@pytest.mark.parametrize("size", [2, 4])
def test_experts_on_a_cpu_keep_what_the_plan_says(size):
    width, experts = 24, 4
    shape = replace(TINY, num_experts=experts, moe_ffn_hidden_size=width, moe_router_topk=2)
    code = Implementation(device="cpu", grouped_experts=True)
    precision = Precision.of(bf16=size == 2)
    alone = Topology(1, 1, None, 1, 1, 1, 1, 1)
    parts = experts_kept(Workload(alone, shape, Batch(1, 1), precision=precision, code=code))
    rows, dtype = 2 * 256, torch.bfloat16 if size == 2 else torch.float32
    weights = [
        torch.zeros(experts, *of_one, dtype=dtype, requires_grad=True)
        for of_one in ((2 * width, 256), (256, width))
    ]
    probs = torch.ones(rows)  # counted with the router
    others = {tensor.data_ptr() for tensor in (*weights, probs)}
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes * (tensor.data_ptr() not in others))
        return tensor

    x = torch.zeros(rows, 256, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu_experts(x, probs, *weights, (rows // experts,) * experts)
    assert sum(kept) == parts["experts"] + parts["expert_activation"]


def test_as_the_optimizer_steps_virtual_stages_still_name_their_last_inputs():
    plain = interleaved(4, 3, 16)
    assert [held_after(plain, stage) for stage in range(4)] == [4, 6, 6, 6]  # each with its gradient
    assert held_after(replace(plain, topology=replace(plain.topology, pp=1, vpp=None)), 0) == 0
