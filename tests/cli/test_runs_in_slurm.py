"""Runs that were submitted: what is said of them and done with them, with little programs for SLURM's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_jobs import SMALL, write_corpus

from megaplug.commands import runs as command
from megaplug.commands import train
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock
from megaplug.runs.state import RunState, write_state
from megaplug.runs.submitted import Submitted, write_submitted


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs that were submitted, and SLURM's programs, which know what ``queue`` holds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    (tmp_path / "programs").mkdir()
    program("squeue", f"/bin/cat {tmp_path}/queue")
    program("scancel", f'echo "$@" >> {tmp_path}/cancelled')
    for name, jobs in (("one-1111aaaa", ("17", "18")), ("two-2222bbbb", ("19",))):
        folder = RunFolder(Path("runs") / name)
        folder.path.mkdir(parents=True)
        write_state(folder.state_file, RunState("stopped", 10, 10, 20, "saved after SIGUSR2"))
        write_submitted(folder, Submitted(jobs, "", "python launch/train.py", (), None, "train"))
    return tmp_path


def program(name: str, script: str) -> None:
    file = Path("programs") / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def statuses(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert command.main(["output=json"]) == 0
    return {run["run"]: run["status"] for run in json.loads(capsys.readouterr().out)["runs"]}


def test_a_run_that_waits_in_the_queue_is_queued(there, capsys):
    (there / "queue").write_text("17|PENDING|BeginTime\n18|PENDING|Dependency\n")
    assert statuses(capsys) == {"one-1111aaaa": "queued", "two-2222bbbb": "stopped"}
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert "job 17 PENDING (BeginTime)" in said and "job 18 PENDING (Dependency)" in said


def test_a_run_whose_launcher_lives_runs_whatever_the_queue_says(there, capsys):
    (there / "queue").write_text("19|RUNNING|None\n")
    folder = RunFolder(there / "runs" / "two-2222bbbb")
    with RunLock.acquire(folder):
        write_state(folder.state_file, RunState("running", 10, 10, 20))
        assert statuses(capsys)["two-2222bbbb"] == "running"


def test_without_slurm_here_runs_are_told_as_their_folders_say(there, capsys):
    (there / "programs" / "squeue").unlink()
    assert statuses(capsys) == {"one-1111aaaa": "stopped", "two-2222bbbb": "stopped"}


def test_a_run_that_does_not_say_its_jobs_hides_no_other_s(there, capsys):
    (there / "queue").write_text("19|PENDING|Priority\n")
    RunFolder(Path("runs/one-1111aaaa")).submitted_file.write_text("{")
    assert statuses(capsys) == {"one-1111aaaa": "stopped", "two-2222bbbb": "queued"}
    assert command.main([]) == 0
    assert "slurm.json does not say which jobs were submitted" in capsys.readouterr().out


def test_a_controller_that_does_not_answer_is_said_and_hides_no_run(there, capsys):
    program("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert statuses(capsys) == {"one-1111aaaa": "stopped", "two-2222bbbb": "stopped"}
    assert command.main([]) == 0
    assert "what is queued is not known: squeue does not answer: Unable to" in capsys.readouterr().out


def test_a_run_in_the_queue_is_not_removed_and_those_beside_it_are(there, capsys):
    (there / "queue").write_text("19|PENDING|Priority\n")
    assert command.main(["action=remove", "run=*", "yes=true"]) == 2
    said = capsys.readouterr().out
    assert "not deleted: runs/two-2222bbbb: runs/two-2222bbbb is in the queue: job 19 PENDING" in said
    assert "deleted: 1 run, " in said
    assert [path.name for path in Path("runs").iterdir()] == ["two-2222bbbb"]
    assert command.main(["action=remove", "run=two-2222bbbb", "yes=true"]) == 2
    assert "action=stop run=runs/two-2222bbbb" in capsys.readouterr().err


def test_stopping_takes_what_waits_out_of_the_queue_before_what_runs_is_ended(there, capsys):
    """Else the next of a chain would begin. What runs is told by the signal that cuts no save short."""
    (there / "queue").write_text("17|RUNNING|None\n18|PENDING|Dependency\n")
    program("scancel", f'echo "$@" >> {there}/cancelled; echo "17|COMPLETING|None" > {there}/queue')
    assert command.main(["action=stop", "run=one-1111aaaa"]) == 0
    assert (there / "cancelled").read_text() == "18\n--signal=TERM 17\n"
    assert "was only queued" in capsys.readouterr().out


def test_a_job_that_is_stopped_is_marked_until_it_has_ended(there):
    """Else SIGTERM would have it queued again."""
    (there / "queue").write_text("17|RUNNING|None\n")
    program("scancel", f"/bin/ls runs/one-1111aaaa > {there}/seen; : > {there}/queue")
    assert command.main(["action=stop", "run=one-1111aaaa"]) == 0
    assert "ended-17\n" in (there / "seen").read_text()
    assert not RunFolder(Path("runs/one-1111aaaa")).ended_file("17").exists()


def test_a_job_that_has_started_no_process_yet_is_cancelled(there, capsys):
    """No signal reaches anybody in a prolog or in slurm.setup, and the run would begin afterwards."""
    (there / "queue").write_text("19|RUNNING|None\n")
    is_told = f'echo "$@" >> {there}/cancelled; case "$1" in --signal=*) ;; *) : > {there}/queue;; esac'
    program("scancel", is_told)
    assert command.main(["action=stop", "run=two-2222bbbb"]) == 0
    assert (there / "cancelled").read_text() == "--signal=TERM 19\n19\n"
    assert (there / "queue").read_text() == ""


def test_a_job_that_slurm_does_not_let_go_is_named(there, capsys):
    (there / "queue").write_text("19|RUNNING|None\n")
    assert command.main(["action=stop", "run=two-2222bbbb"]) == 1
    assert "still there: 19 RUNNING" in capsys.readouterr().err


def test_a_run_that_another_command_has_queued_meanwhile_is_not_queued_twice(there, capsys, monkeypatch):
    """It is asked for before the lock, and once more under it."""
    write_corpus(there / "corpus")
    answers = [[{}], [{"17": "PENDING"}]]
    monkeypatch.setattr("megaplug.commands.submit.queues_of", lambda folders: answers.pop(0))
    words = [*SMALL, "data.path=corpus", "data.cache_dir=cache", "runs_dir=others", "device=cpu"]
    assert train.main([*words, "launch=slurm"]) == 2
    assert "is in the queue already: job 17 PENDING" in capsys.readouterr().err
