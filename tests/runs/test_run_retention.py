"""Which checkpoints stay: the newest, those of every so many steps, the best; and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megaplug.runs.checkpoints import SAVING, Checkpoint, list_checkpoints
from megaplug.runs.retention import Retention, kept, prune, validation_losses

STEPS = range(10, 110, 10)
ALL = [Checkpoint(Path(f"iter_{step:07d}"), step) for step in STEPS]
# Validated every 20 steps.
LOSSES = {20: 3.0, 40: 1.5, 60: 2.0, 80: 1.5, 100: 2.5}


def steps(policy: Retention, losses: dict[int, float] | None = None) -> list[int]:
    return [found.iteration for found in kept(ALL[::-1], LOSSES if losses is None else losses, policy)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Retention(1), [100]),
        (Retention(3), [80, 90, 100]),
        (Retention(20), list(STEPS)),
        (Retention(1, keep_every=30), [30, 60, 90, 100]),
        (Retention(1, keep_every=1), list(STEPS)),
        (Retention(1, keep_every=7), [70, 100]),
        # Equal ones: the later is the better.
        (Retention(1, keep_best=1), [80, 100]),
        (Retention(1, keep_best=2), [40, 80, 100]),
        (Retention(1, keep_best=4), [40, 60, 80, 100]),
        # There are five with a loss: a sixth is not made of one without.
        (Retention(1, keep_best=6), [20, 40, 60, 80, 100]),
        (Retention(2, keep_every=50, keep_best=1), [50, 80, 90, 100]),
    ],
)
def test_each_wish_keeps_what_it_names(policy: Retention, expected: list[int]) -> None:
    assert steps(policy) == expected


def test_a_loss_that_is_no_number_is_not_the_best_and_none_at_all_keeps_the_newest() -> None:
    assert steps(Retention(1, keep_best=1), {20: math.nan, 40: math.inf}) == [40, 100]
    assert steps(Retention(2, keep_best=3), {}) == [90, 100]


def test_the_loss_is_that_of_the_validation_split_as_a_whole(tmp_path: Path) -> None:
    lines = [
        {"iteration": 20, "loss": 0.1},
        {"iteration": 20, "valid_loss": 3.0, "split": "valid"},
        {"iteration": 20, "valid_loss": 0.5, "split": "valid", "source": "code"},
        {"iteration": 20, "valid_loss": 0.2, "split": "test"},
        {"iteration": 40, "valid_loss": 2.0, "split": "valid"},
        # It was no number.
        {"iteration": 60, "valid_loss": None, "split": "valid"},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert validation_losses(metrics) == {20: 3.0, 40: 2.0}


def test_prune_removes_what_is_not_kept(tmp_path: Path) -> None:
    for found in ALL:
        (tmp_path / found.path).mkdir()
        (tmp_path / found.path / "__0_0.distcp").write_text("weights")
    policy = Retention(1, keep_every=50, keep_best=1)
    assert [gone.iteration for gone in prune(tmp_path, policy, LOSSES)] == [10, 20, 30, 40, 60, 70, 90]
    assert [found.iteration for found in list_checkpoints(tmp_path)] == [50, 80, 100]
    assert prune(tmp_path, policy, LOSSES) == []
    assert list((tmp_path / SAVING).iterdir()) == []


@pytest.mark.parametrize(
    ("policy", "number"),
    [
        (Retention(2), 3),
        (Retention(2, keep_best=3), 6),
        # Those of steps 100, 200, 300.
        (Retention(2, keep_every=100), 6),
        (Retention(2, keep_every=20), 6),
        # No more than are ever saved, and one that a signal saved.
        (Retention(50), 8),
    ],
)
def test_how_many_there_are_at_once(policy: Retention, number: int) -> None:
    assert policy.at_once(50, 350) == number
