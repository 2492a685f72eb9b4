"""Time and FLOPs of a plan know what attention computes and sends."""

from __future__ import annotations

import pytest

from megaplug.commands.notes import time_notes
from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.core_attention import CoreAttention
from megaplug.layers.attention.describe import Sizes, describe
from megaplug.plan.cluster import cluster_of
from megaplug.plan.plan import Plan, make_plan
from megaplug.plan.search.clock import Clock
from megaplug.plan.workload import workload_of

BASE = [
    "model=llama3_8b", "model.seq_length=131072", "precision=bf16", "topology.cp=4", "cluster=h100",
    "train.micro_batch_size=1", "train.global_batch_size=1",
]  # fmt: skip
LENGTHS, RATES = [8192, 32768, 131072], [1, 2, 4]
DILATED = [
    "attention=ring_dilated",
    f"attention.params.segment_lengths={LENGTHS}".replace(" ", ""),
    f"attention.params.dilation_rates={RATES}".replace(" ", ""),
]
CONTIGUOUS = ["attention.params.token_layout=contiguous"]


def plan_of(*words: str) -> Plan:
    job = compose_job([*BASE, *words])
    return make_plan(workload_of(job, resolve_topology(job), job_shape(job)), cluster_of(job.cluster))


def shares(*words: str) -> tuple[float, float]:
    """Pairs and received keys, over those of dense attention and over a rank's own."""
    job = compose_job([*BASE, *words])
    shape, topology = job_shape(job), resolve_topology(job)
    attention = CoreAttention.of(job)
    return attention.pairs_share(shape, topology), attention.received_share(shape, topology)


def told(layout: str) -> dict:
    sizes = Sizes(131072, 32, 8, 128)
    return describe(sizes, LENGTHS, RATES, num_ranks=4, layout=layout)


def test_dense_attention_counts_as_before():
    assert shares("attention=te") == pytest.approx((1.0, 3.0))
    # The first rank of zigzag has the last tokens, too, and reads all keys of the others.
    assert shares("attention=ring") == pytest.approx((1.0, 3.0), rel=1e-4)
    te, ring = plan_of("attention=te"), plan_of("attention=ring")
    assert ring.time.cp == pytest.approx(te.time.cp)
    assert ring.flops_per_token == te.flops_per_token


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_what_is_received_is_what_describe_tells(layout):
    _, received = shares(*DILATED, f"attention.params.token_layout={layout}")
    own = 2 * 8 * 128 * 2 * 131072 // 4
    assert received * own == told(layout)["received_bytes"]["largest"]


def test_dilated_attention_is_faster_by_what_it_leaves_out():
    dense, dilated = plan_of("attention=ring"), plan_of(*DILATED)
    job = compose_job([*BASE, *DILATED])
    pairs = CoreAttention.of(job).pairs_of_all(job_shape(job))
    assert 1 / pairs == pytest.approx(told("zigzag")["dense_over_dilated"], rel=1e-3)
    assert dilated.time.total < dense.time.total / 1.5
    attention = dense.flops_per_token["causal"] - dilated.flops_per_token["causal"]
    assert attention == pytest.approx((1 - pairs) * 3 * 2 * 131073 * 4096 * 2 / 2 * 32)


def test_contiguous_tokens_wait_for_the_last_rank():
    even, uneven = shares(*DILATED), shares(*DILATED, *CONTIGUOUS)
    assert uneven[0] > even[0]
    assert uneven[1] < even[1]


def test_layers_of_several_attentions_are_averaged():
    words = ["attention=ring", "attention.pattern=[ring,ring,ring,ring_dilated]"]
    words += [f"attention.pattern_params.ring_dilated.segment_lengths={LENGTHS}".replace(" ", "")]
    words += [f"attention.pattern_params.ring_dilated.dilation_rates={RATES}".replace(" ", "")]
    dense, dilated, mixed = shares("attention=ring"), shares(*DILATED), shares(*words)
    for all_dense, all_dilated, found in zip(dense, dilated, mixed, strict=True):
        assert found == pytest.approx((3 * all_dense + all_dilated) / 4)


def test_the_error_of_step_times_is_not_that_of_attentions_that_were_never_timed():
    dense, ring, dilated = (plan_of(*words) for words in (["attention=te"], ["attention=ring"], DILATED))
    assert dense.time is not None and dense.time.error is not None and time_notes(dense) == []
    for plan, name in ((ring, "ring"), (dilated, "ring_dilated")):
        assert plan.time is not None and plan.time.error is None
        assert f"no step time was measured with attention={name}:" in time_notes(plan)[0]
    clocks = [Clock(plan.cluster, plan.workload) for plan in (dense, dilated)]
    assert [clock.error for clock in clocks] == [dense.time.error, None]
