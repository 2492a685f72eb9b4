"""What a run's folder is brought into order for before its ranks start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megaplug.commands import readiness


@pytest.mark.parametrize(
    ("iteration", "interval", "batches", "kept"),
    [
        (20, 10, 5, None),  # steps are left, after which all is validated anyway
        (30, 10, 5, 1),
        (30, 8, 5, 0),
        (30, 10, 0, 0),
    ],
)
def test_a_run_at_its_last_step_keeps_the_validation_of_the_interval(
    iteration, interval, batches, kept, monkeypatch, tmp_path
):
    """And not the one at its end, which comes again."""
    cut: list[tuple[Any, ...]] = []
    monkeypatch.setattr(readiness.metrics, "cut_tensorboard", lambda *words: cut.append(words))
    monkeypatch.setattr(readiness, "_freeze", lambda *words, **more: None)
    resolved: Any = SimpleNamespace(
        derived=SimpleNamespace(iters=30, eval_interval=interval, eval_iters=batches),
        job=SimpleNamespace(train=SimpleNamespace(global_batch_size=4)),
    )
    report: Any = SimpleNamespace(newest=SimpleNamespace(iteration=iteration))
    readiness.make_ready(resolved, readiness.RunFolder(tmp_path), report)
    assert cut == [(tmp_path / "tensorboard", iteration, 4 * iteration, kept)]


@pytest.mark.parametrize(("device", "is_kept"), [("cpu", True), ("cuda", False)])
def test_ranks_on_a_cpu_keep_memory_that_was_freed(device, is_kept, monkeypatch, tmp_path):
    monkeypatch.setattr(readiness, "keeping_freed_memory", lambda environment: {"HEAP": "kept"})
    job: Any = SimpleNamespace(device=device, logging=SimpleNamespace(wandb_project=None))
    environment = readiness.rank_environment(job, readiness.RunFolder(tmp_path))
    assert ("HEAP" in environment) == is_kept
