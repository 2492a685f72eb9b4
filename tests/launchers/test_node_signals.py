"""Signals to the launchers of a job on two nodes, and what a launcher that is killed leaves behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_nodes import FakeNodes, ended, read_until
from fake_ranks import IGNORES, SAVES, SAVES_ON_GO, WAITS, await_death, await_taken

from megaplug.launchers.stops import StopSignals
from megaplug.runs.state import read_state


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[FakeNodes]:
    job = FakeNodes(tmp_path)
    yield job
    job.end()


@pytest.mark.parametrize("to", ["leader", "agent"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_any_launcher_lets_all_ranks_save(
    nodes: FakeNodes, is_alive, to: str, number: signal.Signals
) -> None:
    leader = nodes.start_leader(SAVES + WAITS)
    read_until(leader, "ready")
    read_until(leader, "ready")
    (leader if to == "leader" else nodes.agents[0]).send_signal(number)
    assert ended(leader) == (128 + number, f"stopped saved after {number.name}")
    assert ended(nodes.agents[0]) == (128 + number, f"stopped: saved after {number.name}")
    state = read_state(nodes.folder.state_file)
    assert (state.status, state.saved_iteration, state.signal) == ("stopped", 5, number.name)
    assert len(nodes.pids()) == 4 and not any(map(is_alive, nodes.pids()))


@pytest.mark.parametrize(("first", "second"), [("agent", "leader"), ("leader", "agent")])
def test_a_ctrl_c_that_reaches_every_launcher_is_one(nodes: FakeNodes, first: str, second: str) -> None:
    """As SLURM sends a signal to all tasks of a step."""
    leader = nodes.start_leader(SAVES_ON_GO + WAITS)
    read_until(leader, "ready")
    read_until(leader, "ready")
    both = {"leader": leader, "agent": nodes.agents[0]}
    both[first].send_signal(signal.SIGINT)
    read_until(leader, "stopping")
    both[second].send_signal(signal.SIGINT)
    await_taken(both[second].pid, signal.SIGINT)
    (nodes.dir / "go").touch()
    assert ended(leader) == (130, "stopped saved after SIGINT")
    assert ended(nodes.agents[0]) == (130, "stopped: saved after SIGINT")
    assert read_state(nodes.folder.state_file).saved_iteration == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["leader", "agent"])
def test_a_ctrl_c_after_a_signal_to_the_same_launcher_ends_all_at_once(
    nodes: FakeNodes, to: str, number: signal.Signals
) -> None:
    leader = nodes.start_leader(IGNORES + WAITS, grace_s=1000)
    read_until(leader, "ready")
    read_until(leader, "ready")
    both = {"leader": leader, "agent": nodes.agents[0]}
    both[to].send_signal(number)
    read_until(leader, "stopping")
    sent = time.monotonic()
    both[to].send_signal(signal.SIGINT)
    code, said = ended(leader)
    by = "a second Ctrl-C" if number == signal.SIGINT else "Ctrl-C after SIGTERM"
    assert code == 130 and f"killed at once by {by}, without saving" in said
    assert ended(nodes.agents[0])[0] == 130
    assert time.monotonic() - sent < 5.0
    await_death(nodes.pids())


def test_a_second_ctrl_c_ends_a_node_though_the_leader_is_stopped(nodes: FakeNodes, is_alive) -> None:
    leader = nodes.start_leader(IGNORES + WAITS)
    read_until(leader, "ready")
    read_until(leader, "ready")
    leader.send_signal(signal.SIGSTOP)
    agent = nodes.agents[0]
    agent.send_signal(signal.SIGINT)
    await_taken(agent.pid, signal.SIGINT)
    agent.send_signal(signal.SIGINT)
    assert ended(agent)[0] == 130
    # It has not left them to end themselves.
    assert not any(map(is_alive, nodes.pids("pid*1")))


def test_a_signal_to_a_launcher_that_waits_for_others_ends_the_wait(nodes: FakeNodes) -> None:
    def tell(event: dict) -> None:
        if "has joined" in event["text"]:
            agent.send_signal(signal.SIGUSR2)

    with StopSignals() as signals, nodes.nodes(number=3) as others:
        agent = nodes.agent(1, others.place, WAITS, number=3)
        assert others.complete(signals, tell) == "signal"
        assert signals.pending() == signal.SIGUSR2
        others.dismiss(140, "over")
    assert ended(agent) == (140, "over")


def test_ranks_end_with_the_leader_and_the_other_launcher_says_why(nodes: FakeNodes) -> None:
    leader = nodes.start_leader(WAITS)
    read_until(leader, "ready")
    read_until(leader, "ready")
    leader.kill()
    said = "error: node 0 has gone: its launcher was killed, or it cannot be reached"
    assert ended(nodes.agents[0]) == (1, said)
    assert len(nodes.pids()) == 4
    await_death(nodes.pids())
