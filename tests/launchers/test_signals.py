"""Signals sent to a supervisor in a process of its own, or to one of its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_ranks import (
    CAN_SAVE,
    IGNORES,
    PRELUDE,
    SAVES,
    SAVES_ON_GO,
    WAITS,
    FakeJob,
    await_death,
    await_taken,
)

from megaplug.errors import UserError
from megaplug.runs import lock
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
              on_event=lambda event: print(event["event"], event.get("text", ""), flush=True))
print(outcome.status, outcome.reason, flush=True)
sys.exit(outcome.exit_code)
"""

# What Megatron does: who is told tells all others, here through a pipe.
_AGREE = (
    SAVES
    + """
def told(number, _):
    events.write("told", signal=number)
    os.kill(int((here / f"pid{1 - rank}").read_text()), signal.SIGWINCH)
    leave()
for number in (signal.SIGTERM, signal.SIGUSR2): signal.signal(number, told)
signal.signal(signal.SIGWINCH, leave)
"""
)


class Launched(FakeJob):
    """A supervisor as a subprocess; `wait_for` reads what it prints."""

    def start(self, script: str, grace_s: float = 30.0, prelude: str = PRELUDE) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _SUPERVISOR,
                str(self.folder.path),
                prelude + script + WAITS,
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

    def rank(self, number: int) -> int:
        return int((self.dir / f"pid{number}").read_text())

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=20)
        return self.process.returncode, out.splitlines()[-1]


@pytest.fixture
def launched(tmp_path):
    job = Launched(tmp_path)
    yield job
    job.process.kill()
    job.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_one_signal_lets_the_ranks_save(launched, is_alive, number):
    launched.start(SAVES)
    launched.process.send_signal(number)
    code, last = launched.end()
    assert (code, last) == (128 + number, f"stopped saved after {number.name}")
    state = read_state(launched.folder.state_file)
    assert (state.status, state.iteration, state.saved_iteration) == ("stopped", 5, 5)
    assert state.signal == number.name
    assert len(launched.pids()) == 4 and not any(map(is_alive, launched.pids()))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_ctrl_c_after_any_signal_kills_at_once(launched, is_alive, first):
    launched.start(IGNORES, grace_s=1000)
    launched.process.send_signal(first)
    launched.wait_for("stopping")
    sent = time.monotonic()
    launched.process.send_signal(signal.SIGINT)
    code, last = launched.end()
    assert time.monotonic() - sent < 2.0
    by = "a second Ctrl-C" if first == signal.SIGINT else f"Ctrl-C after {first.name}"
    assert code == 130 and f"killed at once by {by}, without saving" in last
    assert "steps 1 to 5 are lost" in last
    state = read_state(launched.folder.state_file)
    assert (state.status, state.saved_iteration, state.signal) == ("stopped", 0, "SIGINT")
    assert not any(map(is_alive, launched.pids()))
    RunLock.acquire(launched.folder).release()


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_what_a_scheduler_repeats_does_not_cut_a_save_short(launched, again):
    """SIGUSR2 before the time limit, SIGTERM at it."""
    launched.start(SAVES_ON_GO)
    launched.process.send_signal(signal.SIGUSR2)
    launched.wait_for("stopping")
    for _ in range(3):
        launched.process.send_signal(again)
        await_taken(launched.process.pid, again)  # so that they come one by one
    (launched.dir / "go").touch()
    code, last = launched.end()
    assert (code, last) == (128 + signal.SIGUSR2, "stopped saved after SIGUSR2")


def test_a_ctrl_c_that_reaches_a_rank_and_the_launcher_is_one(launched):
    """As SLURM sends a signal to all processes of a step; the rank may be the first to say so."""
    launched.start(SAVES_ON_GO + "signal.signal(signal.SIGINT, lambda *_: events.write('told', signal=2))\n")
    os.kill(launched.rank(1), signal.SIGINT)
    launched.wait_for("stopping")
    launched.process.send_signal(signal.SIGINT)
    await_taken(launched.process.pid, signal.SIGINT)
    os.kill(launched.rank(0), signal.SIGTERM)
    os.kill(launched.rank(1), signal.SIGTERM)
    (launched.dir / "go").touch()
    code, last = launched.end()
    assert (code, last) == (130, "stopped saved after SIGINT to rank 1")


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(launched, is_alive):
    launched.start(IGNORES, grace_s=0.3)
    launched.process.send_signal(signal.SIGTERM)
    code, last = launched.end()
    assert code == 128 + signal.SIGTERM
    assert "ranks 0, 1 have not saved and left within 0.3 s of SIGTERM and were killed" in last
    assert "steps 1 to 5 are lost" in last
    assert read_state(launched.folder.state_file).status == "stopped"
    assert not any(map(is_alive, launched.pids()))


def test_a_checkpoint_that_nobody_told_of_counts(launched):
    """It got its name in the moment in which the ranks were killed."""
    launched.start(IGNORES, grace_s=0.3)
    for step in (4, 9):  # one of them of a later time, which a start has gone back from
        (launched.folder.checkpoints / f"iter_{step:07d}").mkdir(parents=True)
    launched.process.send_signal(signal.SIGTERM)
    _, last = launched.end()
    assert last.endswith("; step 5 is lost")
    assert read_state(launched.folder.state_file).saved_iteration == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_before_a_rank_can_save_is_a_stop(launched, number):
    launched.start("")
    launched.process.send_signal(number)
    code, last = launched.end()
    said = f"stopped {number.name} came before a first step was done: there was nothing to save"
    assert (code, last) == (128 + number, said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_them_all(launched, number):
    launched.start(_AGREE)
    os.kill(launched.rank(1), number)
    launched.wait_for("stopping")
    code, last = launched.end()
    assert (code, last) == (128 + number, f"stopped saved after {number.name} to rank 1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_before_its_first_step_stops_them_all(launched, is_alive, number):
    launched.start("signal.signal(signal.SIGINT, signal.SIG_DFL)\n")
    os.kill(launched.rank(1), number)
    code, last = launched.end()
    said = f"stopped {number.name} to rank 1 came before a first step was done: there was nothing to save"
    assert (code, last) == (128 + number, said)
    assert not any(map(is_alive, launched.pids()))


def test_a_peer_that_notices_first_has_not_failed(launched):
    """One rank is gone by the signal; the other says that it has lost it before its end is seen."""
    notices = """
def told(*_):
    events.write("end", status="failed", kind="peer", reason="lost", time=0.0)
if rank == 0: signal.signal(signal.SIGTERM, told)
"""
    launched.start(notices)
    launched.process.send_signal(signal.SIGTERM)
    code, last = launched.end()
    assert code == 143 and "nothing to save" in last


def test_a_rank_that_fails_as_it_saves_has_failed(launched):
    fails = (
        CAN_SAVE
        + """
def full(*_):
    events.write("end", status="failed", reason="the disk is full")
    os._exit(1)
signal.signal(signal.SIGTERM, full)
"""
    )
    launched.start(fails)
    launched.process.send_signal(signal.SIGUSR2)
    code, last = launched.end()
    assert code == 1 and "failed: the disk is full" in last
    # Whoever starts failed jobs again must know that this one was to stop.
    state = read_state(launched.folder.state_file)
    assert (state.status, state.signal) == ("failed", "SIGUSR2")


def test_a_second_ctrl_c_reaches_a_launcher_whose_output_nobody_takes(launched, is_alive):
    launched.start(CAN_SAVE + """
def flood(*_):
    for number in range(20_000): events.write("note", text="x" * 100)
signal.signal(signal.SIGTERM, flood)
""")  # fmt: skip
    launched.process.send_signal(signal.SIGINT)
    # Both of its pipes are full: it waits in a write, and the ranks wait for it.
    deadline = time.monotonic() + 20
    while Path(f"/proc/{launched.process.pid}/wchan").read_text() not in ("pipe_write", "anon_pipe_write"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launched.process.send_signal(signal.SIGINT)
    await_death(launched.pids(), 2.0)
    assert launched.end()[0] == 130


def test_ranks_and_their_children_end_with_a_killed_supervisor(launched):
    launched.start(IGNORES)
    launched.process.kill()
    assert len(launched.pids()) == 4
    await_death(launched.pids())
    RunLock.acquire(launched.folder).release()  # and the lock is gone with them


def test_an_orphan_rank_keeps_the_lock(launched, monkeypatch):
    monkeypatch.setattr(lock, "_ORPHANS_S", 0.1)
    launched.start("", prelude=PRELUDE.replace("watchdog.start_from_environment()", ""))
    try:
        launched.process.kill()
        launched.process.wait()
        with pytest.raises(UserError, match="launcher has gone"):
            RunLock.acquire(launched.folder)
    finally:
        for pid in launched.pids():
            os.kill(pid, signal.SIGKILL)
    await_death(launched.pids())
    RunLock.acquire(launched.folder).release()
