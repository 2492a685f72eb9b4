"""The modelled peak of random jobs against rehearsals of Megatron's own model."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from benchmarks.random_jobs import random_jobs
from megaplug.job.compose import compose_job
from megaplug.plan.rehearsal import compare, rehearse_all

SEED = 11
WITHIN = 0.02


def differences(numbers: range) -> dict[int, float]:
    """Modelled over rehearsed peak, less one, by the job's number; state must be equal."""
    jobs = random_jobs(numbers.stop, SEED)[numbers.start :]
    found = {}
    rehearsals = rehearse_all([(job, rank) for _, job, rank in jobs])
    for number, (_, job, _), rehearsed in zip(numbers, jobs, rehearsals, strict=True):
        figures = {figure.name: figure for figure in compare(job, rehearsed)}
        assert figures["parameters"].difference == 0, number
        for name in ("weights", "gradients", "optimizer"):
            assert abs(figures[name].relative) < 1e-4, (number, name)
        found[number] = figures["peak"].relative
    return found


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
FEW = ("chunks on tp2 x pp2, tied", "dilated on cp2, contiguous")


def long_differences(names: Iterable[str]) -> dict[str, float]:
    """As `differences`, of jobs with long sequences."""
    jobs = [(compose_job([*SMALL, *LONG[name][1]]), LONG[name][0]) for name in names]
    found = {}
    for name, (job, _), rehearsed in zip(names, jobs, rehearse_all(jobs), strict=True):
        figures = {figure.name: figure for figure in compare(job, rehearsed)}
        assert figures["parameters"].difference == 0, name
        found[name] = figures["peak"].relative
    return found


def test_peaks_of_some_random_jobs_are_within_two_percent():
    assert max(abs(each) for each in differences(range(2)).values()) <= WITHIN


def test_peaks_with_chunks_and_over_ranks_of_a_sequence_are_within_two_percent():
    assert max(abs(each) for each in long_differences(FEW).values()) <= WITHIN


@pytest.mark.slow
def test_all_peaks_with_chunks_and_over_ranks_of_a_sequence_are_within_two_percent():
    assert not {name: each for name, each in long_differences(LONG).items() if abs(each) > WITHIN}


@pytest.mark.slow
def test_peaks_of_fifty_random_jobs_are_within_two_percent():
    assert not {number: each for number, each in differences(range(50)).items() if abs(each) > WITHIN}
