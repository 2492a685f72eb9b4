"""The ranks of another machine, whose launcher starts, watches and ends them as it is told over a socket."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from megaplug.launchers.crew import Event, LastWords, News
from megaplug.launchers.handshake import printable
from megaplug.launchers.ranks import Rank, Share
from megaplug.launchers.stacks import UNKNOWN, Stand
from megaplug.launchers.wire import Message, Wire

# Beyond what the other machine may take itself, for its answer to come.
_ANSWER_S = 5.0
_CANNOT_START = 2
_GONE = "has gone: its launcher was killed, or the machine cannot be reached"


@dataclass
class RemoteRank(Rank):
    """A rank of another machine.

    Attributes:
        is_stopped: By SIGSTOP or its like.
        words: Its last, where it has failed.
    """

    is_stopped: bool = False
    words: LastWords = field(default_factory=LastWords)


class RemoteCrew:
    """Those of one other machine.

    Args:
        wire: To its launcher.
        name: What a person calls it, such as ``node 1 (gpu07)``.
    """

    def __init__(self, wire: Wire, name: str) -> None:
        self.ranks: list[RemoteRank] = []
        self._wire = wire
        self._name = name
        self._fault = ""

    def start(self, share: Share, listener: socket.socket | None) -> None:
        """Tell the machine to start its share; that it cannot is news."""
        assert listener is None, "rank 0 is with the launcher that leads"
        self.ranks = [RemoteRank(share.first + place) for place in range(share.number)]
        self._wire.send("start", share=asdict(share))

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Register the socket."""
        selector.register(self._wire, selectors.EVENT_READ, self)

    def news(self, selector: selectors.BaseSelector, fd: int) -> list[News]:
        """What the machine has said; where it has gone, so have its ranks."""
        found = self.last_news()
        if self._wire.ended:
            selector.unregister(fd)
            found += self._gone()
        return found

    def last_news(self) -> list[News]:
        """What has arrived."""
        found = []
        for message in self._wire.receive():
            if (news := self._read(self._heard, message)) is None:
                break
            found += news
        return found

    def is_stopped(self, rank: Rank) -> bool:
        """As its machine has said last."""
        return isinstance(rank, RemoteRank) and rank.is_stopped

    def signal(self, number: int) -> None:
        """Have it sent there."""
        self._wire.send("signal", number=number)

    def ask(self, ranks: Sequence[Rank], wait_s: float) -> Callable[[], dict[int, Stand]]:
        """Have them asked there; ranks of a machine that does not answer give no stack."""
        self._wire.send("ask", ranks=[rank.rank for rank in ranks], wait_s=wait_s)
        return partial(self._stands, ranks, wait_s)

    def _stands(self, ranks: Sequence[Rank], wait_s: float) -> dict[int, Stand]:
        said = self._answer("stands", wait_s + _ANSWER_S)
        stands = (self._read(_stands, said) if said is not None else None) or {}
        return {rank.rank: stands.get(rank.rank, Stand(UNKNOWN, "")) for rank in ranks}

    def last_words(self, rank: Rank, reason: str) -> LastWords:
        """As they came with its end."""
        return rank.words if isinstance(rank, RemoteRank) else LastWords()

    def end(self, wait_s: float) -> Callable[[], list[str]]:
        """Have them killed there; a machine that does not answer is taken in no more."""
        if self._wire.ended or not self.ranks:
            return list
        self._wire.send("end", wait_s=wait_s)
        return partial(self._ended, wait_s)

    def _ended(self, wait_s: float) -> list[str]:
        said = self._answer("ended", wait_s + _ANSWER_S)
        if said is None:
            self._wire.close()
            return []
        left, words = self._read(_left, said) or ([], {})
        for rank in self.ranks:
            rank.words = words.get(rank.rank, rank.words)
        return [f"{one} of {self._name}" for one in left]

    def _answer(self, kind: str, wait_s: float) -> Message | None:
        """The next message of a kind; what was said of ranks before it has lost its meaning."""
        deadline = time.monotonic() + wait_s
        signals = []
        try:
            while (said := self._wire.receive_one(deadline - time.monotonic())) is not None:
                if said["kind"] == kind:
                    return said
                if said["kind"] == "asked to stop":
                    signals.append(said)
            return None
        finally:
            for asked in reversed(signals):
                self._wire.put_back(asked)

    def _heard(self, message: Message) -> list[News]:
        kind = message["kind"]
        if kind == "asked to stop":
            again = bool(message.get("again"))
            return [News(None, {"event": kind, "signal": signal.Signals(message["signal"]), "again": again})]
        if kind in ("stands", "ended"):
            return []  # answers that came too late
        if kind == "cannot start":
            said = {"status": "failed", "kind": "config", "reason": f"{self._name}: {message['reason']}"}
            for rank in self.ranks:
                rank.words = LastWords(hint=str(message["hint"]))
            return [one for rank in self.ranks for one in self._over(rank, said, _CANNOT_START)]
        rank = {rank.rank: rank for rank in self.ranks}[message["rank"]]
        if kind == "event":
            event = {**message["event"], "rank": rank.rank}
            if not isinstance(event["event"], str):
                raise TypeError("an event without a name")
            return [News(rank, event)]
        if kind == "exit":
            rank.words, rank.exit_code = _words(message["words"]), int(message["code"])
            return [News(rank, None)]
        if kind != "stopped":
            raise ValueError(kind)
        rank.is_stopped = bool(message["is_stopped"])
        return []

    def _read[T](self, read: Callable[[Message], T], message: Message) -> T | None:
        """What a message says; None where it cannot be understood: then the connection is given up."""
        try:
            return read(message)
        except (AttributeError, KeyError, TypeError, ValueError):
            said = printable(message)
            self._fault = f"says what node 0 does not understand: {said}; is it the same megaplug there?"
            self._wire.close()
            return None

    def _gone(self) -> list[News]:
        """Its ranks end themselves with its launcher, or with the machine."""
        reason = f"{self._name} {self._fault or _GONE}"
        said = {"status": "failed", "kind": "node", "reason": reason}
        living = [rank for rank in self.ranks if rank.exit_code is None]
        return [one for rank in living for one in self._over(rank, said, 1)]

    def _over(self, rank: RemoteRank, said: dict[str, Any], exit_code: int) -> list[News]:
        rank.exit_code = exit_code
        end: Event = {"event": "end", "rank": rank.rank, "time": time.time(), "iteration": None, **said}
        return [*([News(rank, end)] if rank.end is None else []), News(rank, None)]


def _stands(said: Message) -> dict[int, Stand]:
    stands = said["stands"].items()
    return {int(rank): Stand(str(stand["state"]), str(stand["text"])) for rank, stand in stands}


def _left(said: Message) -> tuple[list[str], dict[int, LastWords]]:
    return list(map(str, said["left"])), {int(rank): _words(words) for rank, words in said["words"].items()}


def _words(said: Message) -> LastWords:
    return LastWords(tuple(map(str, said["lines"])), str(said["hint"]))
