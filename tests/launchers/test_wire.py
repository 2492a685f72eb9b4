"""Messages between launchers: whole, in order, and never more than a machine can hold."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from fake_nodes import connected

from megaplug.launchers import wire as wires
from megaplug.launchers.wire import NONSENSE, Wire


@pytest.fixture
def pair() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and what sends to it."""
    near, far = connected()
    with Wire(near) as wire, far:
        yield wire, far


def _received(wire: Wire, number: int) -> list[str]:
    found = [wire.receive_one(5.0) for _ in range(number)]
    return [said["kind"] for said in found if said is not None]


def test_messages_arrive_in_order_however_they_are_cut(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    for part in (b'{"kind": "fi', b'rst"}\n{"kind": "second", "of": 3}', b'\n{"kind":"third"}\n{"ki'):
        far.sendall(part)
    assert _received(wire, 3) == ["first", "second", "third"]
    assert wire.receive() == [] and wire.is_open()
    far.sendall(b'nd": "fourth"}\n')
    assert _received(wire, 1) == ["fourth"]


def test_what_is_sent_is_received(pair: tuple[Wire, socket.socket]) -> None:
    near, far = pair
    with Wire(far) as other:
        other.send("event", event={"loss": 1.5, "text": "größer\n\ud800"})
        assert near.receive_one(5.0) == {
            "kind": "event",
            "event": {"loss": 1.5, "text": "größer\n\ud800"},
        }


def test_what_was_said_last_is_heard_before_the_end(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    far.sendall(b'{"kind": "over"}\n')
    far.close()
    assert wire.receive_one(5.0) == {"kind": "over"}
    assert wire.receive_one(5.0) is None and wire.ended and not wire.is_open()


def test_a_wire_whose_other_end_has_gone_is_not_open_though_words_of_it_are_left(
    pair: tuple[Wire, socket.socket],
) -> None:
    wire, far = pair
    far.sendall(b'{"kind": "asked to stop"}\n')
    far.close()
    deadline = time.monotonic() + 5.0
    while wire.is_open():
        assert time.monotonic() < deadline
    assert wire.receive() == [{"kind": "asked to stop"}]


def test_what_was_put_back_comes_first(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    far.sendall(b'{"kind": "first"}\n{"kind": "second"}\n')
    first = wire.receive_one(5.0)
    assert first is not None
    wire.put_back(first)
    assert _received(wire, 2) == ["first", "second"]


def test_sending_to_who_has_gone_is_no_error(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    far.close()
    for _ in range(3):
        wire.send("event")
    assert not wire.is_open()


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r",
        b"\x00\xff\xfe",
        b"[" * 60_000,
        b'{"kind": 3}',
        b"[]",
        b"{}",
        b'{"kind": "cut',
    ],
)
def test_what_is_no_message_is_nonsense_and_disturbs_no_other(
    pair: tuple[Wire, socket.socket], line: bytes
) -> None:
    wire, far = pair
    far.sendall(line + b'\n{"kind": "good"}\n')
    assert _received(wire, 2) == [NONSENSE, "good"]


def test_a_stranger_cannot_say_much_in_one_line(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    far.sendall(b"x" * 200_000)
    assert wire.receive_one(5.0) is None and wire.ended


def test_who_is_trusted_can_say_more_and_not_without_end(
    pair: tuple[Wire, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "_MAX_LINE", 1 << 20)
    wire, far = pair
    wire.trust()
    long = b'{"kind": "stands", "text": "' + b"x" * 900_000 + b'"}\n'
    sender = threading.Thread(target=_flood, args=(far, [long, b"x" * (16 << 20)]))
    sender.start()
    assert _received(wire, 1) == ["stands"]
    assert wire.receive_one(5.0) is None and wire.ended
    wire.close()
    sender.join()


def test_many_messages_together_may_be_longer_than_one(
    pair: tuple[Wire, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "_MAX_LINE", 4096)
    wire, far = pair
    wire.trust()
    lines = b'{"kind": "event", "text": "0123456789"}\n' * 50
    far.sendall(lines * 20)
    assert _received(wire, 1000) == ["event"] * 1000 and wire.is_open()


def test_who_never_stops_talking_does_not_keep_its_reader(
    pair: tuple[Wire, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wires, "_CHUNKS_AT_ONCE", 4)
    wire, far = pair
    wire.trust()
    line = b'{"kind": "event", "text": "' + b"x" * 1000 + b'"}\n'
    sender = threading.Thread(target=_flood, args=(far, [line * 10_000] * 10))
    sender.start()
    for _ in range(20):
        assert len(wire.receive()) <= 4 * (64 << 10) // 1000
    wire.close()
    sender.join()


def test_who_speaks_letter_by_letter_is_not_waited_for_longer(pair: tuple[Wire, socket.socket]) -> None:
    wire, far = pair
    is_enough = threading.Event()

    def drip() -> None:
        while not is_enough.wait(0.02):
            far.sendall(b"x")

    sender = threading.Thread(target=drip)
    sender.start()
    begun = time.monotonic()
    assert wire.receive_one(0.3) is None
    assert time.monotonic() - begun < 2.0
    is_enough.set()
    sender.join()


def _flood(far: socket.socket, parts: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # it may be hung up on
        for part in parts:
            far.sendall(part)
