"""One job a folder."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaplug.errors import UserError
from megaplug.runs.folder import create_next, open_first
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


def test_a_launcher_is_not_refused_for_a_look_at_the_lock(folder, monkeypatch):
    """``lock_is_held`` has it for a moment; its last launcher lives, as in a sweep."""
    RunLock.acquire(folder, "the point before").release()
    looking = os.open(folder.lock_file, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("megaplug.runs.lock.time.sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
    with RunLock.acquire(folder, "the next point"):
        assert read_holder(folder.lock_file).command == "the next point"
    os.close(looking)


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


# Four launchers at a time, forked and let loose together, 50 times; each says what has become of it.
RACES = """
import json, os, sys
from pathlib import Path
from megaplug.errors import UserError
from megaplug.runs.folder import open_first
from megaplug.runs import lock as locks
from megaplug.runs.lock import RunLock
locks._LOOK_S = 0.0  # nobody only looks
LAUNCHERS = 4
for race in range(50):
    go_read, go = os.pipe()
    said_read, said = os.pipe()
    end_read, end = os.pipe()
    pids = []
    for _ in range(LAUNCHERS):
        pid = os.fork()
        if pid == 0:
            os.close(go), os.close(end)
            os.read(go_read, 1)
            folder = open_first(Path(sys.argv[1]), "tiny", "0")
            try:
                lock = RunLock.acquire(folder, f"launcher {os.getpid()}")
                os.write(said, json.dumps([os.getpid(), None]).encode() + b"\\n")
                os.read(end_read, 1)
            except UserError as error:
                os.write(said, json.dumps([os.getpid(), error.message]).encode() + b"\\n")
            os._exit(0)
        pids.append(pid)
    os.close(go_read), os.close(end_read), os.close(said)
    os.close(go)
    lines = os.fdopen(said_read)
    print(json.dumps([json.loads(lines.readline()) for _ in pids]), flush=True)
    if race % 2:
        for pid in pids: os.kill(pid, 9)
    os.close(end)
    for pid in pids: os.waitpid(pid, 0)
"""


def test_of_launchers_started_at_once_one_runs_and_the_others_name_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RACES, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    races = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(races) == 50 and all(len(race) == 4 for race in races)
    for race in races:
        (winner,) = [pid for pid, message in race if message is None]
        assert all(f"process {winner} on " in message for _, message in race if message is not None), race
    # After the last, killed like every second one, the lock is free.
    RunLock.acquire(open_first(tmp_path, "tiny", "0")).release()


def test_ranks_whose_launcher_was_killed_are_waited_for(folder):
    """The launcher is gone at once, and its rank a little later: the next command takes over by itself."""
    script = (
        "import os, signal, subprocess, sys; from pathlib import Path\n"
        "from megaplug.runs.folder import RunFolder; from megaplug.runs.lock import RunLock\n"
        "lock = RunLock.acquire(RunFolder(Path(sys.argv[1])), 'x')\n"
        "rank = subprocess.Popen(['sleep', '0.5'], pass_fds=[lock.fd]); print(rank.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    words = [sys.executable, "-c", script, str(folder.path)]
    rank = int(subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout)
    RunLock.acquire(folder).release()
    stat = Path(f"/proc/{rank}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
