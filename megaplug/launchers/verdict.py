"""What has become of a job, judged from what its ranks said and how they ended."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Why the supervisor ended the group itself; None where every rank left on its own.
Ended = Literal["grace", "second signal", "report", "teardown", "hang"]

# A rank that these end was hit from outside or crashed; its peers fail too, even before the death is seen.
# SIGABRT is not among them: it is how a collective reports that a peer is gone.
_ROOT_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_SAME_MOMENT_S = 1.0
GOOD = ("finished", "stopped")
_USAGE = 2


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
        kind: What a failed rank has said of its failure (``memory``, ``data``, ``nan``, ``peer``, ``exit``,
            ``error``; ``transient``, ``unexplained``, ``persistent`` or ``reproducible`` where Megatron has
            computed a step again), ``killed`` by SIGKILL, ``crashed``, ``config`` (left with exit code 2), or
            ``hang``; empty where none is so.
        peak_bytes: The most memory that it has said it had used, 0 where it has not.
        requested_bytes: The allocation that failed, 0 where it is not known.
        signalled: The job had been told to stop.
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
    signalled: bool = False


def judge(
    ranks: Sequence[RankFacts], stop_signal: int | None, ended: Ended | None, grace_s: float
) -> Outcome:
    """Decide what has happened.

    Every rank's own ``end`` event counts before any exit code. A rank that left without one has failed, also
    with exit code 0: Megatron leaves with 0 from a run that did nothing.

    Args:
        ranks: All ranks.
        stop_signal: The first signal that the supervisor received.
        ended: Why the supervisor ended the group.
        grace_s: For the text.

    Returns:
        The outcome without iterations, log lines and hint.
    """
    ends = [facts.end for facts in ranks if facts.end is not None]
    signal_code = 128 + stop_signal if stop_signal else 0
    if len(ends) == len(ranks) and all(end.get("status") in GOOD for end in ends):
        stopped = next((end for end in ends if end["status"] == "stopped"), None)
        if stopped is None:
            return Outcome("finished", reason=str(ends[0].get("reason", "")))
        reason = f"saved after {_name(stop_signal)}" if stop_signal else str(stopped.get("reason", ""))
        return Outcome("stopped", reason=reason, exit_code=signal_code)
    if ended == "second signal":
        return Outcome(
            "stopped", reason="killed at once by a second signal, without saving", exit_code=signal_code
        )
    first = first_failure(ranks, stop_signal)
    if first is not None:
        said = first.end or {}
        return Outcome(
            "failed",
            reason=_cause(first),
            rank=first.rank,
            exit_code=1,
            kind=_kind(first),
            requested_bytes=int(said.get("requested", 0)),
        )
    if ended == "grace":
        late = [facts.rank for facts in ranks if facts.exit_code is None]
        return Outcome(
            "failed",
            reason=f"ranks {_listed(late)} did not save and leave within {grace_s:g} s of "
            f"{_name(stop_signal)} and were killed",
            rank=late[0] if late else None,
            exit_code=1,
            hint="give them longer with launch.grace_s",
        )
    assert stop_signal is not None, "no rank failed, none was stopped, and not all have ended"
    return Outcome(
        "stopped", reason=f"stopped by {_name(stop_signal)} before it could save", exit_code=signal_code
    )


def first_failure(ranks: Sequence[RankFacts], stop_signal: int | None) -> RankFacts | None:
    """The rank whose failure caused the others', or None where none has failed.

    The earliest counts, except that a rank killed or crashed at about the same moment comes first, and one
    that has only lost its connection to another comes last. A rank that SIGTERM ended after the supervisor
    had sent it (it was still starting, and could not save) has not failed, nor has one that fails afterwards
    because that peer is gone.
    """
    failed = [facts for facts in ranks if facts.failed_at is not None]
    if stop_signal:
        gone = [facts.failed_at or 0.0 for facts in failed if facts.exit_code == -signal.SIGTERM]
        since = min(gone, default=float("inf"))
        failed = [facts for facts in failed if (facts.failed_at or 0.0) < since or _is_root(facts)]
    if not failed:
        return None
    earliest = min(facts.failed_at for facts in failed if facts.failed_at is not None)

    def order(facts: RankFacts) -> tuple[bool, bool, float]:
        assert facts.failed_at is not None
        is_root = _is_root(facts) and facts.failed_at <= earliest + _SAME_MOMENT_S
        return not is_root, (facts.end or {}).get("kind") == "peer", facts.failed_at

    return min(failed, key=order)


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


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
