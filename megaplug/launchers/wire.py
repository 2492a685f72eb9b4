"""What the launchers of one job say to each other: JSON objects over TCP, one a line.

Nothing that is executed travels here, only numbers and texts.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections import deque
from typing import Any, Self

# A machine that has died without a word is found so: seconds of silence, between questions, and questions.
_IDLE_S, _BETWEEN_S, _QUESTIONS = 10, 5, 4
_UNSENT_MS = 30_000
# Of one line: many ranks' stacks travel in it. Who has proved nothing yet may be anybody.
_MAX_LINE, _MAX_LINE_OF_STRANGERS = 64 << 20, 64 << 10
_CHUNK = 1 << 16
# Whoever sends without end does not keep its reader from all else.
_CHUNKS_AT_ONCE = 256

Message = dict[str, Any]
NONSENSE = ""
"""The kind of what is no message."""


class Wire:
    """One connection.

    Args:
        connection: Open; closed with this.

    Attributes:
        ended: The other end has gone, or has said what is too long for any message.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.ended = False
        self._connection = connection
        self._max_line = _MAX_LINE_OF_STRANGERS
        self._unfinished = bytearray()
        self._arrived: deque[Message] = deque()
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            (socket.TCP_KEEPIDLE, _IDLE_S),
            (socket.TCP_KEEPINTVL, _BETWEEN_S),
            (socket.TCP_KEEPCNT, _QUESTIONS),
            (socket.TCP_USER_TIMEOUT, _UNSENT_MS),
            (socket.TCP_NODELAY, 1),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, name, value)

    def fileno(self) -> int:
        """For a selector."""
        return self._connection.fileno()

    @property
    def own_address(self) -> str:
        """The address of this end."""
        return str(self._connection.getsockname()[0])

    def trust(self) -> None:
        """The other end has proved who it is: it may say more in one line."""
        self._max_line = _MAX_LINE

    def send(self, kind: str, **values: Any) -> None:
        """Send one message; where the other end has gone that is seen at the next `receive`."""
        line = (json.dumps({"kind": kind, **values}) + "\n").encode()
        with contextlib.suppress(OSError):
            self._connection.sendall(line)

    def receive(self) -> list[Message]:
        """The messages that have arrived, without waiting; `ended` is set after the last."""
        self._take()
        messages = list(self._arrived)
        self._arrived.clear()
        return messages

    def receive_one(self, wait_s: float) -> Message | None:
        """The next message, waited for; None where none comes in time, or the other end has gone."""
        deadline = time.monotonic() + wait_s
        self._take()
        while not self._arrived and not self.ended and (rest := deadline - time.monotonic()) > 0:
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            poll.poll(rest * 1000)
            self._take()
        return self._arrived.popleft() if self._arrived else None

    def put_back(self, message: Message) -> None:
        """Let a message be received once more, before all others."""
        self._arrived.appendleft(message)

    def is_open(self) -> bool:
        """Whether the other end is there; what it has said stays to be received."""
        self._take()
        return not self.ended

    def close(self) -> None:
        """Hang up."""
        self.ended = True
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        """Read what has arrived."""
        for _ in range(_CHUNKS_AT_ONCE):
            if self.ended:
                return
            try:
                chunk = self._connection.recv(_CHUNK, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            self._unfinished += chunk
            if b"\n" in chunk:
                *lines, self._unfinished = self._unfinished.split(b"\n")
                self._arrived.extend(map(_parsed, lines))
            self.ended = not chunk or len(self._unfinished) > self._max_line


def _parsed(line: bytearray) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if isinstance(message, dict) and isinstance(message.get("kind"), str):
        return message
    return {"kind": NONSENSE}
