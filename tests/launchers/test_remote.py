"""Ranks of another machine as node 0 sees them: what its launcher says, and what it should not have said."""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Iterator

import pytest
from fake_nodes import connected

from megaplug.launchers import remote
from megaplug.launchers.crew import LastWords
from megaplug.launchers.ranks import Share
from megaplug.launchers.remote import RemoteCrew
from megaplug.launchers.stacks import UNKNOWN, Stand
from megaplug.launchers.wire import Wire

SHARE = Share(world_size=4, first=2, number=2, address="127.0.0.1", port=1)


class Far:
    """The other machine, which says what it is told to."""

    def __init__(self) -> None:
        near, self.socket = connected()
        self.wire = Wire(near)
        self.wire.trust()
        self.crew = RemoteCrew(self.wire, "node 1 (there)")
        self.crew.start(SHARE, None)

    def says(self, *messages: dict | bytes) -> None:
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in messages]
        self.socket.sendall(b"".join(line + b"\n" for line in lines))

    def news(self) -> list[tuple[int | None, str | None]]:
        """What the crew makes of it, after it has hung up or not."""
        with selectors.DefaultSelector() as selector:
            self.crew.watch(selector)
            ((key, _),) = selector.select(5.0)
            found = self.crew.news(selector, key.fd)
        return [(one.rank and one.rank.rank, one.event and one.event["event"]) for one in found]


@pytest.fixture
def far() -> Iterator[Far]:
    machine = Far()
    yield machine
    machine.wire.close()
    machine.socket.close()


def _failed_words() -> dict:
    return {"lines": ["the cause"], "hint": "what helps"}


def test_what_ranks_say_and_how_they_end_is_news_of_them(far: Far) -> None:
    far.says(
        {"kind": "event", "rank": 3, "event": {"event": "step", "rank": 7}},
        {"kind": "stopped", "rank": 2, "is_stopped": True},
        {"kind": "exit", "rank": 3, "code": -9, "words": _failed_words()},
        {"kind": "asked to stop", "signal": 15},
    )
    assert far.news() == [(3, "step"), (3, None), (None, "asked to stop")]
    second, third = far.crew.ranks
    assert far.crew.is_stopped(second) and not far.crew.is_stopped(third)
    assert third.exit_code == -9 and far.crew.last_words(third, "") == LastWords(("the cause",), "what helps")


@pytest.mark.parametrize(
    "message",
    [
        b"no JSON",
        {"kind": "unheard of"},
        {"kind": "event"},
        {"kind": "event", "rank": 3},
        {"kind": "event", "rank": 1, "event": {"event": "step"}},  # another machine's
        {"kind": "event", "rank": -1, "event": {"event": "step"}},
        {"kind": "event", "rank": [], "event": {"event": "step"}},
        {"kind": "event", "rank": 3, "event": "step"},
        {"kind": "event", "rank": 3, "event": {}},
        {"kind": "event", "rank": 3, "event": {"event": 3}},
        {"kind": "exit", "rank": 3, "code": None, "words": _failed_words()},
        {"kind": "exit", "rank": 3, "code": 1},
        {"kind": "exit", "rank": 3, "code": 1, "words": {"lines": None}},
        {"kind": "asked to stop", "signal": 99},
        {"kind": "cannot start"},
        {"kind": "\x1b[2J"},
    ],
)
def test_what_cannot_be_understood_is_a_node_that_has_failed(far: Far, message: dict | bytes) -> None:
    far.says(message)
    assert far.news() == [(2, "end"), (2, None), (3, "end"), (3, None)]
    assert not far.wire.is_open()
    assert [rank.exit_code for rank in far.crew.ranks] == [1, 1]


def test_the_reason_says_what_was_not_understood_and_no_terminal_obeys_it(far: Far) -> None:
    far.says({"kind": "unheard \x1b[2Jof"})
    with selectors.DefaultSelector() as selector:
        far.crew.watch(selector)
        end = far.crew.news(selector, selector.select(5.0)[0][0].fd)[0].event
    assert end is not None and (end["status"], end["kind"]) == ("failed", "node")
    assert end["reason"].startswith("node 1 (there) says what node 0 does not understand: ")
    assert "unheard" in end["reason"] and "\x1b" not in end["reason"]


def test_a_machine_that_goes_takes_only_ranks_with_it_that_lived(far: Far) -> None:
    far.says({"kind": "exit", "rank": 2, "code": 0, "words": {"lines": [], "hint": ""}})
    far.socket.close()
    assert far.news()[0] == (2, None)
    assert [rank.exit_code for rank in far.crew.ranks] == [0, 1]


def test_stacks_come_from_there_and_a_rank_without_one_is_unknown(far: Far) -> None:
    far.says({"kind": "stands", "stands": {"3": {"state": "R", "text": "in loop"}}})
    stands = far.crew.ask(far.crew.ranks, 1.0)()
    assert stands == {2: Stand(UNKNOWN, ""), 3: Stand("R", "in loop")}


@pytest.mark.parametrize("said", [{}, {"stands": []}, {"stands": {"x": {}}}, {"stands": {"3": {"state": 1}}}])
def test_stacks_that_cannot_be_understood_are_none(far: Far, said: dict) -> None:
    far.says({"kind": "stands", **said})
    assert set(far.crew.ask(far.crew.ranks, 1.0)().values()) == {Stand(UNKNOWN, "")}


def test_a_machine_that_does_not_answer_is_hung_up_on(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_ANSWER_S", 0.1)
    assert set(far.crew.ask(far.crew.ranks, 0.0)().values()) == {Stand(UNKNOWN, "")}
    assert far.crew.end(0.0)() == [] and not far.wire.is_open()


def test_what_is_left_there_and_the_words_of_ranks_that_stayed_come_with_the_end(far: Far) -> None:
    far.says({"kind": "ended", "left": ["process 7"], "words": {"3": _failed_words()}})
    assert far.crew.end(1.0)() == ["process 7 of node 1 (there)"]
    assert far.crew.ranks[1].words == LastWords(("the cause",), "what helps")
    assert far.wire.is_open()


def test_a_signal_that_comes_while_ranks_are_ended_is_not_lost(far: Far) -> None:
    far.says(
        {"kind": "event", "rank": 3, "event": {"event": "step"}},
        {"kind": "asked to stop", "signal": 15},
        {"kind": "asked to stop", "signal": 2},
        {"kind": "ended", "left": [], "words": {}},
    )
    far.crew.end(1.0)()
    assert [said["signal"] for said in far.wire.receive()] == [15, 2]


def test_answers_that_come_too_late_are_passed_over(far: Far) -> None:
    far.says({"kind": "stands", "stands": {}}, {"kind": "ended"})
    assert far.news() == [] and far.wire.is_open()


def test_a_socket_that_was_reset_is_a_machine_that_has_gone(far: Far) -> None:
    far.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    far.socket.close()
    assert far.news() == [(2, "end"), (2, None), (3, "end"), (3, None)]


def test_a_machine_is_told_before_it_is_waited_for(far: Far) -> None:
    """So that of many the last does not wait for the answer of the first."""
    far.socket.settimeout(5.0)
    read = far.socket.makefile("rb").readline
    assert json.loads(read())["kind"] == "start"
    asked, ended = far.crew.ask(far.crew.ranks, 1.0), far.crew.end(1.0)
    assert [json.loads(read())["kind"] for _ in range(2)] == ["ask", "end"]
    far.says({"kind": "stands", "stands": {"2": {"state": "S", "text": "here"}}})
    assert asked()[2] == Stand("S", "here")
    far.says({"kind": "ended", "left": [], "words": {}})
    assert ended() == []
