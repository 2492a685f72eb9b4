"""The modelled memory of a rank, against counts by hand and published measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megaplug.plan.in_flight import held_microbatches
from megaplug.plan.layer_memory import layer_memory
from megaplug.plan.memory import GIB, estimate, stage_memory
from megaplug.plan.parameters import total_parameters
from megaplug.plan.workload import Implementation, Precision, Recompute, Sharing, Workload
from megaplug.topology import Batch, ModelShape, Topology

TINY = ModelShape(4, 256, 688, 8, 2, 32, 256, 256)
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 8192, 128256)


def needed(*sizes, **options):
    return estimate(Workload(*sizes, **options))


def topology(tp=1, pp=1, vpp=None, cp=1, ep=1, etp=None, dp=1) -> Topology:
    return Topology(tp, pp, vpp, cp, ep, etp or tp, dp, tp * pp * cp * dp, sequence_parallel=tp > 1)


@pytest.mark.parametrize(
    ("precision", "per_parameter"),
    [(Precision(), 16), (Precision.of(bf16=True), 18), (Precision.of(bf16=False), 16)],
)
def test_one_rank_holds_every_state_byte(precision, per_parameter):
    found = needed(topology(), TINY, Batch(1, 1), precision=precision)
    state = found.weights + found.gradients + found.optimizer
    assert state == per_parameter * total_parameters(TINY)


def test_llama_8b_on_8_h100_is_within_a_percent_of_what_nvidia_logged():
    """TP1 CP2 DP4 with bf16 gradients: memory_allocated 44,271,689,728 (`planner.md`, section 4)."""
    precision = Precision.of(bf16=True, gradients_in_fp32=False)
    found = needed(topology(cp=2, dp=4), LLAMA_8B, Batch(1, 128), precision=precision)
    state = found.weights + found.gradients + found.optimizer
    assert state == pytest.approx(44_271_689_728, rel=0.01)
    assert state < 44_271_689_728


def test_expert_state_is_cut_over_expert_data_parallelism_only():
    moe = replace(TINY, num_experts=4, moe_ffn_hidden_size=344)
    whole = needed(topology(), moe, Batch(1, 4)).optimizer
    split = needed(topology(dp=4, ep=4), moe, Batch(1, 4)).optimizer
    experts = 8 * 4 * 4 * 3 * 256 * 344
    assert split == (whole - experts) // 4 + experts // 4  # a quarter of the experts, kept whole


def layer_by_hand(tokens=256, hidden=256, heads=8, qkv=256 + 2 * 64, ffn=688, size=2):
    """Two norms' inputs, outputs and statistics; queries, keys, values; attention's output; the MLP."""
    stream = 4 * size * tokens * hidden + 2 * 4 * tokens
    # fp32's kernel takes groups as a batch: what comes out is sorted back.
    sorted_back = size * tokens * 256 if size == 4 else 0
    attention = size * tokens * (qkv + 256) + sorted_back + 4 * tokens * heads
    return stream + attention + size * tokens * ffn * 3


LAST_NORM = 2 * 2 * 256 * 256  # into and out of it, in bf16


def test_activations_of_one_layer_are_the_formula():
    one = replace(TINY, num_layers=1)
    bf16 = Precision.of(bf16=True)
    found = needed(topology(), one, Batch(1, 1), precision=bf16).activations
    assert found == layer_by_hand() + LAST_NORM
    both = needed(topology(), one, Batch(2, 2)).activations  # fp32, two sequences
    assert both == layer_by_hand(tokens=512, size=4) + 4 * LAST_NORM


def test_the_first_stage_keeps_as_many_microbatches_as_there_are_stages():
    def first(batch, **sizes):
        return stage_memory(Workload(topology(**sizes), TINY, Batch(1, batch)), 0).activations

    layer = layer_by_hand(size=4)
    assert first(8, pp=2) == 2 * 2 * layer  # two microbatches of half the layers
    assert first(1, pp=2) == 2 * layer
    assert first(8, pp=2, vpp=2) == 5 * layer  # L (1 + (p - 1) / (p v))
    assert first(8, pp=4) == 4 * layer


def test_virtual_stages_of_unlike_layers_are_counted_by_what_each_holds():
    """Stage 0 of two, with a dense and a layer of experts as its virtual stages: three and two in flight."""
    shape = replace(TINY, num_experts=4, moe_ffn_hidden_size=344, moe_layer_freq="[0, 0, 1, 1]")
    load = Workload(topology(pp=2, vpp=2), shape, Batch(1, 8))
    dense = layer_memory(load, has_experts=False).kept
    experts = layer_memory(load, has_experts=True).kept
    assert held_microbatches(load, 0) == [3, 2]
    assert stage_memory(load, 0).activations == round(3 * dense + 2 * experts)


def test_full_recompute_keeps_a_layer_input_each_and_makes_layers_anew_in_the_workspace():
    def found(*recompute, stage=0):
        load = Workload(topology(pp=2), TINY, Batch(1, 1), recompute=Recompute(*recompute))
        return stage_memory(load, stage)

    stream, layer = 4 * 256 * 256, layer_by_hand(size=4)
    plain, every, pairs = found(), found("full", "uniform", 1), found("full", "uniform", 2)
    assert plain.activations == 2 * layer
    assert every.activations == 2 * stream
    assert pairs.activations == stream
    assert every.workspace == plain.workspace + layer
    assert pairs.workspace == plain.workspace + 2 * layer
    block = found("full", "block", 1)
    assert block.activations == stream + layer
    assert plain.workspace <= block.workspace < every.workspace


def test_sequence_and_tensor_parallelism_cut_activations():
    def kept(mesh):
        return needed(mesh, TINY, Batch(1, 1), precision=Precision.of(bf16=True)).activations

    whole = kept(topology())
    assert kept(topology(tp=2)) == whole // 2
    without = replace(topology(tp=2), sequence_parallel=False)
    assert whole // 2 < kept(without) < whole
    assert kept(topology(cp=2)) == whole // 2


def test_logits_are_on_the_last_stage_only():
    bf16 = Precision.of(bf16=True)
    assert needed(topology(), TINY, Batch(1, 1)).logits == 256 * 256 * 4
    ours = needed(topology(), TINY, Batch(1, 1), precision=bf16)
    assert ours.logits == 256 * 256 * 2
    assert ours.workspace >= 2 * 256 * 256 * 4  # the loss works on fp32 copies
    megatrons = Implementation(fused_loss=False)
    assert needed(topology(), TINY, Batch(1, 1), precision=bf16, code=megatrons).logits == 256 * 256 * 6
    assert stage_memory(Workload(topology(pp=4), TINY, Batch(1, 8)), 0).logits == 0


def test_the_estimate_says_that_it_is_modelled():
    text = str(needed(topology(), LLAMA_8B, Batch(1, 1), precision=Precision.of(bf16=True)))
    assert "modelled" in text and "workspace" in text
    assert needed(topology(), LLAMA_8B, Batch(1, 1)).total > 100 * GIB


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer", "gathered"),
    [(0, 4, 4, 8, 0), (1, 4, 4, 2, 0), (2, 4, 1, 2, 3 / 4), (3, 1, 1, 2, 3 * 3 / 4)],
)
def test_each_zero_level_cuts_what_it_shares_out(zero, weights, gradients, optimizer, gathered):
    """Bytes a parameter in fp32 on four ranks; of one of four layers the other ranks' parts come whole.

    Level 2 has such a layer's gradients, level 3 also its weights and the next one's.
    """
    parameters = total_parameters(TINY)
    found = needed(topology(dp=4), TINY, Batch(1, 4), sharing=Sharing(zero=zero))
    expected = [weights * parameters, gradients * parameters, optimizer * parameters]
    assert [found.weights, found.gradients, found.optimizer] == [round(size) for size in expected]
    without = needed(topology(dp=4), TINY, Batch(1, 4), sharing=Sharing(zero=1))
    assert found.workspace - without.workspace == pytest.approx(gathered * parameters, abs=1)


def test_fp16_has_twenty_bytes_a_parameter_four_of_them_for_the_step_and_sixteen_are_shared_out():
    precision, parameters = Precision.of(fp16=True), total_parameters(TINY)
    found = needed(topology(dp=2), TINY, Batch(1, 2), precision=precision)
    assert found.weights + found.gradients == 4 * parameters
    assert found.optimizer == 12 * parameters / 2
    step = found.activations + found.logits + found.workspace
    assert step >= 4 * parameters / 2


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_has_its_gradient_twice_until_both_are_summed_up(tied):
    """One rank has both: the output layer's part waits for the embedding's, and the sum comes beside them."""
    shape = replace(TINY, vocab_size=65536, seq_length=64, untie_embeddings_and_output_weights=not tied)
    found = needed(topology(), shape, Batch(1, 1), code=Implementation(backend="te"))
    weight = 4 * 65536 * 256
    most = found.activations + found.logits + found.workspace
    assert 3 * weight <= most < 3.1 * weight if tied else weight <= most < 2.1 * weight


def test_what_is_offloaded_is_counted_on_the_cpu_and_not_on_the_rank():
    plain = needed(topology(), TINY, Batch(1, 1))
    half = needed(topology(), TINY, Batch(1, 1), sharing=Sharing(optimizer_on_cpu=0.5))
    assert half.optimizer == half.on_cpu == plain.optimizer / 2
    layers = needed(topology(), TINY, Batch(1, 1), sharing=Sharing(layers_on_cpu=3))
    assert layers.activations == plain.activations // 4
    assert layers.on_cpu == plain.activations - layers.activations
    assert "on the CPU" in str(layers) and "on the CPU" not in str(plain)


def test_a_recomputed_module_is_made_anew_in_the_workspace():
    def found(*modules, shape=TINY):
        recompute = Recompute("selective", modules=modules)
        return stage_memory(Workload(topology(pp=2), shape, Batch(1, 1), recompute=recompute), 0)

    plain, mlp, normed = found(), 4 * 256 * 688 * 3, 2 * 4 * 256 * 256
    assert plain.activations - found("mlp").activations == 2 * mlp
    assert plain.activations - found("mlp", "layernorm").activations == 2 * (mlp + normed)
    # What comes out of the MLP is made anew, too.
    assert found("mlp").workspace == plain.workspace + mlp + 4 * 256 * 256
    # Flash attention keeps no scores; in fp32 what it gives for several groups is sorted into a copy.
    assert plain.activations - found("core_attn").activations == 2 * 4 * 256 * (8 + 256)
    moe = replace(TINY, num_experts=4, moe_ffn_hidden_size=344, moe_shared_expert_intermediate_size=344)
    assert found("mlp", shape=moe) == found(shape=moe)
    by_module = [found(*names, shape=moe).activations for names in (["moe"], ["moe_act"], [])]
    assert by_module == sorted(by_module) and len(set(by_module)) == 3
    shared = found(shape=moe).activations - found("shared_experts", shape=moe).activations
    assert shared == 2 * 4 * 256 * 344 * 3
