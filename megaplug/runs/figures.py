"""What a run has come to: its last losses and how fast it was."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaplug.runs.metrics import read_metrics, validations

# Steps that the loss and the throughput are taken of; one step's loss says little.
_STEPS = 10


@dataclass(frozen=True)
class Figures:
    """Of a whole run; what it has not recorded is None.

    Attributes:
        iteration: The last step.
        tokens: Consumed.
        loss: Of training, nats a token; mean over the last ten steps.
        valid_loss: At the last validation, nats a token.
        best_valid_loss: The lowest of all.
        tokens_per_second: Median of the last ten steps, all ranks together.
    """

    iteration: int | None = None
    tokens: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    tokens_per_second: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def figures_of(metrics_file: Path) -> Figures:
    """Read them.

    Raises:
        UserError: The file cannot be read.
    """
    lines = read_metrics(metrics_file)
    steps = [line for line in lines if line.get("loss") is not None]
    valid = [loss for _, loss in validations(lines)]
    if not steps and not valid:
        return Figures()
    last = steps[-_STEPS:]
    rates = [line["tokens_per_second"] for line in last if line.get("tokens_per_second") is not None]
    return Figures(
        iteration=lines[-1]["iteration"],
        tokens=steps[-1].get("tokens") if steps else None,
        loss=statistics.fmean(line["loss"] for line in last) if last else None,
        valid_loss=valid[-1] if valid else None,
        best_valid_loss=min(valid) if valid else None,
        tokens_per_second=statistics.median(rates) if rates else None,
    )
