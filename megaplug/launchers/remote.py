"""The ranks of another machine, whose launcher starts, watches and ends them as it is told over a socket."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megaplug.launchers.crew import Event, LastWords, News
from megaplug.launchers.ranks import Rank, Share
from megaplug.launchers.stacks import Stand
from megaplug.launchers.wire import Message, Wire

# Beyond what the other machine may take itself, for its answer to come.
_ANSWER_S = 5.0
_CANNOT_START = 2


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
        return [one for message in self._wire.receive() for one in self._heard(message)]

    def is_stopped(self, rank: Rank) -> bool:
        """As its machine has said last."""
        return isinstance(rank, RemoteRank) and rank.is_stopped

    def signal(self, number: int) -> None:
        """Have it sent there."""
        self._wire.send("signal", number=number)

    def ask(self, ranks: Sequence[Rank], wait_s: float) -> dict[int, Stand]:
        """Have them asked there; ranks of a machine that does not answer give no stack."""
        self._wire.send("ask", ranks=[rank.rank for rank in ranks], wait_s=wait_s)
        said = self._answer("stands", wait_s + _ANSWER_S)
        stands = {} if said is None else {int(rank): Stand(**stand) for rank, stand in said["stands"].items()}
        return {rank.rank: stands.get(rank.rank, Stand("?", "")) for rank in ranks}

    def last_words(self, rank: Rank, reason: str) -> LastWords:
        """As they came with its end."""
        return rank.words if isinstance(rank, RemoteRank) else LastWords()

    def end(self, wait_s: float) -> list[str]:
        """Have them killed there; a machine that does not answer is taken in no more."""
        if self._wire.ended or not self.ranks:
            return []
        self._wire.send("end", wait_s=wait_s)
        said = self._answer("ended", wait_s + _ANSWER_S)
        if said is None:
            self._wire.close()
            return []
        return [f"{left} of {self._name}" for left in said["left"]]

    def _answer(self, kind: str, wait_s: float) -> Message | None:
        """The next message of a kind; others that come before it have lost their meaning."""
        deadline = time.monotonic() + wait_s
        while (rest := deadline - time.monotonic()) > 0 and not self._wire.ended:
            said = self._wire.receive_one(rest)
            if said is not None and said["kind"] == kind:
                return said
        return None

    def _heard(self, message: Message) -> list[News]:
        kind = message["kind"]
        if kind == "asked to stop":
            return [News(None, {"event": kind, "signal": message["signal"]})]
        if kind in ("stands", "ended"):
            return []  # answers that came too late
        if kind == "cannot start":
            said = {"status": "failed", "kind": "config", "reason": f"{self._name}: {message['reason']}"}
            return [one for rank in self.ranks for one in self._over(rank, said, _CANNOT_START)]
        rank = self.ranks[int(message["rank"]) - self.ranks[0].rank]
        if kind == "event":
            return [News(rank, {**message["event"], "rank": rank.rank})]
        if kind == "exit":
            rank.exit_code = int(message["code"])
            rank.words = LastWords(tuple(message["lines"]), message["hint"])
            return [News(rank, None)]
        assert kind == "stopped", kind
        rank.is_stopped = bool(message["is_stopped"])
        return []

    def _gone(self) -> list[News]:
        """Its ranks end themselves with its launcher, or with the machine."""
        reason = f"{self._name} has gone: its launcher was killed, or the machine cannot be reached"
        said = {"status": "failed", "kind": "node", "reason": reason}
        living = [rank for rank in self.ranks if rank.exit_code is None]
        return [one for rank in living for one in self._over(rank, said, 1)]

    def _over(self, rank: RemoteRank, said: dict[str, Any], exit_code: int) -> list[News]:
        rank.exit_code = exit_code
        end: Event = {"event": "end", "rank": rank.rank, "time": time.time(), "iteration": None, **said}
        return [*([News(rank, end)] if rank.end is None else []), News(rank, None)]
