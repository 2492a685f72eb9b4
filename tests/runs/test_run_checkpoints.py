"""Repairing a checkpoint folder before a start."""

from __future__ import annotations

import errno
import os
import pathlib
import pickle

import pytest

from megaplug.errors import UserError
from megaplug.runs.checkpoints import TRACKER, list_checkpoints, repair
from megaplug.runs.manifest import write_manifest


class _Crafted:
    def __reduce__(self):
        return os.mkdir, ("/tmp/never",)


@pytest.fixture
def save(tmp_path):
    def write(iteration, *, whole=True, metadata=None):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        (folder / "__0_0.distcp").write_text(f"weights of {iteration}")
        if metadata is not None:
            (folder / ".metadata").write_bytes(metadata)
        if whole:
            write_manifest(folder)
        (tmp_path / TRACKER).write_text(str(iteration))
        return folder

    return write


def _tracker(tmp_path):
    path = tmp_path / TRACKER
    return path.read_text() if path.exists() else None


def test_whole_checkpoints_stay_as_they_are(tmp_path, save):
    save(10), save(20)
    report = repair(tmp_path)
    assert (report.newest.iteration, report.set_aside, report.tracker_rewritten) == (20, [], False)
    assert [found.iteration for found in list_checkpoints(tmp_path)] == [10, 20]


def test_what_is_newer_than_the_newest_whole_one_is_set_aside(tmp_path, save):
    save(10), save(20, whole=False)
    flipped = save(30)
    (flipped / "__0_0.distcp").write_text("weights of 31")
    report = repair(tmp_path)
    assert report.newest.iteration == 10 and report.newest.path == tmp_path / "iter_0000010"
    assert [(aside.iteration, aside.path.parent.name) for aside in report.set_aside] == [
        (30, "set_aside"),
        (20, "set_aside"),
    ]
    assert "other bytes" in report.set_aside[0].faults[0] and "no manifest" in report.set_aside[1].faults[0]
    assert (report.set_aside[0].path / "__0_0.distcp").read_text() == "weights of 31"
    assert report.tracker_rewritten and _tracker(tmp_path) == "10"


def test_the_names_count_as_numbers(tmp_path, save):
    save(9999999)
    (tmp_path / "iter_9999999").rename(tmp_path / "iter_9999998")
    save(10000000)
    assert repair(tmp_path).newest.iteration == 10000000


@pytest.mark.parametrize("text", ["", "20", "release", "\xff", None])
def test_a_tracker_that_points_elsewhere_is_rewritten(tmp_path, save, text):
    save(10)
    (tmp_path / TRACKER).unlink() if text is None else (tmp_path / TRACKER).write_text(text)
    assert repair(tmp_path).tracker_rewritten and _tracker(tmp_path) == "10"
    assert not repair(tmp_path).tracker_rewritten


def test_with_none_whole_there_is_no_tracker(tmp_path, save):
    save(10, whole=False)
    report = repair(tmp_path)
    assert report.newest is None and _tracker(tmp_path) is None and list_checkpoints(tmp_path) == []
    assert repair(tmp_path / "not_there").newest is None and not (tmp_path / "not_there").exists()


def _aside(tmp_path):
    return sorted(path.name for path in (tmp_path / "set_aside").iterdir())


def test_of_those_of_earlier_starts_the_two_of_the_highest_steps_stay(tmp_path, save):
    gone = []
    for iteration in (5, 10, 15, 10):
        save(iteration, whole=False)
        gone.append([path.name for path in repair(tmp_path).forgotten])
    assert gone == [[], [], ["0001-iter_0000005"], ["0002-iter_0000010"]]
    assert _aside(tmp_path) == ["0003-iter_0000015", "0004-iter_0000010"]


def test_what_a_start_sets_aside_it_does_not_delete(tmp_path, save):
    save(5, whole=False), repair(tmp_path)
    for iteration in (10, 20, 30):
        save(iteration, whole=False)
    report = repair(tmp_path)
    assert [aside.iteration for aside in report.set_aside] == [30, 20, 10]
    assert all((aside.path / "__0_0.distcp").exists() for aside in report.set_aside)
    assert [path.name for path in report.forgotten] == ["0001-iter_0000005"]
    assert repair(tmp_path).forgotten == [] and len(_aside(tmp_path)) == 3
    save(7, whole=False)
    assert [path.name for path in repair(tmp_path).forgotten] == ["0004-iter_0000010"]
    assert _aside(tmp_path) == ["0002-iter_0000030", "0003-iter_0000020", "0005-iter_0000007"]


def test_a_crafted_metadata_never_counts_as_whole(tmp_path, save):
    save(10), save(20, metadata=pickle.dumps(_Crafted())), save(30, metadata=pickle.dumps({"a": 1}))
    report = repair(tmp_path)
    assert report.newest.iteration == 10
    (misread,), (crafted,) = (aside.faults for aside in report.set_aside)
    assert "mkdir" in crafted and misread.startswith(".metadata cannot be understood")


def test_a_linked_checkpoint_is_set_aside_and_its_target_untouched(tmp_path, save):
    target = save(10)
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    report = repair(tmp_path)
    assert report.newest is None and (tmp_path / "elsewhere" / "__0_0.distcp").exists()


@pytest.mark.parametrize(("number", "word"), [(errno.EROFS, "writable"), (errno.ENOSPC, "free some space")])
def test_a_disk_that_refuses_is_a_user_error_and_nothing_is_lost(tmp_path, save, monkeypatch, number, word):
    save(10, whole=False)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(UserError) as refused:
        repair(tmp_path)
    assert word in refused.value.hint
    assert (tmp_path / "iter_0000010" / "__0_0.distcp").exists()


def test_an_unreadable_shard_is_the_disk_s_fault_and_not_the_checkpoint_s(tmp_path, save, monkeypatch):
    save(10)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "read", refuse)
    with pytest.raises(UserError, match="Input/output"):
        repair(tmp_path)
    assert (tmp_path / "iter_0000010").exists()
