"""The modelled lower estimate of a rank's memory, against counts by hand and published measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megaplug.plan.memory import GIB, estimate
from megaplug.plan.parameters import total_parameters
from megaplug.plan.workload import Precision, Recompute, Sharing, Workload
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


def test_activations_of_one_layer_are_the_formula():
    one = replace(TINY, num_layers=1)
    tokens, hidden, qkv, ffn = 256, 256, 256 + 2 * 64, 688
    by_hand = 8 * tokens * hidden + 2 * tokens * qkv + 2 * tokens * 256 + 2 * tokens * ffn * 3
    assert needed(topology(), one, Batch(1, 1), precision=Precision.of(bf16=True)).activations == by_hand
    assert needed(topology(), one, Batch(2, 2)).activations == 4 * by_hand  # fp32, two sequences


def test_the_first_stage_keeps_as_many_microbatches_as_there_are_stages():
    one = needed(topology(), TINY, Batch(1, 8)).activations
    first = needed(topology(pp=2), replace(TINY, vocab_size=1), Batch(1, 8))
    assert first.stage == 0
    assert first.activations == one  # two microbatches of half the layers
    assert needed(topology(pp=2), replace(TINY, vocab_size=1), Batch(1, 1)).activations == one // 2
    interleaved = needed(topology(pp=2, vpp=2), replace(TINY, vocab_size=1), Batch(1, 8))
    assert interleaved.activations == pytest.approx(one * 1.25)  # L (1 + (p - 1) / (p v))


def test_full_recompute_keeps_a_layer_input_each_and_one_layer():
    none = needed(topology(), TINY, Batch(1, 1)).activations
    full = estimate(
        Workload(topology(), TINY, Batch(1, 1), recompute=Recompute("full", "uniform", 1))
    ).activations
    assert full == 4 * 4 * 256 * 256 + none // 4
    block = estimate(
        Workload(topology(), TINY, Batch(1, 1), recompute=Recompute("full", "block", 2))
    ).activations
    assert full < block < none + none // 4


def test_sequence_and_tensor_parallelism_cut_activations():
    whole = needed(topology(), TINY, Batch(1, 1)).activations
    assert needed(topology(tp=2), TINY, Batch(1, 1)).activations == whole // 2
    without = replace(topology(tp=2), sequence_parallel=False)
    assert whole // 2 < needed(without, TINY, Batch(1, 1)).activations < whole
    assert needed(topology(cp=2), TINY, Batch(1, 1)).activations == whole // 2


def test_logits_are_on_the_last_stage_only():
    assert needed(topology(), TINY, Batch(1, 1)).logits == 256 * 256 * 4
    assert needed(topology(), TINY, Batch(1, 1), precision=Precision.of(bf16=True)).logits == 256 * 256 * 6
    assert needed(topology(pp=4), TINY, Batch(1, 8)).logits == 0  # the first stage is the fullest


def test_the_estimate_says_that_it_is_modelled():
    text = str(needed(topology(), LLAMA_8B, Batch(1, 1), precision=Precision.of(bf16=True)))
    assert "modelled" in text and "at least" in text
    assert needed(topology(), LLAMA_8B, Batch(1, 1)).total > 100 * GIB


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [(0, 4, 4, 8), (1, 4, 4, 2), (2, 4, 1, 2), (3, 1 + 4 / 4, 1, 2)],
)
def test_each_zero_level_cuts_what_it_shares_out(zero, weights, gradients, optimizer):
    """Bytes a parameter in fp32 on four ranks; level 3 has one of the four layers gathered."""
    parameters = total_parameters(TINY)
    found = needed(topology(dp=4), TINY, Batch(1, 4), sharing=Sharing(zero=zero))
    expected = [weights * parameters, gradients * parameters, optimizer * parameters]
    assert [found.weights, found.gradients, found.optimizer] == [round(size) for size in expected]


def test_fp16_has_twenty_bytes_a_parameter_and_sixteen_of_them_are_shared_out():
    precision, parameters = Precision.of(fp16=True), total_parameters(TINY)
    found = needed(topology(dp=2), TINY, Batch(1, 2), precision=precision)
    assert found.weights + found.gradients == 4 * parameters
    assert found.optimizer == 16 * parameters / 2


def test_what_is_offloaded_is_counted_on_the_cpu_and_not_on_the_rank():
    plain = needed(topology(), TINY, Batch(1, 1))
    half = needed(topology(), TINY, Batch(1, 1), sharing=Sharing(optimizer_on_cpu=0.5))
    assert half.optimizer == half.on_cpu == plain.optimizer / 2
    layers = needed(topology(), TINY, Batch(1, 1), sharing=Sharing(layers_on_cpu=3))
    assert layers.activations == plain.activations // 4
    assert layers.on_cpu == plain.activations - layers.activations
    assert "on the CPU" in str(layers) and "on the CPU" not in str(plain)


def test_a_recomputed_module_is_kept_of_one_layer_only():
    def kept(*modules, shape=TINY):
        recompute = Recompute("selective", modules=modules)
        return needed(topology(), shape, Batch(1, 1), recompute=recompute).activations

    plain, mlp, normed = kept(), 4 * 256 * 688 * 3, 2 * 4 * 256 * 256
    assert kept("core_attn") == plain
    assert plain - kept("mlp") == 3 * mlp
    assert plain - kept("mlp", "layernorm") == 3 * (mlp + normed)
    moe = replace(TINY, num_experts=4, moe_ffn_hidden_size=344)
    assert kept("mlp", shape=moe) == kept(shape=moe)
    assert kept("moe", shape=moe) < kept("moe_act", shape=moe) < kept(shape=moe)
