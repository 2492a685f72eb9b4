"""The modelled peak of random jobs against rehearsals of Megatron's own model."""

from __future__ import annotations

import pytest

from benchmarks.random_jobs import random_jobs
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


def test_peaks_of_some_random_jobs_are_within_two_percent():
    assert max(abs(each) for each in differences(range(2)).values()) <= WITHIN


@pytest.mark.slow
def test_peaks_of_fifty_random_jobs_are_within_two_percent():
    assert not {number: each for number, each in differences(range(50)).items() if abs(each) > WITHIN}
