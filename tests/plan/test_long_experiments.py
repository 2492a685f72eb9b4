"""The experiments with a million tokens compose, fit the machines that they name, and are what they say."""

from __future__ import annotations

import functools

import pytest

from megaplug.job.checks import check, job_shape, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.core_attention import CoreAttention
from megaplug.job.schema import Job
from megaplug.plan.cluster import cluster_of
from megaplug.plan.plan import Plan, make_plan
from megaplug.plan.rehearsal import rehearsed_job
from megaplug.plan.workload import workload_of

NAMES = ("long_fast", "long_production", "long_conservative", "llama3_8b_1m")
MILLION = 1_048_576


@functools.cache
def job_of(name: str) -> Job:
    return compose_job([f"experiment={name}"])


@functools.cache
def plan_of(name: str) -> Plan:
    job = job_of(name)
    return make_plan(workload_of(job, resolve_topology(job), job_shape(job)), cluster_of(job.cluster))


def memory_used(name: str) -> float:
    """Of the usable memory of a GPU, the part that the plan takes."""
    plan = plan_of(name)
    return plan.fullest.memory.total / plan.cluster.usable_memory


def received(name: str) -> float:
    job = job_of(name)
    return CoreAttention.of(job).received_share(job_shape(job), resolve_topology(job))


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_and_fits_the_gpus_that_it_names(name):
    job = job_of(name)
    assert not check(job, device="cuda")
    assert job.model.seq_length == MILLION
    assert plan_of(name).spare_memory > 0
    assert plan_of(name).time is not None
    # Every token is read by a head in every branch: there are as many groups as the largest rate.
    assert max(job.attention.params["dilation_rates"]) <= job.model.num_query_groups


@pytest.mark.parametrize("name", NAMES)
def test_without_chunks_the_logits_are_many_times_larger(name):
    job = job_of(name)
    whole = compose_job([f"experiment={name}", "train.loss_chunk_tokens=null"])
    topology, shape = resolve_topology(job), job_shape(job)
    logits = [
        make_plan(workload_of(each, topology, shape), cluster_of(job.cluster)).fullest.memory.logits
        for each in (job, whole)
    ]
    assert logits[1] >= 30 * logits[0]


def test_fast_computes_nothing_twice_and_sends_no_keys():
    job = job_of("long_fast")
    assert job.train.recompute_granularity is None
    assert job.train.recompute_modules is None
    assert received("long_fast") == 0
    assert plan_of("long_fast").time.cp == 0
    again = compose_job(["experiment=long_fast", "train.recompute_granularity=full"])
    sizes = resolve_topology(again), job_shape(again)
    slower = make_plan(workload_of(again, *sizes), cluster_of(again.cluster))
    assert plan_of("long_fast").time.total < slower.time.total


@pytest.mark.parametrize("name", ["long_production", "llama3_8b_1m"])
def test_a_model_for_use_sees_the_whole_sequence_and_has_memory_to_spare(name):
    job = job_of(name)
    assert max(job.attention.params["segment_lengths"]) == MILLION
    assert received(name) > 0
    assert job.train.recompute_granularity == "full"
    assert memory_used(name) < (0.5 if name == "long_production" else 0.75)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_rehearsed_is_that_attention(name):
    assert rehearsed_job(job_of(name)).attention == job_of(name).attention


def test_production_survives_and_is_watched():
    job = job_of("long_production")
    assert job.watch.max_restarts > 0
    assert job.checkpoint.save_interval <= job.train.iters / 4
    assert job.checkpoint.keep > 1
    assert job.resilience.check_for_spiky_loss
    assert job.attention.sub_layer_norm


def test_conservative_needs_least_and_loses_least():
    job, others = job_of("long_conservative"), [job_of(name) for name in ("long_fast", "long_production")]
    assert memory_used("long_conservative") < 0.5
    assert all(
        plan_of("long_conservative").fullest.memory.total < plan_of(name).fullest.memory.total / 3
        for name in ("long_fast", "long_production")
    )
    assert all(job.topology.cp > other.topology.cp for other in others)
    assert job.checkpoint.save_interval < min(other.checkpoint.save_interval or 100 for other in others)
    assert job.watch.max_restarts > max(other.watch.max_restarts for other in others)
