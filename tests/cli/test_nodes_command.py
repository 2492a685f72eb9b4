"""``launch=nodes`` as a person types it on two nodes, which here are one machine."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from live_command import Event, Live, await_nobody, joined_curve, only_run, started, train
from small_jobs import SMALL, SmallJobs, state

from megaplug.launchers.nodes import Nodes
from megaplug.launchers.stops import StopSignals
from megaplug.runs.checkpoints import list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import read_events


@pytest.fixture
def port() -> int:
    """One that was free a moment ago: both commands must be told it before either listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _job(small_jobs: SmallJobs, runs: Path) -> list[str]:
    places = [
        f"data.path={small_jobs.corpus}",
        f"data.cache_dir={small_jobs.root / 'cache'}",
        f"runs_dir={runs}",
    ]
    return [*SMALL, *places, "topology.pp=2", "train.iters=8", "train.eval_iters=1"]


@pytest.fixture
def words(small_jobs: SmallJobs, tmp_path: Path, port: int) -> list[str]:
    """That job on two nodes, with its runs below ``tmp_path``."""
    launch = ["launch=nodes", "launch.nnodes=2", "launch.master_addr=127.0.0.1", f"launch.master_port={port}"]
    return [*_job(small_jobs, tmp_path / "runs"), *launch]


def _node(number: int) -> str:
    return f"launch.node_rank={number}"


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (1, ["launch.nnodes=null"], "launch.nnodes: is not given"),
        (0, ["launch.master_addr=null"], "launch.master_addr: is not given"),
        (1, ["launch.master_addr="], "launch.master_addr: is not given"),
        (1, ["launch.master_port=null"], "launch.master_port: the other nodes cannot know"),
        (2, [], "launch.node_rank: is 2, and there are 2 nodes"),
        (-1, [], "launch.node_rank: is -1, and there are 2 nodes"),
        (0, ["launch.nnodes=3"], "launch.nnodes: 2 ranks cannot be shared out among 3 nodes"),
        (1, ["topology.pp=1", "topology.tp=2"], "launch.within_node=[cp] allows it"),
        (0, ["launch.within_node=[pq]"], "pq is no process group"),
        (1, ["launch.join_s=-1"], "launch.join_s: must be above 0"),
        (1, ["launch=local"], "launch.nnodes: means nothing on this machine alone"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], number: int, changes: list[str], says: str) -> None:
    typed = [
        word for word in words if word.partition("=")[0] not in {one.partition("=")[0] for one in changes}
    ]
    done = train(*typed, _node(number), *changes)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_no_number_is_asked_for(words: list[str]) -> None:
    done = train(*words)
    assert (done.returncode, done.stderr) == (
        2,
        "error: launch.node_rank: is not given: which of them this is, from 0\n",
    )


@pytest.mark.parametrize("address", ["no.such.name.invalid", "x" * 70, "192.0.2.1"])
def test_a_leader_at_another_address_than_its_own_is_one_message(words: list[str], address: str) -> None:
    done = train(*words, _node(0), f"launch.master_addr={address}")
    assert done.returncode == 2 and done.stderr.startswith("error: launch.master_addr: ")
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_message(words: list[str], port: int) -> None:
    with socket.create_server(("0.0.0.0", port)):
        done = train(*words, _node(0))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: launch.master_port: port {port} of 127.0.0.1 is in use")
    assert "the same on every node" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1", "no.such.name.invalid", "x" * 70])
def test_a_leader_that_does_not_come_is_one_message_with_its_address(
    words: list[str], port: int, address: str
) -> None:
    done = train(*words, _node(1), "launch.join_s=1", f"launch.master_addr={address}")
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: node 0 at {address}:{port} was not reached within 1 s (launch.join_s): "
    )
    assert "hint: " in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("waiting for node 0") <= 1


@pytest.mark.parametrize(
    ("said", "why"),
    [(b"", "it takes no nodes in yet"), (b"220 ESMTP\r\n", "what listens there is no launcher of megaplug")],
)
def test_what_else_may_listen_at_the_leaders_port_is_told(
    words: list[str], port: int, said: bytes, why: str
) -> None:
    with socket.create_server(("127.0.0.1", port)) as server, started([*words, _node(1)]) as process:
        connection, _ = server.accept()
        with connection:
            connection.sendall(said)
            assert process.stdout is not None
            assert process.stdout.readline() == f"waiting for node 0 at 127.0.0.1:{port}: {why}\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130


def test_a_leader_that_names_another_run_is_refused(words: list[str], port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as server, started([*words, _node(1)]) as process:
        connection, _ = server.accept()
        with connection:
            greeting = {"kind": "greeting", "run": "small-0/../../etc\0", "challenge": "c"}
            connection.sendall(json.dumps(greeting).encode() + b"\n")
            _, err = process.communicate(timeout=60)
            said = json.loads(connection.recv(1 << 16))
    assert process.returncode == 2
    assert err == "error: node 0 runs small-0/../../etc?, and this node was told of name=small\n"
    assert said["kind"] == "leave" and "error: " + said["reason"] + "\n" == err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_waits_for_its_leader_ends_at_a_signal(words: list[str], number: signal.Signals) -> None:
    with started([*words, _node(1)]) as process:
        assert process.stdout is not None
        assert "waiting for node 0 at 127.0.0.1" in process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        128 + number,
        f"interrupted by {number.name} before node 0 was reached\n",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_leader_that_waits_for_its_nodes_ends_at_a_signal(
    words: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    with Live([*words, _node(0)]) as live:
        live.until(lambda event: "node 1 has not joined yet" in event.get("text", ""))
        live.process.send_signal(number)
        assert live.end() == 128 + number
    said = f"stopped by {number.name} before all nodes had joined"
    assert live.summary["reason"] == said
    folder = only_run(tmp_path / "runs")
    assert (state(folder).status, state(folder).reason) == ("stopped", said)


def test_a_leader_whose_nodes_do_not_come_says_which(words: list[str], tmp_path: Path) -> None:
    done = train(*words, _node(0), "launch.join_s=1")
    assert done.returncode == 1
    assert "node 1 has not joined within 1 s (launch.join_s)" in done.stdout
    assert "   # on every node: starts again: nothing was saved" in done.stdout
    assert "Traceback" not in done.stderr
    assert state(only_run(tmp_path / "runs")).status == "failed"


def test_a_node_whose_job_is_another_is_refused_and_both_say_in_what(words: list[str]) -> None:
    with Live([*words, _node(0)]) as leader:
        leader.until(lambda event: "not joined yet" in event.get("text", ""))
        done = train(*words, _node(1), "lr.lr=0.5", "watch.max_restarts=3")
        assert done.returncode == 2
        assert done.stderr.startswith(
            "error: the job of node 1 is not that of node 0: lr.lr is 0.5 on node 1 and "
        )
        assert "type the same command on all nodes" in done.stderr
        told = leader.until(lambda event: "refused" in event.get("text", ""))
        assert (
            "refused 127.0.0.1: the job of node 1 is not that of node 0: lr.lr is 0.5 on node 1"
            in told["text"]
        )
        leader.process.send_signal(signal.SIGINT)
        assert leader.end() == 130


def test_a_node_is_not_asked_for_its_job_where_nothing_is_to_be_done(
    words: list[str], tmp_path: Path, port: int
) -> None:
    """The folder of a run that has finished may be another version's."""
    folder = RunFolder(tmp_path / "runs" / "small-00000000")
    folder.path.mkdir(parents=True)
    folder.job_file.write_text("format: 0")
    nodes = Nodes(folder, 2, 1, "127.0.0.1", port, 30.0)
    with nodes, StopSignals() as signals, started([*words, _node(1)]) as agent:
        assert nodes.complete(signals, lambda event: None, is_over=True) == ""
        nodes.dismiss(0, "nothing to do")
        code, lines, err = _ended(agent)
    assert (code, lines[-1], err) == (0, "nothing to do", "")


def test_a_node_that_cannot_read_the_frozen_job_is_refused_and_both_say_so(
    words: list[str], tmp_path: Path, port: int
) -> None:
    folder = RunFolder(tmp_path / "runs" / "small-00000000")
    folder.path.mkdir(parents=True)
    folder.job_file.write_text("format: 0")
    notes: list[str] = []

    def tell(event: Event) -> None:
        notes.append(event["text"])
        if "refused" in event["text"]:
            signal.raise_signal(signal.SIGTERM)

    nodes = Nodes(folder, 2, 1, "127.0.0.1", port, 30.0)
    with nodes, StopSignals() as signals, started([*words, _node(1)]) as agent:
        assert nodes.complete(signals, tell) == "signal"
        code, _, err = _ended(agent)
    assert code == 1 and "is not a frozen job of format" in err
    assert notes[-1].startswith("refused 127.0.0.1: ") and "is not a frozen job of format" in notes[-1]


def test_a_node_that_sees_another_disk_is_refused_and_both_say_so(words: list[str], tmp_path: Path) -> None:
    with Live([*words, _node(0)]) as leader:
        leader.until(lambda event: "not joined yet" in event.get("text", ""))
        done = train(*words, _node(1), f"runs_dir={tmp_path / 'elsewhere'}")
        assert done.returncode == 1 and "a disk that all nodes share" in done.stderr
        assert (
            "nodes.key cannot be read"
            in leader.until(lambda event: "refused" in event.get("text", ""))["text"]
        )
        leader.process.send_signal(signal.SIGINT)
        leader.end()


def _ended(agent: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit code, the lines that were printed, and what was said on stderr."""
    out, err = agent.communicate(timeout=120)
    return agent.returncode, out.splitlines(), err


def _both(words: Sequence[str], *more: str) -> tuple[tuple[int, list[str], str], Live]:
    """The same command on both nodes, to its end: how node 1 has ended, and node 0."""
    with Live([*words, *more, _node(0)]) as leader, started([*words, *more, _node(1)]) as agent:
        leader.end()
        return _ended(agent), leader


@pytest.fixture(scope="module")
def undisturbed(small_jobs: SmallJobs, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same job on one machine."""
    runs = tmp_path_factory.mktemp("local") / "runs"
    done = train(*_job(small_jobs, runs), timeout_s=240.0)
    assert done.returncode == 0, done.stderr
    return only_run(runs)


@pytest.mark.slow
def test_two_nodes_compute_what_one_does_and_a_finished_run_ends_at_once_on_both(
    words: list[str], tmp_path: Path, undisturbed: RunFolder
) -> None:
    (code, lines, err), leader = _both(words)
    assert (code, err, leader.process.returncode) == (0, "", 0), (lines, leader.summary)
    assert lines[-1] == "finished: all steps are done"
    folder = only_run(tmp_path / "runs")
    assert joined_curve(folder) == joined_curve(undisturbed)
    assert [rank for rank in (0, 1) if folder.log_file(rank).stat().st_size] == [0, 1]
    begun = time.monotonic()
    (code, lines, err), leader = _both(words)
    assert (code, err, leader.process.returncode) == (0, "", 0), (lines, leader.stderr())
    assert lines[-1] == "node 0 says that there is nothing to do"
    assert "is finished: 8 of 8 steps" in leader.summary["reason"]
    assert time.monotonic() - begun < 60.0
    assert [event["event"] for event in read_events(folder.events_file)] == ["start", "end"]


@pytest.mark.slow
def test_a_node_whose_launcher_is_killed_ends_the_run_and_both_commands_again_go_on(
    words: list[str], tmp_path: Path, undisturbed: RunFolder
) -> None:
    more = ["checkpoint.save_interval=3", "watch.max_restarts=0"]
    with Live([*words, *more, _node(0)]) as leader, started([*words, *more, _node(1)]) as agent:
        leader.until_step(5)
        agent.kill()
        agent.communicate()
        assert leader.end() == 1
    assert "node 1 (" in leader.summary["reason"] and "has gone" in leader.summary["reason"]
    folder = only_run(tmp_path / "runs")
    await_nobody(folder)
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [3]
    (code, lines, _), leader = _both(words, *more)
    assert (code, leader.process.returncode) == (0, 0), (lines, leader.summary)
    assert joined_curve(folder) == joined_curve(undisturbed)
