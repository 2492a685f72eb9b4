"""How the launchers of one job find out that they belong together: each proves that it knows the run's key.

The key lies in the run's folder, and only the run's owner can read it: whoever has it sees the same folder,
and may be told what to start.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Any

from megaplug.launchers.wire import Message, Wire

# For a node to read the job and to look at itself, on a disk that may be slow, and to answer.
_JOIN_S = 60.0
_WELCOME_S = 10.0
_MAX_TEXT = 500


class RefusedError(Exception):
    """The other end does not belong to this job, and why."""


class Guest:
    """Somebody who has connected to node 0, until it is known who.

    Args:
        wire: To it; it is greeted.
        address: Where it is.
        run: The name of the run's folder.
        is_over: Whether it would have nothing to do.

    Attributes:
        wire: To it.
        address: Where it is.
        deadline: When it must have answered, on the clock of `time.monotonic`.
    """

    def __init__(self, wire: Wire, address: str, run: str, *, is_over: bool = False) -> None:
        self.wire = wire
        self.address = address
        self.deadline = time.monotonic() + _JOIN_S
        self._challenge = secrets.token_hex(16)
        wire.send("greeting", run=run, challenge=self._challenge, is_over=is_over)

    def answer(self, key: str) -> Message | None:
        """What it says of itself; `accept` or `refuse` it. None where it has not answered yet.

        Args:
            key: Of the run.

        Raises:
            RefusedError: It goes, does not speak this language, or does not know the key.
        """
        said = self.wire.receive_one(0.0)
        if said is None and not self.wire.ended and time.monotonic() < self.deadline:
            return None
        if said is not None and said["kind"] == "leave":
            raise RefusedError(printable(said.get("reason")))
        if said is None or said["kind"] != "join":
            raise RefusedError("it does not answer as a launcher does")
        if not _proves(said, key, self._challenge, "join"):
            reason = "it does not know the key in the run's folder: is runs_dir on one disk for all nodes?"
            refuse(self.wire, reason)
            raise RefusedError("it does not know the run's key")
        return said


def accept(wire: Wire, key: str, said: Message) -> None:
    """Take it in, and prove that this end knows the key, too."""
    wire.trust()
    wire.send("welcome", proof=_proof(key, said.get("challenge"), "welcome"))


def refuse(wire: Wire, reason: str) -> None:
    """Say why it cannot take part."""
    wire.send("refused", reason=reason)


def greeted(wire: Wire) -> Message | None:
    """What the launcher that was connected to says first: the run's folder. None where it has not yet.

    Raises:
        RefusedError: It says something else, or hangs up.
    """
    said = wire.receive_one(0.0)
    if said is None and not wire.ended:
        return None
    if said is None:
        raise RefusedError("it has hung up")
    if said["kind"] != "greeting":
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
    proof = _proof(key, greeting.get("challenge"), "join")
    wire.send("join", proof=proof, challenge=challenge, **who)
    said = wire.receive_one(_WELCOME_S)
    if said is None:
        raise RefusedError("it has hung up" if wire.ended else f"it is silent for {_WELCOME_S:g} s")
    if said["kind"] == "refused":
        raise RefusedError(printable(said.get("reason")))
    if said["kind"] != "welcome" or not _proves(said, key, challenge, "welcome"):
        raise RefusedError("it does not know the key in the run's folder")
    wire.trust()


def printable(text: object) -> str:
    """What somebody has said who may be anybody: in one line, not without end, and no terminal obeys it."""
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line[:_MAX_TEXT])


def _proof(key: str, challenge: object, role: str) -> str:
    said = f"{role} {challenge}".encode(errors="replace")
    return hmac.new(key.encode(), said, hashlib.sha256).hexdigest()


def _proves(said: Message, key: str, challenge: str, role: str) -> bool:
    proof = str(said.get("proof")).encode(errors="replace")
    return hmac.compare_digest(proof, _proof(key, challenge, role).encode())
