"""A copy that is interrupted has no name, and the next one takes up what is right of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small_checkpoints import make_checkpoint

from megaplug.errors import UserError
from megaplug.runs import copying
from megaplug.runs.checkpoints import faults_of, list_checkpoints
from megaplug.runs.copying import copy_checkpoint
from megaplug.runs.manifest import read_manifest


@pytest.mark.parametrize("after", range(1, 9))
def test_wherever_it_is_interrupted_there_is_no_checkpoint_and_the_next_copy_is_whole(
    tmp_path: Path, after: int
) -> None:
    source, to = make_checkpoint(tmp_path / "from", 10), tmp_path / "to"
    sizes = {name: entry["size"] for name, entry in read_manifest(source)["files"].items()}
    calls = 0

    def tell(num_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    # Three files, each told of when it is read and when it is verified.
    if after > 2 * len(sizes):
        assert copy_checkpoint(source, to, tell).num_bytes_found == 0
    else:
        with pytest.raises(KeyboardInterrupt):
            copy_checkpoint(source, to, tell)
        assert list_checkpoints(to) == []
        written = [sizes[name] for name in sorted(sizes)][:after]
        assert copy_checkpoint(source, to).num_bytes_found == sum(written)
    assert faults_of(to / "iter_0000010") == []
    assert [path.name for path in to.iterdir()] == ["iter_0000010"]


def test_a_source_that_is_pruned_meanwhile_is_named(tmp_path: Path) -> None:
    source, to = make_checkpoint(tmp_path / "from", 10), tmp_path / "to"

    def tell(_: int) -> None:
        shutil.rmtree(source, ignore_errors=True)

    with pytest.raises(UserError, match="has gone while its checkpoint was copied"):
        copy_checkpoint(source, to, tell)
    assert list_checkpoints(to) == []


def test_a_link_in_the_place_of_a_copied_file_is_not_followed(tmp_path: Path) -> None:
    source, to = make_checkpoint(tmp_path / "from", 10), tmp_path / "to"
    secret, beside = tmp_path / "secret", to / ".iter_0000010.copying"
    secret.write_bytes(b"kept")
    beside.mkdir(parents=True)
    (beside / "__0_0.distcp").symlink_to(secret)
    assert copy_checkpoint(source, to).path == to / "iter_0000010"
    assert secret.read_bytes() == b"kept" and faults_of(to / "iter_0000010") == []


def test_what_is_written_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, to = make_checkpoint(tmp_path / "from", 10), tmp_path / "to"
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    monkeypatch.setattr(copying.os, "fsync", fsync)
    copy_checkpoint(source, to)
    files = [*read_manifest(source)["files"], "manifest.json"]
    assert set(files) <= set(synced) and synced[-2:] == [".iter_0000010.copying", "to"]
