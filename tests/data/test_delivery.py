"""Named pairs are copies of what a job reads; a disk that refuses leaves none that is half."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from megaplug.data import delivery
from megaplug.data.delivery import deliver
from megaplug.data.indexed import read_indexed
from megaplug.data.prepare import prepare
from megaplug.errors import UserError


@pytest.fixture
def facts(corpus_folder, make_job):
    return prepare(make_job(corpus_folder), show_progress=False)


@pytest.mark.parametrize("at_once", [100, 4_000_000])
def test_copies_hold_the_same_documents(facts, tmp_path, at_once, monkeypatch):
    monkeypatch.setattr(delivery, "_IDS_AT_ONCE", at_once)
    places = deliver(facts, tmp_path / "new" / "set", overwrite=False)
    assert list(places) == list(facts.prefixes.values())
    for old, new in places.items():
        theirs, ours = read_indexed(Path(old)), read_indexed(Path(new))
        assert np.array_equal(theirs.tokens, ours.tokens)
        assert np.array_equal(theirs.lengths, ours.lengths)


def test_a_part_of_a_shared_file_becomes_a_pair_of_its_own(facts, make_job, tmp_path):
    """The splits of a pair that was tokenized elsewhere share one .bin through links."""
    deliver(facts, tmp_path / "whole", overwrite=False)
    views = prepare(make_job(tmp_path / "whole-train", split="50,50,0"), show_progress=False)
    places = deliver(views, tmp_path / "half", overwrite=False)
    whole = read_indexed(tmp_path / "whole-train").tokens
    halves = [read_indexed(Path(place)).tokens for place in places.values()]
    assert np.array_equal(np.concatenate(halves), whole)
    assert not any(Path(f"{place}.bin").is_symlink() for place in places.values())


def test_a_disk_that_is_too_small_is_known_before(facts, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 100))
    with pytest.raises(UserError, match=r"out: .* MB are needed .* and 0\.0 MB are left"):
        deliver(facts, tmp_path / "set", overwrite=False)
    assert not list(tmp_path.glob("set*"))


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_disk_that_fills_up_leaves_whole_pairs_only(fails_at, facts, tmp_path, monkeypatch):
    calls = []

    def sync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(delivery.os, "fsync", sync)
    with pytest.raises(UserError, match=r"out: .*set cannot be written: No space left") as error:
        deliver(facts, tmp_path / "set", overwrite=False)
    assert "free some space" in error.value.hint
    there = {path.name for path in tmp_path.iterdir() if path.name.startswith((".set", "set"))}
    assert there == ({"set-train.bin", "set-train.idx"} if fails_at == 4 else set())


def test_two_that_copy_to_one_place_do_not_meet(facts, tmp_path, monkeypatch):
    """Both are this process: so are two containers' that count theirs from one."""
    real = delivery.write_index

    def meanwhile(*rest: object) -> None:
        monkeypatch.setattr(delivery, "write_index", real)
        deliver(facts, tmp_path / "set", overwrite=True)
        real(*rest)

    monkeypatch.setattr(delivery, "write_index", meanwhile)
    for old, new in deliver(facts, tmp_path / "set", overwrite=True).items():
        assert np.array_equal(read_indexed(Path(old)).tokens, read_indexed(Path(new)).tokens)
    assert not list(tmp_path.glob(".set*"))


def test_a_new_copy_never_stands_beside_an_old_index(facts, tmp_path, monkeypatch):
    deliver(facts, tmp_path / "set", overwrite=False)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match="cannot be written"):
        deliver(facts, tmp_path / "set", overwrite=True)
    assert not (tmp_path / "set-train.idx").exists()
