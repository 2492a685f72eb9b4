"""Who may take part in a job on several nodes, and what becomes of who may not."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from fake_nodes import FakeNodes, connected, ended

from megaplug.errors import UserError
from megaplug.launchers import handshake, nodes
from megaplug.launchers.handshake import Guest, RefusedError, accept, greeted, join, printable
from megaplug.launchers.nodes import Nodes, read_key
from megaplug.launchers.ranks import Share
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.wire import Message, Wire
from megaplug.runs.folder import RunFolder

_WAITS = "signal.pause()"
_NOT_A_LAUNCHER = "it does not answer as a launcher does"
_WITHOUT_THE_KEY = b'{"kind": "join", "proof": %s, "challenge": "c", "node": 1, "nnodes": 2}\n'


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[FakeNodes]:
    job = FakeNodes(tmp_path)
    yield job
    job.end()


def _port(others: Nodes) -> int:
    return int(others.place.rpartition(":")[2])


def _say(stranger: socket.socket, said: bytes) -> None:
    with contextlib.suppress(OSError):  # it may be hung up on
        stranger.sendall(said)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", _NOT_A_LAUNCHER),
        (b"\x16\x03\x01\x00\xff\n", _NOT_A_LAUNCHER),
        (b"[" * 60_000 + b"\n", _NOT_A_LAUNCHER),
        (b"x" * 1_000_000, _NOT_A_LAUNCHER),
        (b'{"kind": "exit", "rank": 1}\n', _NOT_A_LAUNCHER),
        (b"", _NOT_A_LAUNCHER),
        (_WITHOUT_THE_KEY % b'"0000"', "it does not know the run's key"),
        (_WITHOUT_THE_KEY % b"null", "it does not know the run's key"),
        (_WITHOUT_THE_KEY % b'"\\ud800"', "it does not know the run's key"),
        (b'{"kind": "leave", "reason": "another\\u001b[2J job\\n\\ud800"}\n', "another?[2J job ?"),
    ],
)
def test_a_stranger_is_refused_with_a_note_and_the_job_comes_about(
    fakes: FakeNodes, monkeypatch: pytest.MonkeyPatch, said: bytes, told: str
) -> None:
    monkeypatch.setattr(handshake, "_JOIN_S", 60.0 if said else 0.1)
    notes: list[str] = []

    def tell(event: dict) -> None:
        notes.append(event["text"])
        if event["text"].startswith("refused"):
            monkeypatch.setattr(handshake, "_JOIN_S", 60.0)
            fakes.agent(1, others.place, _WAITS)

    with fakes.nodes() as others, socket.create_connection(("127.0.0.1", _port(others))) as stranger:
        sender = threading.Thread(target=_say, args=(stranger, said))
        sender.start()
        with StopSignals() as signals:
            assert others.complete(signals, tell) == ""
        sender.join()
    assert notes[1:] == [f"refused 127.0.0.1: {told}", "node 1 (host1) has joined"]


def test_who_says_nothing_keeps_nobody_waiting(fakes: FakeNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is silent, nor so many that no more can be kept."""
    monkeypatch.setattr(nodes, "_MAX_GUESTS", 3)
    notes: list[str] = []
    with fakes.nodes() as others:
        silent = [socket.create_connection(("127.0.0.1", _port(others))) for _ in range(8)]
        fakes.agent(1, others.place, _WAITS)
        with StopSignals() as signals:
            assert others.complete(signals, lambda event: notes.append(event["text"])) == ""
        for one in silent:
            one.close()
    assert notes.count("refused 127.0.0.1: too many others have come, and it is silent") >= 5
    assert notes[-1] == "node 1 (host1) has joined"


@pytest.mark.parametrize(
    ("node", "number", "why"),
    [
        (1, 3, "it was started with launch.nnodes=3, and node 0 with 2"),
        (2, 2, "there is no node 2 among 2"),
        (0, 2, "there is no node 0 among 2"),
    ],
)
def test_a_node_of_another_number_is_refused_and_both_say_why(
    fakes: FakeNodes, node: int, number: int, why: str
) -> None:
    notes: list[str] = []

    def tell(event: dict) -> None:
        notes.append(event["text"])
        if event["text"].startswith("refused"):
            fakes.agent(1, others.place, _WAITS)

    with fakes.nodes() as others, StopSignals() as signals:
        fakes.agent(node, others.place, _WAITS, number=number)
        assert others.complete(signals, tell) == ""
    assert f"refused 127.0.0.1: {why}" in notes
    assert ended(fakes.agents[0]) == (1, f"refused: {why}")


def test_a_number_that_is_taken_is_refused_until_its_holder_has_gone(fakes: FakeNodes) -> None:
    notes: list[str] = []

    def tell(event: dict) -> None:
        notes.append(event["text"])
        if event["text"].startswith("refused"):
            fakes.agents[0].kill()
        elif len(fakes.agents) < 3:
            # The second comes while the first is there, and the third after it has gone.
            fakes.agent(1, others.place, _WAITS, number=3)
        else:
            fakes.agent(2, others.place, _WAITS, number=3)

    with fakes.nodes(number=3) as others, StopSignals() as signals:
        assert others.complete(signals, tell) == ""
    assert notes == [
        f"nodes 1, 2 have not joined yet, at {others.place}",
        "node 1 (host1) has joined",
        "refused 127.0.0.1: node 1 (host1) has joined already",
        "node 1 (host1) has gone",
        "node 1 (host1) has joined",
        "node 2 (host2) has joined",
    ]


def test_a_node_that_does_not_come_is_named_after_the_time_it_was_given(fakes: FakeNodes) -> None:
    notes: list[str] = []
    with StopSignals() as signals:
        with fakes.nodes(2, join_s=0.1) as others:
            why = others.complete(signals, lambda event: notes.append(event["text"]))
            assert why == "node 1 has not joined within 0.1 s (launch.join_s)"
            assert notes == [f"node 1 has not joined yet, at {others.place}"]
        with fakes.nodes(12, join_s=0.1) as others:
            why = others.complete(signals, lambda event: None)
            assert why.startswith("nodes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more have not joined")


def test_a_signal_ends_the_wait_for_nodes(fakes: FakeNodes) -> None:
    with StopSignals() as signals, fakes.nodes() as others:
        why = others.complete(signals, lambda event: os.kill(os.getpid(), signal.SIGTERM))
        assert (why, signals.pending()) == ("signal", signal.SIGTERM)


def test_nodes_that_have_joined_are_told_why_node_0_gives_up(fakes: FakeNodes) -> None:
    with pytest.raises(UserError), StopSignals() as signals, fakes.nodes() as others:
        fakes.agent(1, others.place, _WAITS)
        assert others.complete(signals, lambda event: None) == ""
        raise UserError("the disk is full")
    assert ended(fakes.agents[0]) == (1, "node 0 has failed: the disk is full")


def test_only_the_owner_can_read_the_key_and_each_start_has_its_own(fakes: FakeNodes) -> None:
    with fakes.nodes():
        first = read_key(fakes.folder)
        assert stat.S_IMODE(fakes.folder.nodes_key.stat().st_mode) == 0o600
    with fakes.nodes():
        assert len(first) == 64 and read_key(fakes.folder) != first
    with pytest.raises(UserError, match="cannot be read") as error:
        read_key(RunFolder(fakes.dir / "elsewhere"))
    assert "a disk that all nodes share" in error.value.hint


def test_a_port_that_is_taken_is_said_and_nothing_stays_open(fakes: FakeNodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*in use") as refused:
            Nodes(fakes.folder, 2, 1, "127.0.0.1", port, 1.0)
    assert refused.value.hint == "take another, the same on every node"


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.name.invalid", "x" * 70])
def test_an_address_that_is_not_of_node_0_is_said(fakes: FakeNodes, address: str) -> None:
    with pytest.raises(UserError, match=r"launch\.master_addr: .*(not an address of this|not known here)"):
        fakes.nodes(address=address)


class _Leader:
    """Node 0 as a test needs it.

    Args:
        fakes: Whose agent connects.
    """

    def __init__(self, fakes: FakeNodes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            fakes.agent(1, f"127.0.0.1:{server.getsockname()[1]}", 'events.write("here"); signal.pause()')
            self.socket = server.accept()[0]
        self.wire = Wire(self.socket)

    def __enter__(self) -> _Leader:
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.close()

    def answer(self, key: str, run: str) -> Message:
        """Greet, and hear the answer."""
        guest = Guest(self.wire, "", run)
        assert select.select([self.socket], [], [], 10.0)[0]
        said = guest.answer(key)
        assert said is not None
        return said


def test_a_leader_that_does_not_know_the_key_is_refused(fakes: FakeNodes) -> None:
    fakes.folder.nodes_key.write_text("the key")
    with _Leader(fakes) as leader:
        said = leader.answer("the key", fakes.folder.name)
        accept(leader.wire, "another", said)
        assert ended(fakes.agents[0]) == (1, "refused: it does not know the key in the run's folder")


class _Kept:
    """In place of a wire: what was to be sent, so that it can be sent in one piece."""

    def __init__(self) -> None:
        self.lines = b""

    def trust(self) -> None:
        pass

    def send(self, kind: str, **values: object) -> None:
        self.lines += json.dumps({"kind": kind, **values}).encode() + b"\n"


def test_what_comes_in_one_piece_with_the_welcome_is_done_as_well(fakes: FakeNodes) -> None:
    fakes.folder.nodes_key.write_text("the key")
    with _Leader(fakes) as leader:
        said = leader.answer("the key", fakes.folder.name)
        kept = _Kept()
        accept(kept, "the key", said)  # type: ignore[arg-type]
        kept.send("start", share=asdict(Share(2, 1, 1, "127.0.0.1", 1)))
        leader.socket.sendall(kept.lines)
        heard = leader.wire.receive_one(10.0)
        assert heard is not None and (heard["kind"], heard["rank"]) == ("event", 1)
        assert heard["event"]["event"] == "here"


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "unheard of"},
        {"kind": "start"},
        {"kind": "start", "share": {"first": 1}},
        {"kind": "start", "share": asdict(Share(2, 1, 1, "127.0.0.1", 1)) | {"more": 1}},
        {"kind": "start", "share": asdict(Share(2, 1, 1, "127.0.0.1", 1)) | {"number": "1"}},
        {"kind": "signal", "number": 999},
        {"kind": "ask", "ranks": 3, "wait_s": 1},
        {"kind": "end", "wait_s": "soon"},
        {"kind": "over", "exit_code": "zero", "text": ""},
    ],
)
def test_a_leader_that_cannot_be_understood_is_an_error_and_no_traceback(
    fakes: FakeNodes, message: Message
) -> None:
    fakes.folder.nodes_key.write_text("the key")
    with _Leader(fakes) as leader:
        accept(leader.wire, "the key", leader.answer("the key", fakes.folder.name))
        leader.socket.sendall(json.dumps(message).encode() + b"\n")
        code, said = ended(fakes.agents[0])
    assert code == 1
    assert said.startswith("error: node 0 says what this node does not understand: ")
    assert message["kind"] in said


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what listens there is no launcher of megaplug"),
        (b'{"kind": "welcome"}\n', "what listens there is no launcher of megaplug"),
        (b"", "it has hung up"),
    ],
)
def test_what_greets_in_another_way_is_no_leader(said: bytes, why: str) -> None:
    near, far = connected()
    with Wire(near) as wire:
        assert greeted(wire) is None
        far.sendall(said)
        far.close()
        assert select.select([near], [], [], 5.0)[0]
        with pytest.raises(RefusedError, match=why):
            greeted(wire)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b'{"kind": "refused", "reason": "full\\u0007"}\n', r"full\?"),
        (b'{"kind": "welcome", "proof": "\\ud800"}\n', "does not know the key"),
        (b'{"kind": "welcome"}\n', "does not know the key"),
        (b"", "silent for 0.1 s"),
        (None, "hung up"),
    ],
)
def test_who_is_not_taken_in_hears_why(monkeypatch: pytest.MonkeyPatch, said: bytes | None, why: str) -> None:
    monkeypatch.setattr(handshake, "_WELCOME_S", 0.1)
    near, far = connected()
    with Wire(near) as wire, far:
        if said is None:
            far.close()
        else:
            far.sendall(said)
        with pytest.raises(RefusedError, match=why):
            join(wire, "the key", {"kind": "greeting", "challenge": "\ud800"}, node=1)


def test_what_is_shown_of_strangers_is_one_line_that_no_terminal_obeys() -> None:
    assert printable("a\n b\x1b[2J\ud800") == "a b?[2J?"
    assert len(printable("x" * 10_000)) == 500
