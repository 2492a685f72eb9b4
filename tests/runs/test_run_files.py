"""State and atomic writing."""

from __future__ import annotations

import errno
import json
import os

import pytest

from megaplug.errors import UserError
from megaplug.runs.atomic import replaced, write_json_atomic, write_text_atomic
from megaplug.runs.state import RunState, read_state, write_state


def test_a_failed_write_leaves_the_old_text_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text_atomic(path, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as refused:
        write_text_atomic(path, "new")
    assert "are left" in refused.value.hint
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match="Read-only") as refused:
        write_text_atomic(tmp_path / "file", "x")
    assert "writable" in refused.value.hint


def test_json_is_strict(tmp_path):
    write_json_atomic(
        tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), (1, 2.5)], "c": {"d": None}}
    )
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": None,
        "b": [None, [1, 2.5]],
        "c": {"d": None},
    }


def test_a_state_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "state.json"
    assert read_state(path) is None
    written = write_state(path, RunState("failed", 7, 5, 20, "rank 1 died", 1))
    assert read_state(path) == written
    assert written.pid == os.getpid() and written.updated


def test_a_later_version_s_extra_keys_are_ignored(tmp_path):
    (tmp_path / "state.json").write_text('{"status": "stopped", "iteration": 3, "mood": "good"}')
    assert read_state(tmp_path / "state.json") == RunState("stopped", 3)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"status": "asleep"}'])
def test_a_broken_state_is_a_user_error(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match="does not hold the state"):
        read_state(tmp_path / "state.json")


def test_two_that_write_one_file_do_not_meet_though_their_processes_have_one_number(tmp_path):
    path = tmp_path / "file"
    with replaced(path) as first:
        first.write(b"first")
        with replaced(path) as second:
            second.write(b"2")
        assert path.read_text() == "2"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
