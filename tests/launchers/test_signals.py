"""Ctrl-C, SIGTERM and SIGKILL sent to a supervisor in a process of its own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from fake_ranks import PRELUDE, FakeJob

from megaplug.errors import UserError
from megaplug.runs.lock import RunLock
from megaplug.runs.state import read_state

_SUPERVISOR = """
import sys
from pathlib import Path
from megaplug.launchers.local import run
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock
folder = RunFolder(Path(sys.argv[1]))
lock = RunLock.acquire(folder, "the test")
outcome = run([sys.executable, "-c", sys.argv[2]], folder, 2, lock_fd=lock.fd, grace_s=float(sys.argv[3]),
              on_event=lambda event: print(event["event"], flush=True))
print(outcome.status, outcome.reason, flush=True)
sys.exit(outcome.exit_code)
"""

_SAVES = """
def leave(*_):
    events.write("saved", iteration=5, seconds=0.0)
    events.write("end", status="stopped", iteration=5)
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
"""
_IGNORES = "signal.signal(signal.SIGTERM, lambda *_: events.write('phase', name='ignored'))\n"
_WAITS = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
(here / f"pid{rank}").write_text(str(os.getpid()))
(here / f"pidchild{rank}").write_text(str(child.pid))
events.write("ready")
while True: signal.pause()
"""


class Launched(FakeJob):
    """A supervisor as a subprocess; `wait_for` reads what it prints."""

    def start(self, script: str, grace_s: float = 30.0, prelude: str = PRELUDE) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _SUPERVISOR,
                str(self.folder.path),
                prelude + script + _WAITS,
                str(grace_s),
            ],
            env=os.environ | self.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.wait_for("ready")
        self.wait_for("ready")

    def wait_for(self, line: str) -> None:
        while (text := self.process.stdout.readline().strip()) != line:
            assert text, f"the supervisor ended before it said {line!r}"

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=20)
        return self.process.returncode, out.splitlines()[-1]


@pytest.fixture
def launched(tmp_path):
    job = Launched(tmp_path)
    yield job
    job.process.kill()
    job.process.communicate()


def _await_death(pids, seconds=10.0):
    """Wait on pidfds, no polling."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], (
                    f"{pid} still lives"
                )
            finally:
                os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_lets_the_ranks_save(launched, is_alive, number):
    launched.start(_SAVES)
    launched.process.send_signal(number)
    code, last = launched.end()
    assert (code, last) == (128 + number, f"stopped saved after {number.name}")
    state = read_state(launched.folder.state_file)
    assert (state.status, state.iteration, state.saved_iteration) == ("stopped", 5, 5)
    assert len(launched.pids()) == 4 and not any(map(is_alive, launched.pids()))


def test_a_second_ctrl_c_kills_at_once(launched, is_alive):
    launched.start(_IGNORES, grace_s=1000)
    launched.process.send_signal(signal.SIGINT)
    launched.wait_for("stopping")
    launched.process.send_signal(signal.SIGINT)
    code, last = launched.end()
    assert code == 130 and "second signal" in last
    assert not any(map(is_alive, launched.pids()))


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(launched, is_alive):
    launched.start(_IGNORES, grace_s=0.3)
    launched.process.send_signal(signal.SIGTERM)
    code, last = launched.end()
    assert code == 1 and "ranks 0, 1 did not save and leave within 0.3 s of SIGTERM" in last
    assert read_state(launched.folder.state_file).status == "failed"
    assert not any(map(is_alive, launched.pids()))


def test_a_stop_before_a_rank_can_save_is_a_stop(launched):
    launched.start("")
    launched.process.send_signal(signal.SIGINT)
    code, last = launched.end()
    assert (code, last) == (130, "stopped stopped by SIGINT before it could save")


def test_ranks_and_their_children_end_with_a_killed_supervisor(launched):
    launched.start(_IGNORES)
    launched.process.kill()
    assert len(launched.pids()) == 4
    _await_death(launched.pids())
    RunLock.acquire(launched.folder).release()  # and the lock is gone with them


def test_an_orphan_rank_keeps_the_lock(launched):
    launched.start("", prelude=PRELUDE.replace("watchdog.start_from_environment()", ""))
    try:
        launched.process.kill()
        launched.process.wait()
        with pytest.raises(UserError, match="launcher has gone"):
            RunLock.acquire(launched.folder)
    finally:
        for pid in launched.pids():
            os.kill(pid, signal.SIGKILL)
    _await_death(launched.pids())
    RunLock.acquire(launched.folder).release()
