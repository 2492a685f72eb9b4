"""The picture of several runs: its lines."""

from __future__ import annotations

import random
import statistics
import time

import pytest

from megaplug.runs.comparison import smoothed


@pytest.mark.parametrize("steps", [0, 1, 60, 240])
def test_a_loss_is_smoothed_over_a_fiftieth_of_its_run(steps):
    chance = random.Random(1)
    losses = [chance.uniform(2, 9) for _ in range(steps)]
    window = max(1, steps // 50)
    means = [statistics.fmean(losses[max(0, end - window) : end]) for end in range(1, steps + 1)]
    assert smoothed(losses) == pytest.approx(means, rel=1e-12)


def test_the_steps_of_a_long_run_are_smoothed_at_once():
    begun = time.process_time()
    assert len(smoothed([3.0] * 300_000)) == 300_000
    assert time.process_time() - begun < 2.0
