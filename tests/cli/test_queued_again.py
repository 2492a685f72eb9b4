"""Whether a run that was stopped in a batch job is queued again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaplug.commands.requeue import queue_again
from megaplug.launchers.slurm import REQUEUE
from megaplug.launchers.verdict import AT_ONCE, Outcome
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import append_event
from megaplug.runs.submitted import Submitted, mark_ended, write_submitted


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that has begun twice, the second time further on."""
    monkeypatch.setenv(REQUEUE, str(tmp_path / "requeue"))
    found = RunFolder(tmp_path)
    for step in (0, 20):
        append_event(found.events_file, {"event": "start", "iteration": step})
    return found


def stopped(signal: str, saved: int, **more: str) -> Outcome:
    return Outcome("stopped", saved, saved, "saved", signal=signal, **more)


@pytest.mark.parametrize("signal", ["SIGUSR2", "SIGTERM"])
def test_what_a_scheduler_has_stopped_is_queued_again(folder, signal):
    assert "queued again" in queue_again(stopped(signal, 30), folder, 20)
    assert (folder.path / "requeue").read_text() == "saved\n"


@pytest.mark.parametrize(
    "outcome",
    [
        stopped("SIGINT", 30),
        stopped("SIGTERM", 30, kind=AT_ONCE),
        Outcome("finished", 30, 30),
        Outcome("failed", 30, 30, signal="SIGTERM"),
        Outcome("stopped", 30, 30, "train.stop_at"),
    ],
)
def test_what_has_ended_otherwise_is_not(folder, outcome):
    assert queue_again(outcome, folder, 20) == ""
    assert not (folder.path / "requeue").exists()


@pytest.mark.parametrize(
    ("job", "variables"),
    [
        ("17", {"SLURM_JOB_ID": "17"}),
        ("17_3", {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}),
    ],
)
def test_a_job_that_a_person_has_ended_is_not_and_the_next_one_is(folder, monkeypatch, job, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    mark_ended(folder, [job])
    assert "not queued again" in queue_again(stopped("SIGUSR2", 30), folder, 20)
    assert not (folder.path / "requeue").exists()
    write_submitted(folder, Submitted((job,), "", "python launch/train.py", (), None, "train"))
    assert "is queued again" in queue_again(stopped("SIGTERM", 30), folder, 20)


def test_a_run_outside_of_a_batch_job_is_not(folder, monkeypatch):
    monkeypatch.delenv(REQUEUE)
    assert queue_again(stopped("SIGUSR2", 30), folder, 20) == ""


def test_a_run_that_was_stopped_before_its_first_save_has_a_second_chance(folder):
    assert "is queued again" in queue_again(stopped("SIGUSR2", 20), folder, 20)


def test_a_run_that_twice_has_saved_nothing_is_not_queued_for_ever(folder):
    append_event(folder.events_file, {"event": "start", "iteration": 20})
    assert "nothing was saved beyond step 20" in queue_again(stopped("SIGUSR2", 20), folder, 20)
    assert not (folder.path / "requeue").exists()
    assert "is queued again" in queue_again(stopped("SIGUSR2", 25), folder, 20)
