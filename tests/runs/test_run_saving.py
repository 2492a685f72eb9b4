"""A checkpoint has its name when it is whole, and whatever is interrupted before that is no checkpoint."""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import shutil
from pathlib import Path

import pytest

from megaplug.errors import UserError
from megaplug.runs import manifest
from megaplug.runs.checkpoints import SAVING, TRACKER, list_checkpoints, repair, tidy
from megaplug.runs.hashed import hashing_open
from megaplug.runs.manifest import MANIFEST, read_manifest, verify_manifest
from megaplug.runs.retention import Retention, prune
from megaplug.runs.saving import beside, complete


def write(directory: Path, iteration: int, *, hashed: bool = True) -> Path:
    """What Megatron leaves: shards of which the writers have taken notes, small files, its own tracker."""
    folder = beside(directory) / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    opened = hashing_open(beside(directory)) if hashed else open
    for rank in range(2):
        with opened(folder / f"__{rank}_0.distcp", "wb") as file:
            file.write(f"weights of {iteration} by {rank}".encode() * 100)
    (folder / "metadata.json").write_text("{}")
    (beside(directory) / TRACKER).write_text(str(iteration))
    return folder


def test_a_complete_checkpoint_is_whole_named_and_tracked(tmp_path: Path) -> None:
    write(tmp_path, 10)
    target = complete(tmp_path, 10, {"iteration": 10})
    assert target == tmp_path / "iter_0000010" and verify_manifest(target) == []
    assert (tmp_path / TRACKER).read_text() == "10"
    found = read_manifest(target)
    assert found is not None and found["extra"] == {"iteration": 10}
    assert sorted(found["files"]) == ["__0_0.distcp", "__1_0.distcp", "metadata.json"]
    for name, entry in found["files"].items():
        content = (target / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    tidy(tmp_path)
    assert not beside(tmp_path).exists()


def test_what_its_writer_has_hashed_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = manifest._sha256
    monkeypatch.setattr(
        manifest, "_sha256", lambda path, **how: (read.append(path.name), real(path, **how))[1]
    )
    write(tmp_path, 10)
    complete(tmp_path, 10)
    assert read == ["metadata.json"]
    write(tmp_path, 20, hashed=False)
    complete(tmp_path, 20)
    assert sorted(read[1:]) == ["__0_0.distcp", "__1_0.distcp", "metadata.json"]


@pytest.mark.parametrize("fault", ["shorter", "gone"])
def test_less_than_was_written_gets_no_name(tmp_path: Path, fault: str) -> None:
    shard = write(tmp_path, 10) / "__1_0.distcp"
    shard.write_bytes(b"short") if fault == "shorter" else shard.unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp (has 5 bytes|is missing); 1800 were written"):
        complete(tmp_path, 10)
    assert list_checkpoints(tmp_path) == [] and not (tmp_path / TRACKER).exists()


def test_everything_is_durable_before_the_name_and_the_name_before_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, 10)
    target, tracker = tmp_path / "iter_0000010", tmp_path / TRACKER
    synced: list[tuple[str, bool, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append((str(path), target.exists(), tracker.exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    complete(tmp_path, 10)
    before_name = {Path(path).name for path, named, _ in synced if not named}
    assert {folder.name, "metadata.json"} <= before_name
    assert any(name.startswith(f".{MANIFEST}") for name in before_name)
    between = {path for path, named, tracked in synced if named and not tracked}
    assert {str(tmp_path), str(beside(tmp_path))} <= between
    assert synced[-1] == (str(tmp_path), True, True)


def test_a_shard_is_durable_when_its_writer_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (sizes.append(os.fstat(fd).st_size), real(fd))[1])
    write(tmp_path, 10)
    assert sizes == [1800, 1800]


class Interrupted(BaseException):
    pass


def test_wherever_it_is_interrupted_the_next_start_finds_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation on names and on what is durable is the last one once: a process can be killed there."""
    seen: set[int] = set()
    for last in itertools.count():
        run = tmp_path / str(last)
        write(run, 10)
        complete(run, 10)
        write(run, 20)
        with monkeypatch.context() as patch:
            _interrupt(patch, last)
            try:
                complete(run, 20)
                prune(run, Retention(1), {})
                done = True
            except Interrupted:
                done = False
        for found in list_checkpoints(run):
            assert verify_manifest(found.path) == [], f"after operation {last}"
        report = repair(run)
        assert report.newest is not None and report.set_aside == []
        assert (run / TRACKER).read_text() == str(report.newest.iteration)
        assert verify_manifest(report.newest.path) == []
        assert not (run / SAVING).exists()
        assert report.unfinished == ([20] if report.newest.iteration == 10 else [])
        seen.add(report.newest.iteration)
        # A next save finds nothing in its way.
        write(run, 30)
        complete(run, 30)
        assert repair(run).newest.iteration == 30
        if done:
            break
    assert seen == {10, 20} and last > 10


def _interrupt(patch: pytest.MonkeyPatch, last: int) -> None:
    done = itertools.count()

    def counted(real):
        def call(*args, **kwargs):
            if next(done) >= last:
                raise Interrupted
            return real(*args, **kwargs)

        return call

    for owner, name in (
        (pathlib.Path, "rename"),
        (pathlib.Path, "replace"),
        (pathlib.Path, "unlink"),
        (os, "fsync"),
        (shutil, "rmtree"),
    ):
        patch.setattr(owner, name, counted(getattr(owner, name)))


def test_one_that_has_the_name_already_is_set_aside_and_not_lost(tmp_path: Path) -> None:
    write(tmp_path, 10)
    complete(tmp_path, 10)
    (tmp_path / "iter_0000010" / "__0_0.distcp").write_bytes(b"of another time")
    write(tmp_path, 10)
    assert verify_manifest(complete(tmp_path, 10)) == []
    (aside,) = (tmp_path / "set_aside").iterdir()
    assert (aside / "__0_0.distcp").read_bytes() == b"of another time"


def test_a_link_in_the_place_of_the_folder_is_removed_and_its_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "iter_0000010").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / SAVING).symlink_to(tmp_path / "elsewhere")
    assert repair(run).unfinished == []
    assert not (run / SAVING).exists() and (tmp_path / "elsewhere" / "iter_0000010").exists()
