"""Each part of the step-time model against the same figure worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megaplug.plan.cluster import Cluster
from megaplug.plan.step_time import Constants, layer_seconds, pipeline_seconds, rates_of, step_time, terms_of
from megaplug.plan.step_time.collectives import exchange_seconds, group_bandwidth, ring_seconds, send_seconds
from megaplug.plan.step_time.kernels import attention_core, product
from megaplug.plan.step_time.pipeline import head_seconds
from megaplug.plan.workload import Overlaps, Precision, Recompute, Routing, Sharing, Workload
from megaplug.topology import Batch, ModelShape, Topology

# Round numbers: 1 PFLOP/s, 1 TB/s, links of 100 GB/s among 8 GPUs, adapters of 10 GB/s.
ROUND = Cluster("round", 8, 80e9, {"bf16": 1e15, "fp8": 2e15}, 1e12, 100e9, 8, 10e9)
# All efficiencies one, nothing that takes time of itself.
PURE = Constants(
    gemm_efficiency=1, attention_efficiency=1, memory_efficiency=1, element_passes=10, score_passes=4,
    head_efficiency=1, launch_seconds=1e-9, moe_launch_seconds=1e-9, expert_passes=6, expert_seconds=0,
    bias_passes=0, link_efficiency=1, network_efficiency=1, collective_seconds=0, microbatch_seconds=0,
    step_seconds=0, overlap=1,
)  # fmt: skip
SHAPE = ModelShape(8, 1024, 4096, 16, 16, None, 2048, 32000)
RATES = rates_of(ROUND, "bf16", PURE)


def job(shape=SHAPE, micro=1, batch=16, **sizes) -> Workload:
    grid = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "etp": 1, "dp": 1, **sizes}
    world = grid["tp"] * grid["pp"] * grid["cp"] * grid["dp"]
    plain = Overlaps(grad_reduce=False, param_gather=False, p2p=False)
    return Workload(
        Topology(world_size=world, **grid),
        shape,
        Batch(micro, batch),
        Precision.of(bf16=True),
        overlaps=plain,
    )


def test_a_product_takes_its_flops_and_its_bytes():
    found = product(1000, 2000, 3000, terms_of(job()), RATES)
    flops = 2 * 1000 * 2000 * 3000 / 1e15
    ends, weights = 2 * (1000 * 3000 + 1000 * 2000) / 1e12, 2000 * 3000 / 1e12
    assert found.forward == pytest.approx(flops + ends + 2 * weights)
    # Backward: two products, each of whose ends move; the weights once more, and 4-byte gradients to and fro.
    assert found.backward == pytest.approx(2 * flops + 2 * ends + 2 * weights + 8 * weights)


def test_fp8_halves_the_flops_time_and_casts_the_operands():
    terms = terms_of(replace(job(), precision=Precision.of(fp8=True)))
    found = product(1000, 2000, 3000, terms, rates_of(ROUND, "fp8", PURE))
    flops = 2 * 1000 * 2000 * 3000 / 2e15
    moved = (1000 * 3000 + 2 * 1000 * 2000 + 2000 * 3000) / 1e12
    cast = 4 * 1000 * 3000 / 1e12  # read two bytes, written twice in one
    assert found.forward == pytest.approx(flops + moved + cast)


def test_fused_attention_leaves_half_of_the_scores_out_and_unfused_moves_all():
    flops = 4 * 2048 * 2048 * 1024
    fused = attention_core(terms_of(job()), RATES)
    assert fused.forward == pytest.approx(flops / 2 / 1e15)
    assert fused.backward == pytest.approx(2.5 * flops / 2 / 1e15)
    unfused = attention_core(terms_of(replace(job(), fused_attention=False)), RATES)
    scores = 2 * 16 * 2048 * 2048 / 1e12
    assert unfused.forward == pytest.approx(flops / 1e15 + 4 * scores)


def test_rings_and_transfers_take_their_bytes_at_the_bandwidth_of_their_group():
    assert ring_seconds(8e9, 8, 1, RATES) == pytest.approx(7e9 / 100e9)
    assert ring_seconds(8e9, 1, 1, RATES) == 0
    # 16 ranks of which 8 are in a node have its 8 adapters; 16 ranks a node apart have one each.
    assert group_bandwidth(16, 1, RATES) == pytest.approx(80e9)
    assert group_bandwidth(16, 8, RATES) == pytest.approx(10e9)
    assert group_bandwidth(16, 2, RATES) == pytest.approx(40e9)
    assert send_seconds(1e9, 2, 4, RATES) == pytest.approx(1e9 / 100e9)
    assert send_seconds(1e9, 4, 4, RATES) == pytest.approx(1e9 / 10e9)


def test_every_copy_of_a_token_is_sent_by_itself():
    # Inside a node: of 8 copies 7 leave the rank; over four nodes 6 leave the node.
    assert exchange_seconds(1e9, 8, 8, 1, RATES, 0) == pytest.approx(7e9 / 100e9)
    assert exchange_seconds(1e9, 8, 32, 1, RATES, 0) == pytest.approx(6e9 / 10e9)


def test_or_a_token_goes_to_a_rank_and_to_a_node_once_however_many_of_its_experts_are_there():
    # Of 8 ranks a token misses one with (7/8)^8, and one of the 8 is its own.
    assert exchange_seconds(1e9, 8, 8, 1, RATES, 1) == pytest.approx(8 * (1 - 0.875**8) * 7 / 8 * 1e9 / 100e9)
    # Four nodes, 8 copies: a token misses another node with (3/4)^8.
    assert exchange_seconds(1e9, 8, 32, 1, RATES, 1) == pytest.approx(3 * (1 - 0.75**8) * 1e9 / 10e9)


def test_the_allgather_dispatcher_sends_all_tokens_to_all_ranks():
    shape = replace(SHAPE, num_experts=8, moe_ffn_hidden_size=1024, moe_router_topk=2)
    sent = job(shape, ep=4, dp=4)
    gathered = replace(sent, routing=Routing(gathers=True))
    tokens = 2 * 2048 * 1024
    found = [layer_seconds(terms_of(one), RATES, moe=True).forward.ep for one in (sent, gathered)]
    # There and back: of two copies 3 in 4 leave the rank; or three other ranks' tokens come.
    assert found == pytest.approx([2 * 2 * 3 / 4 * tokens / 100e9, 2 * 3 * tokens / 100e9], rel=1e-3)


def test_experts_wait_for_the_cpu_and_their_biases_are_added_one_by_one():
    shape = replace(SHAPE, num_experts=8, moe_ffn_hidden_size=1024, moe_router_topk=2)
    waiting = rates_of(ROUND, "bf16", replace(PURE, moe_launch_seconds=1.0, expert_seconds=0.5))
    terms = terms_of(job(shape, ep=4, dp=4))
    pure = layer_seconds(terms, RATES, moe=True)
    late = layer_seconds(terms, waiting, moe=True)
    assert late.forward.total - pure.forward.total == pytest.approx(1 + 2 * 0.5)
    biased = replace(shape, add_bias_linear=True)
    adding = rates_of(ROUND, "bf16", replace(PURE, bias_passes=5))
    slower = layer_seconds(terms_of(job(biased, ep=4, dp=4)), adding, moe=True)
    copies = 2 * 2048 * 2 * 1024
    assert slower.forward.compute - pure.forward.compute == pytest.approx(5 * copies / 1e12, rel=1e-3)


def test_tensor_parallelism_gathers_and_scatters_two_and_two_and_two_more_backward():
    alone = Overlaps(tp_backward=False)
    wide = terms_of(replace(job(tp=8, sequence_parallel=True), overlaps=alone))
    once = 2 * 2048 * 1024 * 7 / 8 / 100e9
    assert layer_seconds(wide, RATES, moe=False).forward.tp == pytest.approx(4 * once, rel=1e-3)
    assert layer_seconds(wide, RATES, moe=False).backward.tp == pytest.approx(6 * once, rel=1e-3)
    reduced = terms_of(replace(job(tp=8), overlaps=alone))
    assert layer_seconds(reduced, RATES, moe=False).backward.tp == pytest.approx(4 * once, rel=1e-3)


def test_in_backward_products_of_a_blocks_first_layer_hide_what_it_sends():
    once = 2 * 2048 * 1024 * 7 / 8 / 100e9
    slow = Cluster("slow", 8, 80e9, {"bf16": 1e12}, 1e12, 100e9, 8, 10e9)
    rates = rates_of(slow, "bf16", PURE)
    wide = layer_seconds(terms_of(job(tp=8, sequence_parallel=True)), rates, moe=False)
    # Long products: a gather for each block's last layer is left.
    assert wide.backward.tp == pytest.approx(2 * once, rel=1e-3)
    assert layer_seconds(terms_of(job(tp=8)), rates, moe=False).backward.tp == pytest.approx(0, abs=1e-9)
    # Short ones hide as long as they take: those for queries, keys and values, and for gate and value.
    terms = terms_of(job(tp=8, sequence_parallel=True))
    hidden = product(2048, 3 * 1024 / 8, 1024, terms, RATES).backward
    hidden += product(2048, 2 * 4096 / 8, 1024, terms, RATES).backward
    short = layer_seconds(terms, RATES, moe=False)
    assert short.backward.tp == pytest.approx(6 * once - hidden, rel=1e-3)


def test_tensor_parallelism_does_not_gather_for_experts_that_it_does_not_cut():
    shape = replace(SHAPE, num_experts=8, moe_ffn_hidden_size=1024, moe_router_topk=2)
    once = 2 * 2048 * 1024 * 7 / 8 / 100e9
    whole = layer_seconds(terms_of(job(shape, tp=8, ep=8, sequence_parallel=True)), RATES, moe=True)
    assert whole.forward.tp == pytest.approx(2 * once, rel=1e-3)


def test_a_layer_is_as_long_as_the_cpu_needs_where_the_gpu_is_faster():
    slow = rates_of(ROUND, "bf16", replace(PURE, launch_seconds=1.0))
    plain = layer_seconds(terms_of(job()), slow, moe=False)
    assert plain.forward.total == pytest.approx(1.0)
    again = replace(job(), recompute=Recompute("full", "uniform", 1))
    assert layer_seconds(terms_of(again), slow, moe=False).backward.total == pytest.approx(2.0)


def test_a_pipeline_is_every_stage_once_and_the_busiest_for_the_other_microbatches():
    terms = terms_of(job(pp=4))
    layer = layer_seconds(terms, RATES, moe=False)
    found = pipeline_seconds(terms, RATES, layer, None)
    of_layers = 2 * (layer.forward.total + layer.backward.total)
    last = of_layers + head_seconds(terms, RATES)
    assert found.compute == pytest.approx(16 * last)
    embedding = 8 * 2 * 2048 * 1024 / 1e12
    assert found.bubble == pytest.approx(3 * of_layers + embedding)
    interleaved = pipeline_seconds(terms_of(job(pp=4, vpp=2)), RATES, layer, None)
    assert interleaved.bubble == pytest.approx(found.bubble / 2)


def test_the_head_takes_three_products_and_its_logits():
    flops, logits = 6 * 2048 * 1024 * 32000, 24 * 2048 * 32000
    assert head_seconds(terms_of(job()), RATES) == pytest.approx(flops / 1e15 + logits / 1e12)


def test_gradients_are_scattered_and_weights_gathered_and_the_optimizer_reads_its_share():
    from megaplug.plan.parameters import total_parameters

    count = total_parameters(SHAPE, padded_for_tp=1)
    shared = step_time(job(dp=8, batch=128), ROUND, PURE)
    assert shared.dp == pytest.approx(count * (4 + 2) * 7 / 8 / 100e9)
    assert shared.optimizer == pytest.approx(count / 8 * (2 * 12 + 2 * 4) / 1e12)
    whole = replace(job(dp=8, batch=128), sharing=Sharing(zero=0))
    assert step_time(whole, ROUND, PURE).dp == pytest.approx(count * 2 * 4 * 7 / 8 / 100e9)
    assert step_time(whole, ROUND, PURE).optimizer == pytest.approx(count * 32 / 1e12)
