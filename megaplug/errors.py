"""The one exception that is meant for a user, and the problems that a check collects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a job.

    Attributes:
        key: The configuration key that is at fault, such as ``topology.tp``.
        message: What is wrong, with the numbers that make it so.
        hint: What would be right; empty if nothing better than the message can be said.
        lacks: What this machine lacks, such as a package, where nothing else is wrong: the job may run on
            another. Empty for what is wrong everywhere.
        megatron_accepts: Whether Megatron lets it through in silence and does something else than what was
            asked for. The message says what.
    """

    key: str
    message: str
    hint: str = ""
    lacks: str = ""
    megatron_accepts: bool = False

    def __str__(self) -> str:
        text = f"{self.key}: {self.message}" if self.key else self.message
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class UserError(ValueError):
    """A mistake that a person can mend. It is shown without a traceback.

    Args:
        message: What is wrong, in one sentence, with the numbers that make it so.
        hint: What would be right.
        exit_code: What the command ends with: 2 before anything was started, 1 afterwards.
        problems: The single mistakes, for a program; the message as a whole if not given.
    """

    def __init__(
        self, message: str, *, hint: str = "", exit_code: int = 2, problems: Sequence[Problem] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.problems = tuple(problems) or (Problem("", message, hint),)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> UserError:
        """One error that lists every problem, so that all can be mended at once."""
        if len(problems) == 1:
            only = problems[0]
            return cls(
                f"{only.key}: {only.message}" if only.key else only.message, hint=only.hint, problems=problems
            )
        listed = "\n".join(f"  - {problem}" for problem in problems)
        return cls(f"{len(problems)} problems:\n{listed}", problems=problems)
