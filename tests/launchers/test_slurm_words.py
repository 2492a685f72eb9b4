"""SLURM's commands, answered by little programs in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaplug.errors import UserError
from megaplug.launchers import slurm


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are the only ones that are found, but for the shell's own."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(place: Path, name: str, script: str) -> None:
    file = place / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_the_number_of_a_job_is_what_sbatch_prints_first(programs):
    program(programs, "sbatch", 'echo "$@" > "$(dirname "$0")/asked"; echo "17;cluster"')
    assert slurm.submit(Path("x y.sbatch"), ["--hold"]) == "17"
    assert (programs / "asked").read_text() == "--parsable --hold x y.sbatch\n"


def test_what_sbatch_refuses_is_said_in_its_words(programs):
    program(programs, "sbatch", 'echo "sbatch: error: no such partition" >&2; exit 1')
    with pytest.raises(UserError, match="SLURM refuses the job: no such partition"):
        slurm.submit(Path("job.sbatch"))


def test_a_machine_without_slurm_says_what_can_be_done(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here") as error:
        slurm.submit(Path("job.sbatch"))
    assert "launch.submit=false" in error.value.hint


def test_jobs_that_have_not_ended_are_told_with_their_state(programs):
    program(programs, "squeue", 'echo "17|PENDING|Priority"; echo "18_3|RUNNING|None"')
    assert slurm.queued(["17", "18", "19"]) == {"17": "PENDING (Priority)", "18_3": "RUNNING"}


def test_a_job_that_slurm_has_forgotten_has_ended(programs):
    program(programs, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert slurm.queued(["17"]) == {}
    assert slurm.queued([]) == {}


def test_a_controller_that_does_not_answer_is_no_empty_queue(programs):
    program(
        programs, "squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'
    )
    with pytest.raises(UserError, match="Unable to contact"):
        slurm.queued(["17"])


def test_a_task_of_a_step_knows_its_node_and_nothing_else_does():
    assert slurm.node_of_step({"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2"}) == (4, 2)
    assert slurm.node_of_step({"SLURM_NNODES": "4"}) is None
