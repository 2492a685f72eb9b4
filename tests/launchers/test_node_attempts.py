"""A job on two nodes that is started again: who is there stays, and who has gone is waited for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fake_nodes import FakeNodes, ended
from fake_runs import FakeRun, whole

from megaplug.commands import attempts
from megaplug.launchers.supervisor import Patience
from megaplug.runs.state import read_state

# Rank 0 saves step 5, and waits where rank 1 fails; they meet at a pipe.
_FAILS_ONCE = """
if turn == 0 and rank == 0:
    train(7); open(here / "saved", "w").close(); signal.pause()
if turn == 0:
    open(here / "saved").close()
    {how}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    # Rank 0 is not waited for to say that it has lost the other.
    monkeypatch.setattr(attempts, "Patience", partial(Patience, report_s=0.3))
    os.mkfifo(tmp_path / "saved")
    return FakeRun(tmp_path, monkeypatch)


@pytest.fixture
def nodes(fake: FakeRun) -> Iterator[FakeNodes]:
    """The machines of that run."""
    job = FakeNodes(fake.place)
    job.folder = fake.folder
    yield job
    job.end()


def _agent(fake: FakeRun, nodes: FakeNodes, place: str, script: str) -> None:
    nodes.agent(1, place, "", command=[sys.executable, "-c", whole(script)], **fake.env)


def test_a_node_that_has_stayed_is_started_again_with_the_others(fake: FakeRun, nodes: FakeNodes) -> None:
    script = _FAILS_ONCE.format(how="os.kill(os.getpid(), signal.SIGKILL)")
    with nodes.nodes() as others:
        _agent(fake, nodes, others.place, script)
        course = fake.run(script, world_size=2, nodes=others)
        others.dismiss(course.outcome.exit_code, course.outcome.status)
    assert (course.outcome.status, course.outcome.iteration) == ("finished", 12)
    (restart,) = course.restarts.done
    assert (restart.kind, restart.rank, restart.from_iteration) == ("killed", 1, 5)
    assert fake.starts(0) == fake.starts(1) == 2
    assert ended(nodes.agents[0]) == (0, "finished")


def test_a_node_that_has_gone_is_replaced_by_one_that_comes(fake: FakeRun, nodes: FakeNodes) -> None:
    script = _FAILS_ONCE.format(how="os.kill(os.getppid(), signal.SIGKILL); signal.pause()")
    with nodes.nodes() as others:

        def when(event: dict) -> None:
            if event["event"] == "restart":
                _agent(fake, nodes, others.place, script)

        fake.when = when
        _agent(fake, nodes, others.place, script)
        course = fake.run(script, world_size=2, nodes=others)
        others.dismiss(course.outcome.exit_code, course.outcome.status)
    assert (course.outcome.status, fake.starts(1)) == ("finished", 2)
    (restart,) = course.restarts.done
    assert (restart.kind, restart.from_iteration) == ("node", 5)
    assert ended(nodes.agents[0])[0] == -signal.SIGKILL and ended(nodes.agents[1]) == (0, "finished")


def test_a_node_that_does_not_come_back_ends_the_run(fake: FakeRun, nodes: FakeNodes) -> None:
    script = _FAILS_ONCE.format(how="os.kill(os.getppid(), signal.SIGKILL); signal.pause()")
    with nodes.nodes(join_s=2.0) as others:
        _agent(fake, nodes, others.place, script)
        course = fake.run(script, world_size=2, nodes=others)
    outcome = course.outcome
    assert (outcome.status, outcome.kind, outcome.exit_code) == ("failed", "missing", 1)
    assert outcome.reason == "node 1 has not joined within 2 s (launch.join_s)"
    assert course.why_no_more == "a node has not come, and was waited for"
    state = read_state(fake.folder.state_file)
    assert state is not None
    assert (state.status, state.iteration, state.num_restarts, state.reason) == (
        "failed",
        5,
        1,
        outcome.reason,
    )
    assert fake.history() == ["start", "failure", "restart", "failure", "end"]


def test_a_node_that_never_comes_is_no_start(fake: FakeRun, nodes: FakeNodes) -> None:
    with nodes.nodes(join_s=0.1) as others:
        course = fake.run("", world_size=2, nodes=others)
    assert (course.outcome.kind, course.outcome.exit_code, course.restarts.done) == ("missing", 1, [])
    assert "launch.node_rank" in course.outcome.hint
    assert not (fake.place / "starts0").exists()


def test_a_signal_while_nodes_are_waited_for_is_a_stop(fake: FakeRun, nodes: FakeNodes) -> None:
    fake.when = lambda event: signal.raise_signal(signal.SIGUSR2)
    with nodes.nodes() as others:
        course = fake.run("", world_size=2, nodes=others)
    said = "stopped by SIGUSR2 before all nodes had joined"
    assert (course.outcome.status, course.outcome.exit_code, course.outcome.reason) == ("stopped", 140, said)
    state = read_state(fake.folder.state_file)
    assert state is not None and (state.status, state.signal) == ("stopped", "SIGUSR2")


def test_a_signal_to_another_node_ends_the_run_for_good(fake: FakeRun, nodes: FakeNodes) -> None:
    script = _FAILS_ONCE.format(how="os.kill(os.getppid(), signal.SIGTERM); signal.pause()")
    with nodes.nodes() as others:
        _agent(fake, nodes, others.place, script)
        course = fake.run(script, world_size=2, nodes=others)
        others.dismiss(course.outcome.exit_code, course.outcome.status)
    assert (course.outcome.status, course.outcome.exit_code, fake.starts()) == ("stopped", 143, 1)
    assert ended(nodes.agents[0]) == (143, "stopped")
