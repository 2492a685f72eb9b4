"""``load=`` as a person types it: weights of one rank train on under tensor and pipeline parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_command import Live, only_run
from small_jobs import SmallJobs, curve, state


@pytest.mark.slow
def test_the_weights_of_one_rank_train_on_under_tp2_pp2(small_jobs: SmallJobs, tmp_path: Path) -> None:
    constant = ["lr=constant", "lr.lr=1e-3"]
    source = small_jobs.run([*constant, "name=source", "train.iters=10"])
    again = [*constant, "train.iters=3", f"load={source.path}"]
    # The same data from its start, on one rank: what the four must find, too.
    right = curve(small_jobs.run([*again, "name=one_rank"]))
    words = [
        *small_jobs.words([*again, "name=four_ranks", "topology=tp2_pp2"]),
        f"runs_dir={tmp_path / 'runs'}",
    ]
    words.remove(f"runs_dir={small_jobs.root / 'runs'}")
    with Live(words) as live:
        assert live.end() == 0, live.stderr()
    assert live.of("header")[0]["starts_from"] == f"the weights of {source.checkpoints / 'iter_0000010'}"
    folder = only_run(tmp_path / "runs")
    assert (state(folder).status, state(folder).iteration) == ("finished", 3)
    pairs = zip(sum(curve(folder), ()), sum(right, ()), strict=True)
    assert max(abs(one - other) / abs(other) for one, other in pairs) < 1e-4
    assert right[0][0] < curve(source)[0][0] - 0.5
