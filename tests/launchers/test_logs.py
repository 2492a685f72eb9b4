"""Hints from a log's last lines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megaplug.launchers.logs import hint_for, log_tail


@pytest.mark.parametrize(
    ("line", "exit_code", "oom_kills", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", 1, 0, "disk is full"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", 1, 0, "GPU's memory"),
        ("anything", -9, 2, "ran out of memory and the kernel killed"),
        ("anything", -9, 0, "if nobody killed it"),
        ("MemoryError", 1, 0, "machine's memory is full"),
    ],
)
def test_a_cause_gets_its_hint(line, exit_code, oom_kills, hint):
    assert hint in hint_for((line,), exit_code, oom_kills)


def test_a_full_disk_is_seen_where_no_log_could_tell(tmp_path, monkeypatch):
    def usage(_):
        return SimpleNamespace(free=1000)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert f"the disk of {tmp_path} is full" in hint_for(("anything",), 1, 0, tmp_path)
    assert hint_for(("anything",), 1, 0) == ""


def test_no_cause_no_hint():
    assert hint_for(("ValueError: x",), 1, 0) == ""


def test_a_tail_of_a_long_log_with_odd_bytes(tmp_path):
    log = tmp_path / "rank0.log"
    log.write_bytes(b"x" * 200_000 + b"\nlast \xff line\n\n")
    assert log_tail(log)[-1] == "last � line"


def test_a_log_that_somebody_has_removed_has_no_last_lines_and_no_room_is_known(tmp_path):
    assert log_tail(tmp_path / "rank0.log") == ()
    assert "if nobody killed it" in hint_for((), -9, 0, tmp_path / "gone")
