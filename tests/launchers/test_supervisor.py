"""What the supervisor makes of ranks that end, fail, hang, and leave children behind."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys

import pytest

from megaplug.errors import UserError
from megaplug.launchers.crew import LocalCrew
from megaplug.launchers.ranks import LocalRank
from megaplug.launchers.supervisor import Patience
from megaplug.runs.events import EventWriter
from megaplug.runs.state import read_state


def test_ranks_that_say_finished_are_a_finished_job(job):
    outcome = job.run(
        """
events.write("phase", name="building the model")
events.write("step", iteration=1, loss=float("nan"), iters=2)
events.write("saved", iteration=2, seconds=0.1)
events.write("end", status="finished", iteration=2)
print("to the log")
""",
        world_size=2,
        iters=2,
    )
    assert (outcome.status, outcome.iteration, outcome.saved_iteration, outcome.exit_code) == (
        "finished",
        2,
        2,
        0,
    )
    assert {event["rank"] for event in job.events} == {0, 1}
    assert not any(event["event"] == "end" for event in job.events)
    assert [event["event"] for event in job.events].count("ending") == 1
    log = job.folder.log_file(1).read_text()
    assert log.startswith("=== ") and "rank 1 of 2" in log and log.endswith("to the log\n")
    state = read_state(job.folder.state_file)
    assert (state.status, state.iteration, state.iters, state.saved_iteration) == ("finished", 2, 2, 2)


def test_what_the_ranks_said_counts_before_their_exit_codes(job):
    outcome = job.run('events.write("end", status="stopped", iteration=3, reason="stop_at"); sys.exit(7)')
    assert (outcome.status, outcome.reason, outcome.exit_code) == ("stopped", "stop_at", 0)


def test_leaving_with_zero_and_without_a_word_is_a_failure(job):
    outcome = job.run('events.write("step", iteration=1)')
    assert outcome.status == "failed" and outcome.exit_code == 1
    assert "did not say" in outcome.reason


def test_the_first_failing_rank_is_named_with_its_last_lines(job):
    outcome = job.run(
        """
if rank == 1:
    for number in range(40): print("line", number)
    print("x.py:1: UserWarning: noise"); print("the cause")
    sys.exit(3)
signal.pause()
""",
        world_size=3,
    )
    assert (outcome.status, outcome.rank, outcome.exit_code) == ("failed", 1, 1)
    assert outcome.reason == "rank 1 ended with exit code 3"
    assert outcome.log_tail[-2:] == ("line 39", "the cause") and len(outcome.log_tail) == 20
    state = read_state(job.folder.state_file)
    assert (state.status, state.rank, state.reason) == ("failed", 1, outcome.reason)


def test_a_tail_does_not_show_an_earlier_start(job):
    job.run('print("old words"); sys.exit(1)')
    outcome = job.run('print("new words"); sys.exit(1)')
    assert outcome.log_tail == ("new words",)


def test_a_killed_rank_is_named_though_its_peers_fail_from_it(job):
    outcome = job.run(
        """
pipe = here / "fifo"
if rank == 1:
    os.mkfifo(here / "made"); os.rename(here / "made", pipe)
    with open(pipe, "wb"): os.kill(os.getpid(), signal.SIGKILL)
while not pipe.exists(): os.sched_yield()
open(pipe, "rb").read()
events.write("end", status="failed", reason="connection closed by peer")
sys.exit(1)
""",
        world_size=2,
    )
    assert outcome.rank == 1 and outcome.reason.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert "memory" in outcome.hint


def test_a_reported_reason_is_shown(job):
    outcome = job.run('events.write("end", status="failed", reason="no data"); sys.exit(1)')
    assert outcome.reason == "rank 0 failed: no data"


def test_a_rank_that_stays_after_its_failure_is_not_taken_for_one_without_memory(job):
    outcome = job.run(
        """
print("the cause", flush=True)
events.write("end", status="failed", kind="data", reason="no data")
signal.pause()
"""
    )
    assert (outcome.reason, outcome.log_tail, outcome.hint) == (
        "rank 0 failed: no data",
        ("the cause",),
        "",
    )


def test_a_full_disk_gets_a_hint(job):
    outcome = job.run('raise OSError(28, "No space left on device")')
    assert "is full" in outcome.hint


def test_ranks_that_hang_after_their_end_do_not_hold_the_job(job, is_alive):
    outcome = job.run(
        """
(here / f"pid{rank}").write_text(str(os.getpid()))
events.write("end", status="finished")
signal.pause()
""",
        world_size=2,
    )
    assert outcome.status == "finished"
    assert not any(map(is_alive, job.pids()))


def test_children_of_ranks_are_not_left_behind(job, is_alive):
    outcome = job.run(
        """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
(here / f"pid{rank}").write_text(str(child.pid))
while len(list(here.glob("pid*"))) < 2: os.sched_yield()
if rank == 0: os._exit(3)  # the group's leader is the first to go
signal.pause()
""",
        world_size=2,
    )
    assert outcome.status == "failed" and outcome.rank == 0
    assert len(job.pids()) == 2 and not any(map(is_alive, job.pids()))


def test_all_ranks_are_in_one_group_of_their_own(job):
    job.run('(here / f"pgrp{rank}").write_text(str(os.getpgrp())); events.write("end", status="finished")', 3)
    groups = set(job.pids("pgrp*"))
    assert len(groups) == 1 and os.getpgrp() not in groups


def test_the_environment_of_a_rank(job, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.9.8.7")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    monkeypatch.setattr("megaplug.launchers.machine._read_cgroup", lambda name: "")
    job.run(
        """
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS MEGAPLUG_STORE_FD"
events.write("env", values=[os.environ.get(name) for name in names.split()], port=os.environ["MASTER_PORT"],
             elastic=[name for name in os.environ if name.startswith("TORCHELASTIC")])
events.write("end", status="finished")
""",
        world_size=2,
    )
    told = (event for event in job.events if event["event"] == "env")
    first, second = sorted(told, key=lambda event: event["rank"])
    assert first["values"][:6] == ["0", "0", "2", "2", "127.0.0.1", "2"] and first["values"][6].isdigit()
    assert second["values"] == ["1", "1", "2", "2", "127.0.0.1", "2", None]
    assert first["port"] == second["port"] and not first["elastic"]


def test_rank_zero_serves_the_port_that_the_supervisor_bound(job):
    outcome = job.run(
        """
import socket
if rank == 0:
    server = socket.socket(fileno=int(os.environ["MEGAPLUG_STORE_FD"]))
    server.accept()[0].sendall(b"hello")
else:
    client = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    assert client.recv(5) == b"hello"
events.write("end", status="finished")
""",
        world_size=2,
    )
    assert outcome.status == "finished"


def test_a_port_in_use_is_refused_before_anything_starts(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*in use") as refused:
            job.run('(here / "pid0").write_text("1")', port=port)
    assert "launch.master_port" in refused.value.hint
    assert not job.pids() and not job.folder.state_file.exists()


@pytest.mark.parametrize(("address", "port"), [("127.0.0.1", 70000), ("192.0.2.1", None)])
def test_a_port_or_address_that_cannot_be_is_refused(job, address, port):
    with pytest.raises(UserError) as refused:
        job.run("", address=address, port=port)
    assert refused.value.hint


def test_a_display_that_fails_ends_the_ranks(job, is_alive):
    class Broken(RuntimeError):
        pass

    def fail(event):
        raise Broken

    job.events = type("Sink", (), {"append": staticmethod(fail)})()
    with pytest.raises(Broken):
        job.run(
            '(here / "pid0").write_text(str(os.getpid())); events.write("phase", name="x"); signal.pause()'
        )
    assert not any(map(is_alive, job.pids()))
    assert read_state(job.folder.state_file).status == "failed"


def test_an_unknown_program_is_a_user_error(job):
    from megaplug.launchers.local import run

    with pytest.raises(UserError, match="cannot start rank 0"):
        run(["/does/not/exist"], job.folder, 1, patience=Patience())


def test_what_a_rank_said_before_it_left_comes_first(job):
    """Its death and its last words may arrive in one moment, in either order."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    EventWriter(writer).write("end", status="finished", iteration=1)
    process = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(process.pid)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    rank = LocalRank(0, process, pidfd, reader, job.folder.log_file(0), 0, os.memfd_create("stack"))
    crew = LocalCrew([], job.folder, None, {})
    crew.ranks.append(rank)
    with selectors.DefaultSelector() as selector:
        crew.watch(selector)
        heard = [one.event and one.event["event"] for one in crew.news(selector, pidfd)]
    assert heard == ["end", None] and rank.exit_code == 0
    rank.close()
    os.close(writer)
