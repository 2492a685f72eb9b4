"""The harness itself: what it does when ranks fail, hang or leave processes behind."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from ranks import RanksFailed, run_ranks


def answer(value: int) -> int:
    return int(os.environ["RANK"]) + value


def fail_on_rank_one() -> None:
    print("about to", flush=True)
    if os.environ["RANK"] == "1":
        raise RuntimeError("broken on purpose")
    time.sleep(60)


def hang_with_a_child(pid_file: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    Path(pid_file).write_text(str(child.pid))
    child.wait()


def test_every_rank_answers(tmp_path: Path) -> None:
    assert run_ranks(3, answer, 10, folder=tmp_path) == [10, 11, 12]


def test_a_failing_rank_ends_the_others_and_shows_every_output(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 ended with 1.*about to.*broken"):
        run_ranks(2, fail_on_rank_one, folder=tmp_path)
    assert time.monotonic() - started < 30


def test_the_time_limit_ends_children_too(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(RanksFailed):
        run_ranks(1, hang_with_a_child, str(pid_file), folder=tmp_path, timeout_s=6.0)
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
