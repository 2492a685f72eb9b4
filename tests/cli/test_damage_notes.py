"""What a person is told of checkpoints that are not whole, before the ranks start and at the end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megaplug.commands.cli import parse
from megaplug.commands.next_command import next_command
from megaplug.commands.readiness import repair_notes
from megaplug.launchers.verdict import Outcome
from megaplug.runs.checkpoints import list_checkpoints, repair
from megaplug.runs.folder import RunFolder
from megaplug.runs.manifest import write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with three checkpoints, and none of them whole."""
    run = RunFolder(tmp_path / "run")
    for step in (10, 20, 30):
        (run.checkpoints / f"iter_{step:07d}").mkdir(parents=True)
    return run


def test_that_none_is_whole_is_told_aloud_with_where_they_are(folder):
    *_, loud, remedy = repair_notes(repair(folder.checkpoints), None)
    assert loud.startswith("ATTENTION: none of the 3 checkpoints is whole: the run STARTS FROM THE BEGINNING")
    assert loud.endswith(str(folder.checkpoints / "set_aside")) and "load=COPY load_state=all" in remedy
    assert repair_notes(repair(folder.checkpoints), None) == []


def test_a_run_that_took_over_another_s_state_begins_there_again(folder):
    source = SimpleNamespace(checkpoint=SimpleNamespace(path=Path("other/iter_0000007")))
    (loud,) = [text for text in repair_notes(repair(folder.checkpoints), source) if "ATTENTION" in text]
    assert "STARTS FROM other/iter_0000007, as at its first start" in loud


def test_where_one_is_whole_the_others_are_named_and_no_alarm_is_raised(folder):
    write_manifest(folder.checkpoints / "iter_0000010")
    # Nothing is in it, and nothing in it is wrong.
    notes = repair_notes(repair(folder.checkpoints), None)
    assert [text.split(" is not whole")[0] for text in notes] == ["checkpoint 30", "checkpoint 20"]
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [10]


def test_every_deletion_is_named(folder):
    repair(folder.checkpoints)
    (folder.checkpoints / "iter_0000040").mkdir()
    notes = repair_notes(repair(folder.checkpoints), None)
    gone = folder.checkpoints / "set_aside"
    assert notes[-2:] == [
        f"deleted, set aside by an earlier start: {gone / name}"
        for name in ("0003-iter_0000010", "0002-iter_0000020")
    ]


def test_a_stop_before_the_first_save_does_not_say_that_nothing_was_saved_where_it_was(folder):
    command = parse(["train.iters=8"], "megaplug-train", flags="")
    stopped = Outcome("stopped", 3, 0, "SIGINT", exit_code=130)
    assert "nothing was saved" in next_command(stopped, RunFolder(folder.path / "new"), command, 8)
    repair(folder.checkpoints)
    said = next_command(stopped, folder, command, 8)
    assert "no checkpoint is whole" in said and "nothing was saved" not in said
