"""A node that does not lead: its ranks are started, heard and ended as node 0 says."""

from __future__ import annotations

import selectors
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megaplug.errors import UserError
from megaplug.launchers.crew import Event, LastWords, LocalCrew, News
from megaplug.launchers.handshake import printable
from megaplug.launchers.hang import TICK_S
from megaplug.launchers.ranks import Rank, Share
from megaplug.launchers.stops import SIGNALS, StopSignals
from megaplug.launchers.verdict import GOOD
from megaplug.launchers.wire import Message, Wire
from megaplug.runs.folder import RunFolder

_KILL_S = 10.0
_AT_ONCE = 128 + signal.SIGINT


class Agent:
    """Serves node 0 until the job is over.

    Args:
        wire: To node 0, which has taken this node in.
        folder: The run.
        command: What each rank executes.
        environment: For all ranks.
        tell: Is told what a person may want to know.
    """

    def __init__(
        self,
        wire: Wire,
        folder: RunFolder,
        command: Sequence[str],
        environment: Mapping[str, str],
        tell: Callable[[Event], None],
    ) -> None:
        self._wire = wire
        self._folder = folder
        self._command = command
        self._environment = environment
        self._tell = tell
        self._crew: LocalCrew | None = None
        self._progress: dict[int, object] = {}
        self._stopped: set[int] = set()
        self._was_asked = False

    def serve(self, signals: StopSignals) -> int:
        """Do as node 0 says, until it says that the job is over.

        Signals are passed on to it; a second Ctrl-C ends this node's ranks at once, and so the job.

        Returns:
            The job's exit code.

        Raises:
            UserError: Node 0 has gone, or cannot be understood.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(signals.reader, selectors.EVENT_READ)
            selector.register(self._wire, selectors.EVENT_READ)
            try:
                # What came together with the welcome makes nothing readable any more.
                code = self._instructed(selector)
                while code is None:
                    ready = selector.select(TICK_S)
                    for key, _ in ready:
                        # What a message has ended brings no more news.
                        if key.data is not None and key.data is self._crew:
                            self._forward(self._crew.news(selector, key.fd))
                    if any(key.fileobj is signals.reader for key, _ in ready):
                        code = self._signalled(signals.reader.recv(64))
                    if code is None and any(key.fileobj is self._wire for key, _ in ready):
                        code = self._instructed(selector)
                    self._look_for_stopped()
                return code
            finally:
                self._end(selector, _KILL_S)

    def _signalled(self, numbers: bytes) -> int | None:
        for number in numbers:
            if number not in SIGNALS:
                continue
            self._wire.send("asked to stop", signal=number, again=self._was_asked)
            if number == signal.SIGINT and self._was_asked:
                return _AT_ONCE
            self._was_asked = True
        return None

    def _instructed(self, selector: selectors.BaseSelector) -> int | None:
        for message in self._wire.receive():
            kind, what = _read(message)
            if kind == "over":
                code, text = what
                self._tell({"event": "note", "text": text})
                return int(code)
            self._obey(kind, what, selector)
        if self._wire.ended:
            raise UserError(
                "node 0 has gone: its launcher was killed, or it cannot be reached",
                hint="started again on all nodes, the job goes on from its last checkpoint",
                exit_code=1,
            )
        return None

    def _obey(self, kind: str, what: Any, selector: selectors.BaseSelector) -> None:
        if kind == "start":
            self._end(selector, _KILL_S)
            self._start(what, selector)
        elif kind == "end":
            words = self._words_of_the_failed()
            self._wire.send("ended", left=self._end(selector, what), words=words)
        elif self._crew is not None and kind == "signal":
            self._crew.signal(what)
        elif self._crew is not None and kind == "ask":
            ranks, wait_s = what
            stands = self._crew.ask([rank for rank in self._crew.ranks if rank.rank in ranks], wait_s)()
            self._wire.send("stands", stands={rank: asdict(stand) for rank, stand in stands.items()})

    def _start(self, share: Share, selector: selectors.BaseSelector) -> None:
        last = share.first + share.number - 1
        named = f"rank {last}" if share.number == 1 else f"ranks {share.first} to {last}"
        self._tell({"event": "note", "text": f"starting {named}; what they write is in {self._folder.logs}"})
        self._progress, self._stopped = {}, set()
        self._crew = LocalCrew(self._command, self._folder, None, self._environment)
        try:
            self._crew.start(share, None)
        except UserError as error:
            self._wire.send("cannot start", reason=error.message, hint=error.hint)
        self._crew.watch(selector)

    def _end(self, selector: selectors.BaseSelector, wait_s: float) -> list[str]:
        if self._crew is None:
            return []
        for key in list(selector.get_map().values()):
            if key.data is self._crew:
                selector.unregister(key.fileobj)
        left = self._crew.end(wait_s)()
        self._crew = None
        return left

    def _forward(self, news: Sequence[News]) -> None:
        for one in news:
            assert one.rank is not None
            if one.event is None:
                self._exited(one.rank)
            elif not self._is_old(one.rank, one.event):
                if one.event["event"] == "end":
                    one.rank.end = one.event
                self._wire.send("event", rank=one.rank.rank, event=one.event)

    def _is_old(self, rank: Rank, event: Event) -> bool:
        """Whether it is a heartbeat without progress since the last: silence says as much."""
        if event["event"] != "beat":
            return False
        before = self._progress.get(rank.rank)
        self._progress[rank.rank] = event.get("progress")
        return before == event.get("progress")

    def _exited(self, rank: Rank) -> None:
        has_failed = rank.end is None or rank.end.get("status") not in GOOD
        words = self._words(rank) if has_failed else LastWords()
        self._wire.send("exit", rank=rank.rank, code=rank.exit_code, words=asdict(words))

    def _words(self, rank: Rank) -> LastWords:
        assert self._crew is not None
        return self._crew.last_words(rank, str((rank.end or {}).get("reason", "")))

    def _words_of_the_failed(self) -> dict[int, Any]:
        """Of ranks that have said that they fail, and are not waited for until they leave."""
        ranks = [] if self._crew is None else self._crew.ranks
        failed = [rank for rank in ranks if rank.end is not None and rank.end.get("status") not in GOOD]
        return {rank.rank: asdict(self._words(rank)) for rank in failed if rank.exit_code is None}

    def _look_for_stopped(self) -> None:
        """Tell which ranks somebody has stopped, or woken: they cannot say so themselves."""
        living = [] if self._crew is None else [rank for rank in self._crew.ranks if rank.exit_code is None]
        for rank in living:
            assert self._crew is not None
            is_stopped = self._crew.is_stopped(rank)
            if is_stopped != (rank.rank in self._stopped):
                self._stopped ^= {rank.rank}
                self._wire.send("stopped", rank=rank.rank, is_stopped=is_stopped)


def _read(message: Message) -> tuple[str, Any]:
    """What node 0 says, and with what.

    Raises:
        UserError: It is none of what a node is told.
    """
    try:
        return message["kind"], _INSTRUCTIONS[message["kind"]](message)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"node 0 says what this node does not understand: {printable(message)}",
            hint="is it the same megaplug on all nodes?",
            exit_code=1,
        ) from error


def _share(said: Mapping[str, Any]) -> Share:
    share = Share(**said)
    numbers = [value for name, value in asdict(share).items() if name != "address"]
    if not isinstance(share.address, str) or not all(isinstance(number, int) for number in numbers):
        raise TypeError("a number is no number, or the address no text")
    return share


_INSTRUCTIONS: dict[str, Callable[[Message], Any]] = {
    "start": lambda said: _share(said["share"]),
    "signal": lambda said: signal.Signals(said["number"]),
    "ask": lambda said: (frozenset(said["ranks"]), float(said["wait_s"])),
    "end": lambda said: float(said["wait_s"]),
    "over": lambda said: (int(said["exit_code"]), str(said["text"])),
}
