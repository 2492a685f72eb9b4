"""What must hold for any constants: more work is never faster, a better machine never slower."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from megaplug.job.flops import training_flops_per_token
from megaplug.plan.cluster import cluster_preset
from megaplug.plan.step_time import StepTime, constants_for, step_time
from megaplug.plan.workload import Implementation, Overlaps, Precision, Recompute, Sharing, Workload
from megaplug.topology import Batch, ModelShape, Topology

H100 = cluster_preset("h100")
SHAPE = ModelShape(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
    kv_channels=None, seq_length=4096, vocab_size=128256,
)  # fmt: skip
EXPERTS = replace(SHAPE, num_experts=64, moe_ffn_hidden_size=2048, moe_router_topk=4)


def workload(shape=SHAPE, micro=1, batch=128, recompute=None, **sizes) -> Workload:
    grid = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "etp": 1, "dp": 8} | sizes
    grid.setdefault("sequence_parallel", grid["tp"] > 1)
    world = grid["tp"] * grid["pp"] * grid["cp"] * grid["dp"]
    return Workload(
        Topology(world_size=world, **grid),
        shape,
        Batch(micro, batch),
        precision=Precision.of(bf16=True),
        recompute=recompute or Recompute(),
    )


def seconds(job: Workload, cluster=H100) -> float:
    return step_time(job, cluster).total


CASES = {
    "dense": workload(),
    "tp": workload(tp=8, dp=4),
    "pipeline": workload(tp=2, pp=4, vpp=4),
    "context": workload(cp=4, dp=2),
    "experts": workload(EXPERTS, ep=8),
    "experts across nodes": workload(EXPERTS, ep=32, dp=32),
    "full recompute": workload(tp=4, pp=2, recompute=Recompute("full", "uniform", 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_parts_are_finite_not_negative_and_make_the_step(case):
    found = step_time(CASES[case], H100)
    parts = [found.compute, found.tp, found.cp, found.ep, found.pp, found.bubble, found.dp, found.optimizer]
    assert all(0 <= part < float("inf") for part in parts)
    assert found.compute > 0
    assert found.total == pytest.approx(sum(parts))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "field", ["hidden_size", "ffn_hidden_size", "seq_length", "vocab_size", "num_layers"]
)
def test_a_larger_model_is_never_faster(case, field):
    job = CASES[case]
    if field == "ffn_hidden_size" and job.shape.is_moe:
        pytest.skip("its experts have a size of their own")
    larger = replace(job.shape, **{field: 2 * getattr(job.shape, field)})
    assert seconds(replace(job, shape=larger)) > seconds(job)


@pytest.mark.parametrize("case", CASES)
def test_a_better_machine_is_never_slower(case):
    job = CASES[case]
    peaks = {name: 2 * peak for name, peak in H100.peak_flops.items()}
    faster = [
        replace(H100, peak_flops=peaks),
        replace(H100, memory_bandwidth=2 * H100.memory_bandwidth),
        replace(H100, link_bandwidth=2 * H100.link_bandwidth),
        replace(H100, network_bandwidth=2 * H100.network_bandwidth),
        replace(H100, link_domain=64),
    ]
    assert seconds(job, faster[0]) < seconds(job)
    assert all(seconds(job, machine) <= seconds(job) * (1 + 1e-12) for machine in faster)


@pytest.mark.parametrize("case", CASES)
def test_no_more_is_computed_than_the_rate_of_products_allows(case):
    job = CASES[case]
    flops = training_flops_per_token(job.shape, vocab_size=job.shape.padded_vocab_size(job.topology.tp))
    reached = flops * job.tokens_per_step / seconds(job) / job.topology.world_size
    assert reached < constants_for(H100, "bf16").gemm_efficiency * H100.peak_flops["bf16"]


@pytest.mark.parametrize("case", CASES)
def test_more_replicas_with_as_much_work_each_make_more_tokens_a_second_and_less_than_in_proportion(case):
    job = CASES[case]
    found = []
    for times in (1, 2, 8, 64):
        size = replace(job.topology, dp=times * job.topology.dp, world_size=times * job.topology.world_size)
        batch = Batch(job.batch.micro_batch_size, times * job.batch.global_batch_size)
        found.append((times, times / seconds(replace(job, topology=size, batch=batch))))
    for (few, slower), (many, faster) in pairwise(found):
        assert slower < faster <= slower * many / few * 1.02  # the optimizer's part of a rank gets smaller


@pytest.mark.parametrize("dispatch", [{}, {"tokens_sent_once": True}])
def test_a_better_machine_is_never_slower_for_any_dispatch_of_tokens(dispatch):
    job = replace(CASES["experts across nodes"], code=Implementation(**dispatch))
    links = [replace(H100, link_bandwidth=factor * H100.link_bandwidth) for factor in (0.1, 0.5, 1, 2)]
    adapters = [
        replace(H100, network_bandwidth=factor * H100.network_bandwidth) for factor in (0.1, 0.5, 1, 2)
    ]
    for machines in (links, adapters):
        times = [seconds(job, machine) for machine in machines]
        assert times == sorted(times, reverse=True)
    once = replace(job, code=Implementation(tokens_sent_once=True))
    assert step_time(once, H100).ep <= step_time(job, H100).ep


def test_tensor_parallelism_inside_a_node_costs_less_than_across():
    job, in_two = workload(tp=8, dp=2), replace(H100, gpus_per_node=4, link_domain=4)
    assert step_time(job, in_two).tp > 2 * step_time(job, H100).tp
    assert step_time(workload(tp=16, dp=1), H100).tp > 1.5 * step_time(job, H100).tp


def test_a_bubble_is_a_smaller_part_with_more_microbatches_and_with_virtual_stages():
    def part(found: StepTime) -> float:
        return found.bubble / found.total

    few = part(step_time(workload(pp=4, batch=64), H100))
    many = part(step_time(workload(pp=4, batch=512), H100))
    interleaved = part(step_time(workload(pp=4, vpp=4, batch=64), H100))
    assert many < few / 4
    assert interleaved < few / 2


def test_time_grows_with_layers_and_with_the_batch_as_they_do():
    half = seconds(workload(replace(SHAPE, num_layers=64)))
    assert seconds(workload(replace(SHAPE, num_layers=128))) / half == pytest.approx(2, rel=0.05)
    assert seconds(workload(batch=1024)) / seconds(workload(batch=512)) == pytest.approx(2, rel=0.02)


def test_full_recompute_costs_most_of_a_third():
    plain = workload(batch=512)
    again = replace(plain, recompute=Recompute("full", "uniform", 1))
    assert 1.2 < seconds(again) / seconds(plain) < 1.36
    half = replace(plain, recompute=Recompute("full", "block", 16))
    assert seconds(plain) < seconds(half) < seconds(again)


def test_overlap_hides_and_no_overlap_shows():
    hidden = workload(tp=4, dp=64, pp=2, vpp=4, batch=512)
    shown = replace(hidden, overlaps=Overlaps(grad_reduce=False, param_gather=False, p2p=False))
    assert step_time(shown, H100).dp > step_time(hidden, H100).dp
    assert step_time(shown, H100).pp > step_time(hidden, H100).pp
    assert step_time(replace(hidden, overlaps=Overlaps(tp=True)), H100).tp < step_time(hidden, H100).tp


def test_sharing_weights_gathers_them_for_every_microbatch():
    job = workload(dp=64, batch=512)
    assert step_time(replace(job, sharing=Sharing(zero=3)), H100).dp > step_time(job, H100).dp


def test_a_format_that_the_machine_has_no_peak_for_is_an_error():
    from megaplug.errors import UserError

    job = replace(workload(), precision=Precision.of(fp8=True))
    with pytest.raises(UserError, match="does not compute in fp8"):
        step_time(job, cluster_preset("a100_80gb"))
