"""What stands above and below a run's progress: the header and the summary, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Header:
    """What is about to run.

    Attributes:
        rows: Labels and values, such as ``("model", "tiny, 3.2 M parameters")``.
    """

    rows: Sequence[tuple[str, str]]

    def lines(self) -> list[str]:
        """One line a row, values aligned."""
        return _aligned(self.rows)

    def as_json(self) -> dict[str, Any]:
        """The same as one object."""
        return {"event": "header", **{label.replace(" ", "_"): value for label, value in self.rows}}


@dataclass(frozen=True)
class Summary:
    """What has come of a run.

    Attributes:
        status: ``finished``, ``stopped`` or ``failed``.
        iteration: The last step.
        iters: The step at which it is finished.
        reason: Why it ended.
        loss: Training loss of the last step, nats a token.
        valid_loss: Validation loss, nats a token.
        valid_losses: The same on each source, where there are several.
        unigram_loss: The same for a unigram model of the same text, to compare with.
        tokens_per_second: Measured, all ranks together.
        files: Labels and paths.
        next_command: What to type next, and what for.
        rank: The rank that failed first.
        log_tail: The last lines of its log.
        hint: What would help.
        details: Labels and values on a failure: who, how much memory, what was saved, what would fit;
            and how often the ranks were started again.
        num_restarts: How often.
        restart_reasons: Why.
    """

    status: str
    iteration: int
    iters: int
    reason: str = ""
    loss: float | None = None
    valid_loss: float | None = None
    valid_losses: Mapping[str, float | None] = field(default_factory=dict)
    unigram_loss: float | None = None
    tokens_per_second: float | None = None
    files: Sequence[tuple[str, str]] = field(default_factory=tuple)
    next_command: str = ""
    rank: int | None = None
    log_tail: Sequence[str] = field(default_factory=tuple)
    hint: str = ""
    details: Sequence[tuple[str, str]] = field(default_factory=tuple)
    num_restarts: int = 0
    restart_reasons: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The text for a person; a failing rank's last lines come first, each with its rank."""
        lines = [f"rank {self.rank} | {line}" for line in self.log_tail]
        title = f"{self.status} at step {self.iteration:,} of {self.iters:,}"
        lines.append(f"{title}: {self.reason}" if self.reason else title)
        rows: list[tuple[str, str]] = [*self.details]
        if self.loss is not None:
            rows.append(("training loss", f"{self.loss:.4f} nats per token"))
        if self.valid_loss is not None:
            rows.append(("validation loss", f"{self.valid_loss:.4f}{self._against_unigram()}"))
        rows += [
            (f"  of {name}", f"{loss:.4f}") for name, loss in self.valid_losses.items() if loss is not None
        ]
        if self.tokens_per_second is not None:
            rows.append(("throughput", f"{count(self.tokens_per_second)} tokens/s (measured)"))
        rows += self.files
        if self.hint:
            rows.append(("hint", self.hint))
        if self.next_command:
            rows.append(("next", self.next_command))
        return lines + _aligned(rows)

    def as_json(self) -> dict[str, Any]:
        """The same as one object."""
        return {
            "event": "summary",
            "status": self.status,
            "iteration": self.iteration,
            "iters": self.iters,
            "reason": self.reason,
            "loss": self.loss,
            "valid_loss": self.valid_loss,
            "valid_losses": dict(self.valid_losses),
            "unigram_loss": self.unigram_loss,
            "tokens_per_second": self.tokens_per_second,
            "files": dict(self.files),
            "next_command": self.next_command,
            "rank": self.rank,
            "log_tail": list(self.log_tail),
            "hint": self.hint,
            "details": [list(detail) for detail in self.details],
            "num_restarts": self.num_restarts,
            "restart_reasons": list(self.restart_reasons),
        }

    def _against_unigram(self) -> str:
        if self.unigram_loss is None or self.valid_loss is None:
            return ""
        difference = self.unigram_loss - self.valid_loss
        than = "below" if difference >= 0 else "ABOVE"
        return (
            f" ({abs(difference):.4f} {than} the {self.unigram_loss:.4f} of a unigram model of the same text)"
        )


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(label) for label, _ in rows), default=0)
    return [f"  {label:<{width}}  {value}" for label, value in rows]


def count(number: float) -> str:
    """A large number in three digits: 950, 12.3k, 4.56M, 1T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What would be rounded to a thousand is one of the next unit.
        if number >= 0.9995 * limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """A time a person can read: 8 s, 3:05 min, 2:07 h, 3.1 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} days"
