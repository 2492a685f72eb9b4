"""What Megatron is about to load is verified in a rank that nobody supervises."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import make_checkpoint

from megaplug.errors import UserError
from megaplug.runs.checkpoints import TRACKER
from megaplug.runtime.verifying import verify_what_is_loaded


def test_the_checkpoint_of_the_tracker_is_read_and_no_other(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    (older / "__0_0.distcp").write_bytes(b"")
    verify_what_is_loaded(str(tmp_path))
    (newer / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"iter_0000020 must not be loaded: __0_0\.distcp has 0 bytes"):
        verify_what_is_loaded(str(tmp_path))


def test_where_nothing_is_loaded_nothing_is_verified(tmp_path: Path) -> None:
    verify_what_is_loaded(None)
    verify_what_is_loaded(str(tmp_path / "none"))
    make_checkpoint(tmp_path, 10)
    (tmp_path / TRACKER).write_text("release")
    verify_what_is_loaded(str(tmp_path))


def test_a_link_to_another_run_s_is_followed(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path / "theirs", 10)
    load = tmp_path / "load"
    load.mkdir()
    (load / "iter_0000010").symlink_to(theirs)
    (load / TRACKER).write_text("10\n")
    verify_what_is_loaded(str(load))
    (theirs / ".metadata").unlink()
    with pytest.raises(UserError, match=r"\.metadata is missing"):
        verify_what_is_loaded(str(load))
