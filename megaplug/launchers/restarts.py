"""Which failures of a job a fresh start can cure, and when it is enough.

What comes from outside (a killed rank, a lost connection, a rank that hangs) or may have been chance is tried
again; what would only come again is not: a mistake in the configuration, a failure before the first step, the
same failure at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.launchers.verdict import Outcome

# Kinds of failures that a start can meet by chance before its first step.
_BY_CHANCE = (
    "killed", "crashed", "hang", "helper", "peer", "node", "data", "nan", "transient", "unexplained",
)  # fmt: skip
# May come twice at the same step and be chance both times.
_FROM_OUTSIDE = ("killed", "helper", "node")
_NEVER = {
    "missing": "a node has not come, and was waited for",
    "config": "the configuration is wrong, and would be again",
    "disk": "the disk is full or may not be written to, and would be so again",
    "persistent": "a GPU computes wrongly, and would again",
    "reproducible": "the result is what this step computes, and would be again",
}


@dataclass(frozen=True)
class Restart:
    """One start after a failure.

    Attributes:
        number: Of this command, from 1.
        reason: Why the ranks had to be started again.
        kind: As of `Outcome`.
        rank: The rank that failed.
        iteration: The last step that was seen.
        from_iteration: The step of the checkpoint that it goes on from, 0 for the beginning.
    """

    number: int
    reason: str
    kind: str
    rank: int | None
    iteration: int
    from_iteration: int


class Restarts:
    """Those of one command.

    Args:
        at_most: How many there may be in a row; a checkpoint that was saved since the last begins a new row.

    Attributes:
        comes_again: Whether the failure that `why_not` was last asked about would meet that command again.
    """

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self.done: list[Restart] = []
        self.in_a_row = 0
        self.comes_again = False
        self._last: tuple[str, int | None, int] | None = None

    def why_not(self, outcome: Outcome, began_at: int) -> str:
        """Why a job that has failed is not started again; empty where it is.

        Args:
            outcome: How it has ended.
            began_at: The step of the checkpoint that it had begun from, 0 for none.
        """
        assert outcome.status == "failed"
        failure = (outcome.kind, outcome.rank, outcome.iteration)
        before, self._last = self._last, failure
        again = _why_again(outcome, began_at, is_same=failure == before)
        # A job that was started for another device's opinion, and has none to ask, gets none next time.
        alone = outcome.kind == "unexplained" and outcome.iteration <= began_at
        self.comes_again = bool(again) or alone
        if outcome.signal:
            return "it was told to stop"
        return again or ("" if self.at_most else "watch.max_restarts is 0")

    def take(self, outcome: Outcome, began_at: int, from_iteration: int) -> Restart | None:
        """Count one, after `why_not` has nothing against it; None where there were enough.

        Args:
            outcome: As of `why_not`.
            began_at: As of `why_not`.
            from_iteration: The step of the whole checkpoint that it would go on from, 0 for the beginning.
        """
        if from_iteration > began_at:
            self.in_a_row = 0
        if self.in_a_row >= self.at_most:
            return None
        self.in_a_row += 1
        restart = Restart(
            len(self.done) + 1, outcome.reason, outcome.kind, outcome.rank, outcome.iteration, from_iteration
        )
        self.done.append(restart)
        return restart

    @property
    def enough(self) -> str:
        """What is said where `take` has nothing more."""
        times = "once" if self.at_most == 1 else f"{self.at_most} times"
        return f"it was {times} without a new checkpoint, as watch.max_restarts allows"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, in order."""
        return tuple(restart.reason for restart in self.done)


def _why_again(outcome: Outcome, began_at: int, is_same: bool) -> str:
    """Why another start would come to the same end; empty where it may not."""
    no_step = outcome.iteration <= began_at
    if outcome.kind in _NEVER:
        return _NEVER[outcome.kind]
    if outcome.kind == "memory" and no_step:
        return "it has not done a step with this memory, and would not again"
    if outcome.kind not in (*_BY_CHANCE, "memory") and no_step:
        return "it fails before its first step, and would again"
    if is_same and outcome.kind == "unexplained":
        return "it has computed the same on the same device; only another device can tell who is right"
    if is_same and outcome.kind not in _FROM_OUTSIDE:
        return f"it is the same failure as before, after step {outcome.iteration:,} again"
    return ""
