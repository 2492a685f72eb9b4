"""What has become of a job, judged from what its ranks said and how they ended."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megaplug.launchers.stops import OF_RANKS

# Why the supervisor ended the group itself; None where every rank left on its own.
Ended = Literal["grace", "second signal", "report", "teardown", "hang"]

# A rank that these end was hit from outside or crashed; its peers fail too, even before the death is seen.
# SIGABRT is not among them: it is how a collective reports that a peer is gone.
_ROOT_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
# What ends a rank that has nothing to save yet.
_ENDED_BY_A_STOP = tuple(-number for number in OF_RANKS)
_SAME_MOMENT_S = 1.0
GOOD = ("finished", "stopped")
AT_ONCE = "at once"
SAID_ENOUGH = ("killed", "hang", "disk", "helper")
"""Kinds whose cause is known, or cannot be in the rank's log: its last lines would only be in the way."""
_USAGE = 2


@dataclass(frozen=True)
class Stop:
    """That somebody has asked a job to stop.

    Attributes:
        number: The signal.
        time: When it was heard, seconds of the wall clock.
        rank: The rank that it was sent to; None where it was the launcher.
        can_save: Whether every rank had done a step by then, so that there was something to save.
        after: Where Ctrl-C has cut another signal's stop short, that one.
    """

    number: int
    time: float
    rank: int | None = None
    can_save: bool = True
    after: str = ""

    def __str__(self) -> str:
        return _name(self.number) + ("" if self.rank is None else f" to rank {self.rank}")


@dataclass(frozen=True)
class RankFacts:
    """What is known of one rank, before the supervisor killed anything.

    Attributes:
        rank: Its number.
        end: Its ``end`` event.
        exit_code: Negative for a signal; None if it still lived.
        failed_at: When it was seen to fail, seconds of the wall clock; None if it did not.
    """

    rank: int
    end: Mapping[str, Any] | None
    exit_code: int | None
    failed_at: float | None


@dataclass(frozen=True)
class Outcome:
    """How a job has ended.

    Attributes:
        status: ``finished``, ``stopped`` (can be continued) or ``failed``.
        iteration: The last step that was seen.
        saved_iteration: The step of the last checkpoint that was reported as saved, 0 for none.
        reason: Why, for a person.
        rank: The rank that failed first.
        exit_code: What the command should end with: 0, 1, or 128 + signal where a signal stopped the job.
        log_tail: The last lines of the failing rank's log.
        hint: What would help.
        kind: What a failed rank has said of its failure (``memory``, ``disk``, ``data``, ``nan``,
            ``helper``, ``peer``, ``exit``, ``error``; ``transient``, ``unexplained``, ``persistent`` or
            ``reproducible`` where Megatron has computed a step again), ``killed`` by SIGKILL, ``crashed``,
            ``config`` (left with exit code 2), or ``hang``; ``at once`` after a second Ctrl-C; empty where
            none is so.
        peak_bytes: The most memory that it has said it had used, 0 where it has not.
        requested_bytes: The allocation that failed, 0 where it is not known.
        signal: The name of the signal at which it was to stop; such a job is not started again.
    """

    status: str
    iteration: int = 0
    saved_iteration: int = 0
    reason: str = ""
    rank: int | None = None
    exit_code: int = 0
    log_tail: tuple[str, ...] = ()
    hint: str = ""
    kind: str = ""
    peak_bytes: int = 0
    requested_bytes: int = 0
    signal: str = ""


def judge(ranks: Sequence[RankFacts], stop: Stop | None, ended: Ended | None, grace_s: float) -> Outcome:
    """Decide what has happened.

    Every rank's own ``end`` event counts before any exit code. A rank that left without one has failed, also
    with exit code 0: Megatron leaves with 0 from a run that did nothing.

    Args:
        ranks: All ranks.
        stop: What has asked the job to stop.
        ended: Why the supervisor ended the group.
        grace_s: For the text.

    Returns:
        The outcome without iterations, log lines and hint.
    """
    ends = [facts.end for facts in ranks if facts.end is not None]
    name = "" if stop is None else _name(stop.number)
    stopped = Outcome("stopped", exit_code=128 + stop.number if stop else 0, signal=name)
    if len(ends) == len(ranks) and all(end.get("status") in GOOD for end in ends):
        told = next((end for end in ends if end["status"] == "stopped"), None)
        if told is None:
            return Outcome("finished", reason=str(ends[0].get("reason", "")))
        return replace(stopped, reason=f"saved after {stop}" if stop else str(told.get("reason", "")))
    if ended == "second signal":
        by = f"Ctrl-C after {stop.after}" if stop and stop.after else "a second Ctrl-C"
        return replace(stopped, kind=AT_ONCE, reason=f"killed at once by {by}, without saving")
    first = first_failure(ranks, stop)
    if first is not None:
        said = first.end or {}
        return Outcome(
            "failed",
            reason=_cause(first),
            rank=first.rank,
            exit_code=1,
            kind=_kind(first),
            requested_bytes=int(said.get("requested", 0)),
            signal=name,
        )
    assert stop is not None, "no rank failed, none was stopped, and not all have ended"
    if ended == "grace":
        late = [facts.rank for facts in ranks if facts.exit_code is None]
        return replace(
            stopped,
            reason=f"{_several(late)} not saved and left within {grace_s:g} s of {stop} and "
            f"{'was' if len(late) == 1 else 'were'} killed",
            hint="launch.grace_s gives them longer",
        )
    return replace(stopped, reason=f"{stop} came before a first step was done: there was nothing to save")


def first_failure(ranks: Sequence[RankFacts], stop: Stop | None) -> RankFacts | None:
    """The rank whose failure caused the others', or None where none has failed.

    The earliest counts, except that a rank killed or crashed at about the same moment comes first, and one
    that has only lost its connection to another comes last. A rank that a signal to stop has ended (it was
    still starting, and could not save) has not failed, nor has one that fails afterwards because that peer is
    gone.
    """
    failed = [facts for facts in ranks if facts.failed_at is not None]
    if stop and any(facts.exit_code in _ENDED_BY_A_STOP for facts in failed):
        failed = [facts for facts in failed if _is_root(facts) or _failed_before(facts, stop)]
    if not failed:
        return None
    earliest = min(facts.failed_at for facts in failed if facts.failed_at is not None)

    def order(facts: RankFacts) -> tuple[bool, bool, float]:
        assert facts.failed_at is not None
        is_root = _is_root(facts) and facts.failed_at <= earliest + _SAME_MOMENT_S
        return not is_root, (facts.end or {}).get("kind") == "peer", facts.failed_at

    return min(failed, key=order)


def _failed_before(facts: RankFacts, stop: Stop) -> bool:
    if facts.exit_code in _ENDED_BY_A_STOP or (facts.end or {}).get("kind") == "peer":
        return False
    return (facts.failed_at or 0.0) < stop.time


def _is_root(facts: RankFacts) -> bool:
    return facts.exit_code is not None and -facts.exit_code in _ROOT_SIGNALS


def _kind(facts: RankFacts) -> str:
    if facts.exit_code == -signal.SIGKILL:
        return "killed"
    said = str((facts.end or {}).get("kind", ""))
    if said or facts.end is not None:
        return said
    if facts.exit_code == _USAGE:
        return "config"
    return "crashed" if _is_root(facts) else ""


def _cause(facts: RankFacts) -> str:
    said = str(facts.end.get("reason", "")) if facts.end and facts.end.get("status") not in GOOD else ""
    if said and facts.exit_code != -signal.SIGKILL:
        return f"rank {facts.rank} failed: {said}"
    if facts.exit_code is None:
        return f"rank {facts.rank} failed"
    if facts.exit_code == -signal.SIGKILL:
        by = "probably by the kernel's out-of-memory killer"
        return f"rank {facts.rank} was killed by signal 9 (SIGKILL), {by}"
    if facts.exit_code < 0:
        return f"rank {facts.rank} was killed by {_name(-facts.exit_code)}"
    if facts.exit_code == 0:
        return f"rank {facts.rank} left with exit code 0 and did not say that it had finished"
    return f"rank {facts.rank} ended with exit code {facts.exit_code}"


def _name(number: int | None) -> str:
    if number is None:
        return "a signal"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _several(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {_listed(ranks)} have"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
