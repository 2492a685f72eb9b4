"""One job's ranks from start to end: heard, hurried, judged, and killed as a group.

It waits on file descriptors only: what each machine's crew of ranks names (`megaplug.launchers.crew`), and a
socket on which signals arrive as bytes (`megaplug.launchers.stops`).
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megaplug.errors import UserError
from megaplug.launchers.crew import Crew, Event, News
from megaplug.launchers.culprit import judge_hang, write_stacks
from megaplug.launchers.hang import TICK_S, HangWatch, Limits
from megaplug.launchers.lag import LagWatch
from megaplug.launchers.ranks import Rank, Share
from megaplug.launchers.stacks import Stand
from megaplug.launchers.stops import OF_RANKS, SIGNALS, StopSignals
from megaplug.launchers.verdict import GOOD, SAID_ENOUGH, Ended, Outcome, RankFacts, Stop, judge
from megaplug.runs.checkpoints import list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.state import RunState, write_state


@dataclass(frozen=True)
class Patience:
    """How long the supervisor waits where nothing else says so, in seconds.

    Attributes:
        report_s: After a rank has failed, for the others to say why they fail, too.
        teardown_s: After every rank has said that it is done, for them to leave.
        kill_s: After SIGKILL, for the kernel to end what it was sent to.
        stack_s: After a hang was found, for every rank to say where it stands.
        limits: How long a rank may get nothing done.
    """

    report_s: float = 5.0
    teardown_s: float = 10.0
    kill_s: float = 10.0
    stack_s: float = 5.0
    limits: Limits = field(default_factory=Limits)


class Supervisor:
    """The state of one job while it runs."""

    def __init__(
        self,
        folder: RunFolder,
        grace_s: float,
        on_event: Callable[[Event], None] | None,
        patience: Patience,
        iters: int,
        iteration: int,
    ) -> None:
        self.folder = folder
        self.grace_s = grace_s
        self.on_event = on_event
        self.patience = patience
        self.crews: Sequence[Crew] = ()
        self.ranks: list[Rank] = []
        self.failed_at: dict[int, float] = {}
        self.hang = HangWatch(patience.limits, 0, time.monotonic())
        self.lag = LagWatch()
        self.hung: Outcome | None = None
        self.stop: Stop | None = None
        self.deadline: tuple[float, Ended] | None = None
        self.state = RunState("running", iteration=iteration, saved_iteration=iteration, iters=iters)

    def restarted(self, reasons: Sequence[str]) -> None:
        """Note that these are not the first ranks of the job.

        Args:
            reasons: Why others were started before.
        """
        self.state = replace(self.state, num_restarts=len(reasons), restart_reasons=tuple(reasons))

    def run(
        self, crews: Sequence[tuple[Crew, Share]], listener: socket.socket, signals: StopSignals
    ) -> Outcome:
        """Start, watch, judge, end.

        Args:
            crews: Of every machine, with the ranks that are its share, in the order of their numbers.
            listener: Bound to the master port; rank 0 inherits it.
            signals: What hears them.
        """
        self.signals = signals
        left: list[str] = []
        try:
            write_state(self.folder.state_file, self.state)
            self.crews = [crew for crew, _ in crews]
            try:
                for crew, share in crews:
                    crew.start(share, listener if share.first == 0 else None)
            finally:
                listener.close()  # with rank 0 gone the others must be refused, not kept waiting
            self.ranks = [rank for crew in self.crews for rank in crew.ranks]
            self.hang = HangWatch(self.patience.limits, len(self.ranks), time.monotonic())
            ended = self._watch()
            facts = [
                RankFacts(rank.rank, rank.end, rank.exit_code, self.failed_at.get(rank.rank))
                for rank in self.ranks
            ]
            outcome = self.hung or judge(facts, self.stop, ended, self.grace_s)
        except BaseException as error:
            with contextlib.suppress(UserError):  # the first error is the one to be shown
                reason = f"the launcher failed: {error or type(error).__name__}"
                write_state(self.folder.state_file, replace(self.state, status="failed", reason=reason))
            raise
        finally:
            for wait in [crew.end(self.patience.kill_s) for crew in self.crews]:
                left += wait()
        return self._conclude(outcome, left)

    def _watch(self) -> Ended | None:
        """Wait until every rank has left or must be killed; returns why they must."""
        try:
            why = self._wait()
        except KeyboardInterrupt:  # see `StopSignals.waiting`
            why = self._at_once()
        for crew in self.crews:
            self._hear(crew.last_news())  # what was said in the last moment counts
        return why

    def _wait(self) -> Ended | None:
        why: Ended | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self.signals.reader, selectors.EVENT_READ)
            for crew in self.crews:
                crew.watch(selector)
            while why is None and any(rank.exit_code is None for rank in self.ranks):
                timeout = TICK_S
                if self.deadline is not None:
                    timeout = min(timeout, self.deadline[0] - time.monotonic())
                    if timeout <= 0:
                        why = self.deadline[1]
                        break
                for key, _ in selector.select(timeout):
                    if key.data is None:
                        why = self._signalled(self.signals.reader.recv(64))
                        if why is not None:
                            break
                    else:
                        self._hear(key.data.news(selector, key.fd))
                if why is None and self._hangs():
                    why = "hang"
        return why

    def _hear(self, news: Sequence[News]) -> None:
        for one in news:
            if one.rank is None:
                self._of_a_machine(one.event or {})
            elif one.event is None:
                self._exited(one.rank)
            else:
                self._said(one.rank, one.event)

    def _of_a_machine(self, event: Event) -> None:
        """A scheduler, or Ctrl-C, may tell any machine of a job to stop; what else one says is shown."""
        if event["event"] == "asked to stop":
            self.signals.pass_on(event["signal"], again=event["again"])
        else:
            self._tell(event)

    def _hangs(self) -> bool:
        """Whether the job hangs; then where its ranks stand is known and written."""
        self.hang.tick(time.monotonic())
        # Ranks that are leaving, or have failed, have a deadline already.
        living = {
            rank.rank: (rank, crew)
            for crew in self.crews
            for rank in crew.ranks
            if rank.exit_code is None and rank.end is None
        }
        if self.deadline is not None or not living:
            return False
        overdue = self.hang.overdue(living)
        if len(overdue) < len(living) and not any(
            crew.is_stopped(rank) for rank, crew in map(living.__getitem__, overdue)
        ):
            return False
        stands: dict[int, Stand] = {}
        with self.signals.waiting():
            asked = [(crew, [rank for rank, own in living.values() if own is crew]) for crew in self.crews]
            for wait in [crew.ask(ranks, self.patience.stack_s) for crew, ranks in asked if ranks]:
                stands |= wait()
        try:
            written = write_stacks(self.folder, self.hang, stands)
        except UserError as error:
            written = []
            self._tell({"event": "note", "text": str(error)})
        self.hung = judge_hang(self.hang, stands, written, self.state.iteration)
        return True

    def _signalled(self, numbers: bytes) -> Ended | None:
        """Let a first signal stop the job; why everything must end now, after a second Ctrl-C."""
        for number in numbers:
            if number not in SIGNALS:
                continue
            if self.stop is not None and number == signal.SIGINT and self.signals.insisted:
                return self._at_once()
            if self.stop is None and any(rank.end is None for rank in self.ranks):
                self._stop(number)
        return None

    def _stop(self, number: int, told: int | None = None) -> None:
        """Begin to stop.

        Args:
            number: The signal.
            told: The rank that it went to; all others hear of it from that one. None to tell all.
        """
        can_save = all(rank.can_save for rank in self.ranks)
        self.stop = Stop(number, time.time(), told, can_save)
        self.signals.ask(number)
        self._hurry(self.grace_s, "grace")
        if told is None:
            for crew in self.crews:
                crew.signal(signal.SIGTERM)
        self._tell(
            {
                "event": "stopping",
                "signal": signal.Signals(number).name,
                "grace_s": self.grace_s,
                "saves": can_save,
                **({} if told is None else {"rank": told}),
            }
        )

    def _at_once(self) -> Ended:
        self.on_event = None  # nothing more is shown that could be waited for
        asked = self.stop or Stop(signal.SIGINT, time.time())
        after = asked.after if str(asked) == "SIGINT" else str(asked)
        self.stop = replace(asked, number=signal.SIGINT, after=after)
        return "second signal"

    def _exited(self, rank: Rank) -> None:
        if rank.end is not None and rank.end.get("status") in GOOD:
            return
        number = -(rank.exit_code or 0)
        if number in OF_RANKS and not rank.can_save:
            # It had nothing to save, and without it the others cannot.
            if self.stop is None:
                self._stop(number, told=rank.rank)
            self._hurry(0.0, "report")
        self._failed(rank, time.time())

    def _said(self, rank: Rank, event: Event) -> None:
        kind = event["event"]
        rank.peak_bytes = max(rank.peak_bytes, int(_number(event.get("peak"), 0.0)))
        if kind == "memory":
            return  # for the verdict alone
        if kind == "beat":
            self.hang.take(rank.rank, event)
            return
        if kind == "can save":
            rank.can_save = True
            return
        if kind == "told":
            if self.stop is None:
                self._stop(int(_number(event.get("signal"), signal.SIGTERM)), told=rank.rank)
            return
        if kind == "end":
            rank.end = event
            self.hang.released()
            if event.get("status") not in GOOD:
                self._failed(rank, _number(event.get("time"), time.time()))
            else:
                if sum(other.end is not None for other in self.ranks) == 1:
                    self._tell({"event": "ending", "rank": rank.rank})
                if all(other.end is not None for other in self.ranks):
                    self._hurry(self.patience.teardown_s, "teardown")
        else:
            self._tell(event)
        self._note(event)
        if (note := self.lag.take(event)) is not None:
            self._tell({"event": "note", "text": note})

    def _note(self, event: Event) -> None:
        """Keep what the state needs; a saved checkpoint is written down at once."""
        reached = event.get("iteration")
        if not isinstance(reached, int):
            return
        self.state = replace(self.state, iteration=max(self.state.iteration, reached))
        if event["event"] == "saved" and reached > self.state.saved_iteration:
            self.state = replace(self.state, saved_iteration=reached)
            with contextlib.suppress(UserError):  # it is written again at the end, and checked there
                write_state(self.folder.state_file, self.state)

    def _failed(self, rank: Rank, moment: float) -> None:
        self.failed_at.setdefault(rank.rank, moment)
        self._hurry(self.patience.report_s, "report")

    def _hurry(self, seconds: float, why: Ended) -> None:
        moment = time.monotonic() + seconds
        if self.deadline is None or moment < self.deadline[0]:
            self.deadline = (moment, why)

    def _tell(self, event: Event) -> None:
        if self.on_event is not None:
            with self.signals.waiting():
                self.on_event(event)

    def _conclude(self, outcome: Outcome, left: Sequence[str]) -> Outcome:
        """Add iterations, the failing rank's last lines and a hint, and write the state."""
        saved = self.state.saved_iteration
        if outcome.signal:
            # One that got its name in the last moment was not told of.
            named = [found.iteration for found in list_checkpoints(self.folder.checkpoints)]
            saved = max([saved, *(step for step in named if step <= self.state.iteration)])
            self.state = replace(self.state, saved_iteration=saved, signal=outcome.signal)
            if saved < self.state.iteration:
                outcome = replace(outcome, reason=f"{outcome.reason}; {_lost(saved, self.state.iteration)}")
        outcome = replace(outcome, iteration=self.state.iteration, saved_iteration=saved)
        if outcome.status == "failed" and outcome.rank is not None:
            rank, crew = next(
                (rank, crew) for crew in self.crews for rank in crew.ranks if rank.rank == outcome.rank
            )
            words = crew.last_words(rank, outcome.reason)
            outcome = replace(
                outcome,
                log_tail=() if outcome.kind in SAID_ENOUGH else words.lines,
                hint=outcome.hint or words.hint,
                peak_bytes=rank.peak_bytes,
            )
        if left:
            outcome = replace(
                outcome, hint=f"{', '.join(left)}: does not end, the kernel holds it, see ps -o wchan"
            )
        state = replace(self.state, status=outcome.status, reason=outcome.reason, rank=outcome.rank)
        try:
            write_state(self.folder.state_file, state)
        except UserError as error:
            if outcome.status != "failed":
                raise UserError(error.message, hint=error.hint, exit_code=1) from error
            outcome = replace(outcome, hint=outcome.hint or str(error))  # a full disk is why it failed
        return outcome


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _lost(saved: int, reached: int) -> str:
    steps = f"step {reached:,} is" if reached == saved + 1 else f"steps {saved + 1:,} to {reached:,} are"
    return f"{steps} lost"
