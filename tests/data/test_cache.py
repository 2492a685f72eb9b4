"""What killed builds have left goes; what another job may be building stays."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from megaplug.data import cache
from megaplug.data.prepare import prepare

DAY = 86_400


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def no_locks(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def left(root: Path, fingerprint: str, host: str, *, still_s: float = 0) -> Path:
    """The folder of a build that was killed, with a file in it that changed some time ago."""
    folder = root / f"building-{fingerprint}-{host}-x_1"
    folder.mkdir()
    (folder / "raw-0").write_bytes(b"half")
    for path in (folder / "raw-0", folder):
        os.utime(path, times=(time.time() - still_s,) * 2)
    return folder


def build(root: Path, fingerprint: str) -> None:
    with (
        cache.building_lock(root, fingerprint) as is_locked,
        cache.building_folder(root, fingerprint, is_locked=is_locked) as folder,
    ):
        assert folder.is_dir()
    assert not folder.exists()


def test_what_is_being_built_by_another_is_left_alone(root):
    with (
        cache.building_lock(root, "aaaa") as is_locked,
        cache.building_folder(root, "aaaa", is_locked=is_locked) as busy,
        cache.building_folder(root, "bbbb", is_locked=True) as dead,
    ):
        assert is_locked
        cache.remove_leftovers(root, "cccc")
        assert busy.is_dir()
        assert not dead.exists()


@pytest.mark.parametrize("other", ["aaaa", "bbbb"])
def test_without_locks_nothing_fresh_is_removed(other, root, no_locks, capsys):
    with (
        cache.building_lock(root, other) as is_locked,
        cache.building_folder(root, other, is_locked=is_locked) as busy,
    ):
        old = left(root, other, cache._host(), still_s=DAY + 60)
        build(root, "aaaa")
        assert not is_locked and busy.is_dir()
        assert not old.exists()
    assert "knows no locks" in capsys.readouterr().err


@pytest.mark.parametrize(("where", "step"), [(cache, "put_in_place"), (Path, "rename")])
def test_two_jobs_without_locks_build_the_same_and_both_go_on(
    where, step, corpus_folder, make_job, no_locks, monkeypatch
):
    real, told = getattr(where, step), []

    def meanwhile(*rest: object) -> None:
        monkeypatch.setattr(where, step, real)
        told.append(prepare(make_job(corpus_folder)))
        real(*rest)

    monkeypatch.setattr(where, step, meanwhile)
    assert prepare(make_job(corpus_folder)) == told[0]
    assert len(told) == 1


@pytest.mark.parametrize("other", ["aaaa", "bbbb"])
def test_what_another_machine_has_left_goes_when_it_was_still_for_a_day(other, root):
    fresh = left(root, other, "some-other.host")
    older = left(root, other, "older-host", still_s=DAY + 60)
    busy = left(root, other, "busy-host", still_s=DAY + 60)
    (busy / "raw-0").write_bytes(b"more")
    ours = left(root, other, cache._host())
    build(root, "aaaa")
    assert [folder.exists() for folder in (fresh, older, busy, ours)] == [True, False, True, False]


def test_a_lock_of_another_user_stops_nobody(root, monkeypatch, capsys):
    folder = left(root, "bbbb", cache._host())
    real = Path.open

    def refuse(path: Path, *rest: object, **more: object):
        if path.name == "bbbb.lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(Path, "open", refuse)
    build(root, "aaaa")
    assert folder.is_dir()
    assert f"{folder} may be left of a killed build" in capsys.readouterr().err


def test_a_lock_of_another_user_that_can_be_read_is_held_all_the_same(root, monkeypatch):
    (root / "locks" / "aaaa.lock").touch()
    real = Path.open

    def refuse(path: Path, mode: str = "r", **more: object):
        if path.suffix == ".lock" and mode != "rb":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with cache.building_lock(root, "aaaa") as is_locked, (root / "locks" / "aaaa.lock").open("rb") as again:
        assert is_locked
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
