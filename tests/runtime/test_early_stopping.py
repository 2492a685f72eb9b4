"""A run whose validations get no better ends with a checkpoint, on all ranks, wherever it was continued."""

from __future__ import annotations

import pytest
from small_jobs import SmallJobs, state, steps, validations

from megaplug.runs.checkpoints import list_checkpoints

# Nothing is better by 9 nats than the first validation: the run ends at the third.
WORDS = [
    "train.iters=12",
    "train.micro_batch_size=4",
    "train.eval_iters=1",
    "train.eval_interval=2",
    "checkpoint.save_interval=5",
    "train.early_stop_patience=2",
    "train.early_stop_min_delta=9",
]


@pytest.mark.slow
def test_it_ends_with_a_checkpoint_and_says_why(small_jobs: SmallJobs) -> None:
    folder = small_jobs.run([*WORDS, "name=early", "topology.pp=2"])
    found = state(folder)
    assert (found.status, found.iteration, found.saved_iteration) == ("finished", 6, 6)
    best = validations(folder)[0][1]
    assert found.reason == f"early stop: 2 validations, none better by at least 9 than {best:.4f} at step 2"
    assert [iteration for iteration, _ in validations(folder)] == [2, 4, 6]
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [5, 6]


def test_the_count_goes_on_where_the_run_does(small_jobs: SmallJobs) -> None:
    words = [*WORDS, "name=early_resumed"]
    folder = small_jobs.run([*words, "train.stop_at=5"])
    assert (state(folder).status, state(folder).iteration) == ("stopped", 5)
    assert small_jobs.run(words) == folder
    assert (state(folder).status, state(folder).iteration) == ("finished", 6)
    assert [line["iteration"] for line in steps(folder)] == list(range(1, 7))
