"""What the launchers of one job say to each other: JSON objects over TCP, one a line, after proof of a key.

The key lies in the run's folder, and only the run's owner can read it: whoever has it sees the same folder,
and may be told what to start. Nothing that is executed travels here, only numbers and texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
from typing import Any, Self

# A machine that has died without a word is found so: seconds of silence, between questions, and questions.
_IDLE_S, _BETWEEN_S, _QUESTIONS = 10, 5, 4
_UNSENT_MS = 30_000
_GREETING_S = 5.0
# Of one line: many ranks' stacks travel in it.
_MAX_LINE = 64 << 20

Message = dict[str, Any]


class Wire:
    """One connection.

    Args:
        connection: Open; closed with this.

    Attributes:
        ended: The other end has gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.ended = False
        self._connection = connection
        self._pending = b""
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
    def peer(self) -> str:
        """The address of the other end, as it is reached from here."""
        return str(self._connection.getpeername()[0])

    @property
    def own_address(self) -> str:
        """The address of this end."""
        return str(self._connection.getsockname()[0])

    def send(self, kind: str, **values: Any) -> None:
        """Send one message; where the other end has gone that is seen at the next `receive`."""
        line = (json.dumps({"kind": kind, **values}) + "\n").encode()
        with contextlib.suppress(OSError):
            self._connection.sendall(line)

    def receive(self) -> list[Message]:
        """The messages that have arrived, without waiting; `ended` is set after the last."""
        while not self.ended:
            try:
                chunk = self._connection.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self._take(chunk)
        return self._messages()

    def receive_one(self, wait_s: float) -> Message | None:
        """The next message, waited for; None where none comes in time, or the other end has gone."""
        self._connection.settimeout(wait_s)
        try:
            while b"\n" not in self._pending and not self.ended:
                self._take(self._connection.recv(1 << 16))
        except OSError:
            return None
        finally:
            self._connection.settimeout(None)
        line, found, rest = self._pending.partition(b"\n")
        self._pending = rest if found else self._pending
        return _parsed(line) if found else None

    def is_open(self) -> bool:
        """Whether the other end is there; what it has said stays to be received."""
        if not self.ended:
            try:
                self.ended = not self._connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            except BlockingIOError:
                pass
            except OSError:
                self.ended = True
        return not self.ended

    def close(self) -> None:
        """Hang up."""
        self.ended = True
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, chunk: bytes) -> None:
        self._pending += chunk
        # Whoever sends that much in one line speaks another language.
        self.ended = not chunk or len(self._pending) > _MAX_LINE

    def _messages(self) -> list[Message]:
        *lines, self._pending = self._pending.split(b"\n")
        return [message for line in lines if (message := _parsed(line)) is not None]


def _parsed(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and isinstance(message.get("kind"), str) else None


class RefusedError(Exception):
    """The other end does not belong to this job, and why."""


def welcome(wire: Wire, key: str, run: str) -> Message:
    """Greet whoever has connected, and hear who it is.

    Args:
        wire: To it.
        key: Of the run.
        run: Its folder's name.

    Returns:
        What it says of itself; `accept` or `refuse` it.

    Raises:
        RefusedError: It does not speak this language, or does not know the key.
    """
    challenge = secrets.token_hex(16)
    wire.send("greeting", run=run, challenge=challenge)
    said = wire.receive_one(_GREETING_S)
    if said is not None and said["kind"] == "leave":
        raise RefusedError(str(said.get("reason")))
    if said is None or said["kind"] != "join":
        raise RefusedError("it does not answer as a launcher does")
    if not _proves(said, key, challenge, "join"):
        refuse(wire, "it does not know the key in the run's folder: is runs_dir on one disk for all nodes?")
        raise RefusedError("it does not know the run's key")
    return said


def accept(wire: Wire, key: str, said: Message) -> None:
    """Take it in, and prove that this end knows the key, too."""
    wire.send("welcome", proof=_proof(key, str(said.get("challenge")), "welcome"))


def refuse(wire: Wire, reason: str) -> None:
    """Say why it cannot take part."""
    wire.send("refused", reason=reason)


def greeted(wire: Wire) -> Message:
    """What the launcher that was connected to says first: the run's folder.

    Raises:
        RefusedError: It says nothing, or something else.
    """
    said = wire.receive_one(_GREETING_S)
    if said is None or said["kind"] != "greeting":
        raise RefusedError("what listens there is no launcher of megaplug")
    return said


def join(wire: Wire, key: str, greeting: Message, **who: Any) -> None:
    """Answer a greeting, and wait to be taken in.

    Args:
        wire: To the launcher that has greeted.
        key: Of the run.
        greeting: From `greeted`.
        who: What this end says of itself.

    Raises:
        RefusedError: It does not take this end in, or does not know the key itself.
    """
    challenge = secrets.token_hex(16)
    proof = _proof(key, str(greeting.get("challenge")), "join")
    wire.send("join", proof=proof, challenge=challenge, **who)
    said = wire.receive_one(_GREETING_S)
    if said is not None and said["kind"] == "refused":
        raise RefusedError(str(said.get("reason")))
    if said is None or said["kind"] != "welcome" or not _proves(said, key, challenge, "welcome"):
        raise RefusedError("what listens there does not know the key in the run's folder")


def _proof(key: str, challenge: str, role: str) -> str:
    return hmac.new(key.encode(), f"{role} {challenge}".encode(), hashlib.sha256).hexdigest()


def _proves(said: Message, key: str, challenge: str, role: str) -> bool:
    return hmac.compare_digest(str(said.get("proof")).encode(), _proof(key, challenge, role).encode())
