"""The modelled peak of random jobs against rehearsals of Megatron's own model."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from benchmarks.random_jobs import random_jobs
from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.core_attention import CoreAttention
from megaplug.job.schema import Job
from megaplug.plan.rehearsal import RankRehearsal, compare, rehearse_all

SEED = 11
WITHIN = 0.02


def differences(numbers: Iterable[int], names: Iterable[str] = ()) -> dict[int | str, float]:
    """Modelled over rehearsed peak, less one, of random jobs and of `LONG`; state must be equal."""
    random = random_jobs(max(numbers, default=-1) + 1, SEED)
    jobs: dict[int | str, tuple[Job, int]] = {number: random[number][1:] for number in numbers}
    jobs |= {name: (compose_job([*SMALL, *LONG[name][1]]), LONG[name][0]) for name in names}
    found = {}
    # All at once: Megatron is imported once.
    for (number, (job, _)), rehearsed in zip(jobs.items(), rehearse_all(list(jobs.values())), strict=True):
        figures = {figure.name: figure for figure in compare(job, rehearsed)}
        assert figures["parameters"].difference == 0, number
        for name in ("weights", "gradients", "optimizer"):
            assert abs(figures[name].relative) < 1e-4, (number, name)
        found[number] = figures["peak"].relative
        if number == KEYS_OF_THE_LAST:
            assert_keys_arrive_as_planned(job, rehearsed)
    return found


def assert_keys_arrive_as_planned(job: Job, rehearsed: RankRehearsal) -> None:
    """Forward, forward again and backward; gradients go to the other rank only."""
    shape, topology = job_shape(job), resolve_topology(job)
    share = CoreAttention.of(job).received_share(shape, topology)
    own = 2 * 2 * shape.key_size * shape.seq_length // topology.cp
    (arrived,) = [each for each in rehearsed.traffic if (each.group, each.collective) == ("cp", "recv")]
    assert arrived.bytes == 3 * shape.num_layers * share * own


SMALL = [
    "model=tiny", "model.hidden_size=1024", "model.ffn_hidden_size=1024", "model.num_attention_heads=16",
    "model.num_query_groups=4", "model.vocab_size=1000", "model.seq_length=16384",
    "train.micro_batch_size=1", "train.global_batch_size=1", "train.loss_chunk_tokens=512",
]  # fmt: skip
FULL = ["train.recompute_granularity=full"]
CONTIGUOUS = ["attention=ring_dilated", "attention.params.token_layout=contiguous"]
# Of the ranks that share a sequence the one that has most: the first, and of contiguous tokens the last.
LONG = {
    "chunks of a large vocabulary": (0, ["precision=bf16", "model.vocab_size=128256"]),
    "chunks on tp2 x pp2, tied": (
        3,
        [
            "topology.tp=2",
            "topology.pp=2",
            "model.vocab_size=32000",
            "model.untie_embeddings_and_output_weights=false",
            "precision=bf16",
        ],
    ),
    "ring on cp2": (0, ["attention=ring", "topology.cp=2", "precision=bf16"]),
    "dilated on cp2, contiguous": (1, [*CONTIGUOUS, "topology.cp=2", "precision=bf16", *FULL]),
    "ring on cp2, layers computed again": (0, ["attention=ring", "topology.cp=2", "precision=bf16", *FULL]),
    "ring on cp4 in fp32": (0, ["attention=ring", "topology.cp=4", *FULL]),
    "dilated on cp4, layers computed again": (
        0,
        ["attention=ring_dilated", "topology.cp=4", "precision=bf16", *FULL],
    ),
    "contiguous ring on cp4": (
        3,
        ["attention=ring", CONTIGUOUS[1], "topology.cp=4", "precision=bf16", *FULL],
    ),
    "dilated on tp2 x cp2, two sequences": (
        0,
        [
            "attention=ring_dilated",
            "topology.cp=2",
            "topology.tp=2",
            "precision=bf16",
            "train.micro_batch_size=2",
            "train.global_batch_size=2",
        ],
    ),
    "dilated on one rank": (0, ["attention=dilated", "precision=bf16", *FULL]),
}
KEYS_OF_THE_LAST = "dilated on cp2, contiguous"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [12, pytest.param(50, marks=pytest.mark.soak)])
def test_peaks_of_random_jobs_are_within_two_percent(number: int):
    assert not {name: each for name, each in differences(range(number)).items() if abs(each) > WITHIN}


@pytest.mark.slow
def test_peaks_of_jobs_with_long_sequences_are_within_two_percent():
    assert not {name: each for name, each in differences(range(0), LONG).items() if abs(each) > WITHIN}
