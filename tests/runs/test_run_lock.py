"""One job a folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megaplug.errors import UserError
from megaplug.runs.folder import create_next
from megaplug.runs.lock import RunLock, read_holder


@pytest.fixture
def folder(tmp_path):
    return create_next(tmp_path, "tiny", "0")


def test_two_jobs_cannot_hold_one_folder(folder):
    with RunLock.acquire(folder, "train.py model=tiny"):
        with pytest.raises(
            UserError, match=f"another job .*process {os.getpid()} on .*model=tiny"
        ) as refused:
            RunLock.acquire(folder)
        assert "resume=false" in refused.value.hint
    RunLock.acquire(folder).release()


def test_the_file_says_who_holds_it(folder):
    with RunLock.acquire(folder, "what was typed"):
        holder = read_holder(folder.lock_file)
    assert holder.pid == os.getpid() and holder.command == "what was typed" and holder.host and holder.since


def test_a_lock_without_a_name_is_still_a_lock(folder):
    with RunLock.acquire(folder):
        folder.lock_file.write_text("")
        with pytest.raises(UserError, match="another process"):
            RunLock.acquire(folder)


def test_a_child_keeps_the_lock_after_its_release_and_loses_it_by_dying(folder):
    lock = RunLock.acquire(folder)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fd])
    lock.release()
    try:
        with pytest.raises(UserError):
            RunLock.acquire(folder)
    finally:
        child.kill()
        child.communicate()
    RunLock.acquire(folder).release()


def test_a_child_without_the_descriptor_does_not_keep_it(folder):
    lock = RunLock.acquire(folder)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.release()
    RunLock.acquire(folder).release()
    child.communicate(b"\n")


def test_the_lock_of_a_killed_process_is_never_stale(folder):
    script = (
        "import os, sys, signal; from pathlib import Path; from megaplug.runs.folder import RunFolder;"
        "from megaplug.runs.lock import RunLock; lock = RunLock.acquire(RunFolder(Path(sys.argv[1])), 'x');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(folder.path)], check=False)
    assert read_holder(folder.lock_file).command == "x"
    RunLock.acquire(folder).release()
