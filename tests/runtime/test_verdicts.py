"""What a run says of its end, where Megatron's exit code would say something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ranks import RanksFailed, run_ranks
from small_jobs import SmallJobs, run_rank, state, validations

from megaplug.job.freeze import read_frozen, write_frozen
from megaplug.runs.checkpoints import TRACKER, list_checkpoints
from megaplug.runs.state import RunState, write_state

SHORT = ["train.iters=4", "lr=constant", "checkpoint.save_interval=3"]


def test_a_run_that_megatron_gives_up_has_failed(small_jobs: SmallJobs, tmp_path: Path) -> None:
    """Without its tracker Megatron exits with 0 before the first step."""
    words = [*SHORT, "name=given_up"]
    small_jobs.run([*words, "train.stop_at=2"])
    folder, _ = small_jobs.freeze(words)
    (folder.checkpoints / TRACKER).unlink()
    with pytest.raises(RanksFailed, match="Megatron ended by itself"):
        run_ranks(1, run_rank, str(folder.job_file), frozenset(), None, folder=tmp_path)
    assert state(folder).status == "failed"


def test_a_run_killed_in_its_last_validation_keeps_its_last_checkpoint(small_jobs: SmallJobs) -> None:
    """It is validated again, and neither saved over nor recorded twice."""
    words = [*SHORT, "name=last_validation", "train.eval_iters=1", "train.eval_interval=2"]
    folder = small_jobs.run(words)
    before = {file: file.stat().st_mtime_ns for file in folder.checkpoints.rglob("*") if file.is_file()}
    recorded = validations(folder)
    write_state(folder.state_file, RunState("running", iteration=4, iters=4))
    assert small_jobs.run(words) == folder
    assert state(folder).status == "finished"
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert validations(folder) == recorded
    assert [iteration for iteration, _ in recorded] == [2, 4]
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [3, 4]


def test_a_job_frozen_for_cuda_is_refused_where_there_is_none(small_jobs: SmallJobs, tmp_path: Path) -> None:
    folder, _ = small_jobs.freeze([*SHORT, "name=for_cuda"])
    frozen = read_frozen(folder.job_file)
    write_frozen(dataclasses.replace(frozen, derived=dataclasses.replace(frozen.derived, device="cuda")))
    with pytest.raises(RanksFailed, match="the job is for CUDA"):
        run_ranks(1, run_rank, str(folder.job_file), frozenset(), None, folder=tmp_path)
