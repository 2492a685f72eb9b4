"""One job on several nodes: who runs which ranks, and what the leader hears of those elsewhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_nodes import FakeNodes, ended
from fake_ranks import WAITS, await_death

from megaplug.launchers import interfaces, remote
from megaplug.launchers.hang import Limits
from megaplug.launchers.local import meeting_at
from megaplug.launchers.supervisor import Patience

# Ranks that say where they are, and of which one fails only when all are there.
_ALL_ARE_HERE = """
(here / f"pid{rank}").write_text(str(os.getpid()))
while len(list(here.glob("pid*"))) < int(os.environ["WORLD_SIZE"]): os.sched_yield()
"""
_TRAINS = """
import faulthandler
from megaplug.runs.events import STACK_FD, STACK_SIGNAL
faulthandler.register(STACK_SIGNAL, file=int(os.environ[STACK_FD]), all_threads=True)
(here / f"pid{rank}").write_text(str(os.getpid()))
# The rank of node 0 has done more: it waits for the other.
events.write("beat", progress=9 - rank, iteration=8 - rank, phase="training")
events.write("ready")
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[FakeNodes]:
    job = FakeNodes(tmp_path)
    yield job
    job.end()


def test_the_ranks_of_all_nodes_are_one_job(nodes: FakeNodes) -> None:
    outcome = nodes.lead(
        """
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR".split()
events.write("env", values=[os.environ[name] for name in names], port=os.environ["MASTER_PORT"],
             serves="MEGAPLUG_STORE_FD" in os.environ)
events.write("step", iteration=2, loss=float("nan"), iters=2)
events.write("saved", iteration=2, seconds=0.1)
print("written by", rank)
events.write("end", status="finished", iteration=2, reason="all steps are done")
""",
        per_node=2,
        number=3,
        iters=2,
    )
    assert (outcome.status, outcome.exit_code, outcome.iteration, outcome.saved_iteration) == (
        "finished",
        0,
        2,
        2,
    )
    told = nodes.of("env")
    assert [event["values"] for event in told] == [
        [str(rank), str(rank % 2), "6", "2", "127.0.0.1"] for rank in range(6)
    ]
    assert len({event["port"] for event in told}) == 1
    assert [event["serves"] for event in told] == [True, False, False, False, False, False]
    assert [event["rank"] for event in nodes.of("step")] == [0, 1, 2, 3, 4, 5]
    for rank in range(6):
        log = nodes.folder.log_file(rank).read_text()
        assert f"rank {rank} of 6" in log and log.endswith(f"written by {rank}\n")
    assert {"node 1 (host1) has joined", "node 2 (host2) has joined"} < set(nodes.notes)
    assert [ended(agent) for agent in nodes.agents] == [(0, "finished: all steps are done")] * 2


def test_all_ranks_meet_at_rank_zero_at_the_address_by_which_each_node_knows_its_machine(
    nodes: FakeNodes,
) -> None:
    script = """
import socket
place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:
    server = socket.socket(fileno=int(os.environ["MEGAPLUG_STORE_FD"]))
    server.accept()[0].sendall(b"hello")
else:
    assert place[0] == "127.0.0.2" and socket.create_connection(place).recv(5) == b"hello"
events.write("end", status="finished")
"""
    assert nodes.lead(script, reached_at="127.0.0.2").status == "finished"


def test_gloo_and_nccl_are_told_the_interface_on_which_the_launchers_talk(
    nodes: FakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in interfaces.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert meeting_at("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert meeting_at("192.0.2.1") == {}
    tells = """
events.write("env", name=os.environ.get("NCCL_SOCKET_IFNAME"))
events.write("end", status="finished")
"""
    nodes.lead(tells)
    assert nodes.of("env")[0]["name"] == "lo"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    nodes.lead(tells)
    assert nodes.of("env")[1]["name"] == "mine"


def test_a_rank_that_fails_elsewhere_is_named_with_its_last_lines_and_what_they_suggest(
    nodes: FakeNodes, is_alive
) -> None:
    script = _ALL_ARE_HERE + 'if rank == 3: raise OSError(28, "No space left on device")\nsignal.pause()\n'
    outcome = nodes.lead(script, per_node=2)
    assert (outcome.status, outcome.rank, outcome.exit_code) == ("failed", 3, 1)
    assert outcome.reason == "rank 3 ended with exit code 1"
    assert outcome.log_tail[-1] == "OSError: [Errno 28] No space left on device"
    assert "is full" in outcome.hint
    assert len(nodes.pids()) == 4 and not any(map(is_alive, nodes.pids()))
    assert ended(nodes.agents[0]) == (1, f"failed: {outcome.reason}")


def test_what_a_rank_elsewhere_says_of_its_failure_is_the_reason_and_its_log_is_shown_though_it_stays(
    nodes: FakeNodes,
) -> None:
    script = """
if rank == 1:
    print("the cause", flush=True)
    events.write("end", status="failed", reason="no data", kind="data")
signal.pause()
"""
    outcome = nodes.lead(script)
    assert (outcome.reason, outcome.rank, outcome.kind) == ("rank 1 failed: no data", 1, "data")
    assert outcome.log_tail == ("the cause",) and outcome.hint == ""


def test_a_killed_launcher_is_a_node_that_has_gone_and_nobody_is_left(nodes: FakeNodes) -> None:
    def kill(event: dict) -> None:
        if len(nodes.of("ready")) == 2:
            nodes.agents[0].kill()

    outcome = nodes.lead(WAITS, when=kill)
    assert (outcome.status, outcome.kind, outcome.rank, outcome.exit_code) == ("failed", "node", 1, 1)
    assert "node 1 (host1) has gone: its launcher was killed" in outcome.reason
    assert len(nodes.pids()) == 4
    await_death(nodes.pids())


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGSTOP)", "while True: pass"])
def test_a_rank_elsewhere_that_hangs_is_found_and_shown(nodes: FakeNodes, is_alive, how: str) -> None:
    script = f"{_TRAINS}\ndef culprit():\n    {how}\nculprit() if rank == 1 else signal.pause()\n"
    patience = Patience(report_s=0.5, stack_s=3.0, limits=Limits(hang_s=0.5))
    outcome = nodes.lead(script, patience=patience)
    assert (outcome.status, outcome.kind, outcome.rank) == ("failed", "hang", 1)
    assert outcome.reason.startswith("rank 1 hangs: training after step ")
    is_stopped = "SIGSTOP" in how
    assert ("it is stopped" if is_stopped else "it stands in culprit (<string>:") in outcome.reason
    written = nodes.folder.stack_file(1).read_text()
    assert ("no stack" if is_stopped else "in culprit") in written
    assert ("(rank 0)" if is_stopped else "(ranks 0, 1)") in outcome.hint
    assert not any(map(is_alive, nodes.pids()))


def test_a_rank_that_is_stopped_is_found_though_the_others_go_on(nodes: FakeNodes) -> None:
    """As a rank of a job whose others wait for it with a limit that is longer."""
    script = (
        f"{_TRAINS}\nif rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
        + """
step = 100
while True:
    time.sleep(0.05)  # the work of a step: without it beats would come as fast as they are written
    step += 1
    events.write("beat", progress=step, iteration=8, phase="training")
"""
    )
    outcome = nodes.lead(script, patience=Patience(stack_s=0.1, limits=Limits(hang_s=1.0)))
    assert (outcome.kind, outcome.rank) == ("hang", 1) and "it is stopped" in outcome.reason


def test_a_launcher_that_is_stopped_does_not_hold_the_leader(
    nodes: FakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_ANSWER_S", 0.2)

    def stop(event: dict) -> None:
        if event["event"] == "ready" and len(nodes.of("ready")) == 2:
            nodes.agents[0].send_signal(signal.SIGSTOP)

    begun = time.monotonic()
    patience = Patience(stack_s=0.2, kill_s=0.2, limits=Limits(hang_s=0.5))
    outcome = nodes.lead(_TRAINS + "signal.pause()", when=stop, patience=patience)
    assert (outcome.status, outcome.kind, outcome.rank) == ("failed", "hang", 1)
    assert outcome.reason.endswith("and the launcher of its node does not answer")
    assert time.monotonic() - begun < 10.0
    nodes.agents[0].send_signal(signal.SIGCONT)
    assert ended(nodes.agents[0])[0] == 1
    await_death(nodes.pids())


def test_a_program_that_a_node_lacks_is_said_with_its_name(nodes: FakeNodes, is_alive) -> None:
    outcome = nodes.lead(WAITS, agent_command=["/does/not/exist"])
    assert (outcome.status, outcome.kind, outcome.rank) == ("failed", "config", 1)
    said = "node 1 (host1): cannot start rank 1: No such file or directory: /does/not/exist"
    assert outcome.reason == f"rank 1 failed: {said}"
    assert not any(map(is_alive, nodes.pids()))
    assert ended(nodes.agents[0])[0] == 1


def test_logs_that_a_node_cannot_write_are_said_with_what_would_help(nodes: FakeNodes) -> None:
    # Of two ranks there the first has been started already.
    nodes.folder.log_file(3).mkdir()
    outcome = nodes.lead("signal.pause()", per_node=2)
    log = nodes.folder.log_file(3)
    assert outcome.reason == f"rank 2 failed: node 1 (host1): cannot write {log}: Is a directory"
    nodes.folder.log_file(3).rmdir()
    nodes.folder.log_file(3).symlink_to("/dev/full")
    outcome = nodes.lead("signal.pause()", per_node=2)
    assert "No space left on device" in outcome.reason and outcome.hint.startswith("free some space")


def test_a_state_that_cannot_be_written_ends_all_nodes(nodes: FakeNodes) -> None:
    nodes.folder.state_file.mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*state\.json"):
        nodes.lead(WAITS)
    code, said = ended(nodes.agents[0])
    assert code == 1 and said.startswith("node 0 has failed: cannot write ")


def test_the_leader_keeps_nothing_open(nodes: FakeNodes) -> None:
    def open_files() -> int:
        nodes.end()
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    nodes.lead("sys.exit(3)")
    before = open_files()
    nodes.lead("sys.exit(3)", number=3)
    assert open_files() == before
