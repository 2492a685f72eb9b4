"""Whether a run has stopped getting better, read off its own validations: so the count survives restarts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megaplug.runs.metrics import is_validation

EARLY_STOP = "early stop"


@dataclass(frozen=True)
class Plateau:
    """How long no validation has been better than the best before it.

    Attributes:
        best: The lowest validation loss that counted as better, nats per token; infinity before any.
        best_iteration: Its step.
        waited: Validations since.
        iteration: The step of the last of them.
    """

    best: float = math.inf
    best_iteration: int = 0
    waited: int = 0
    iteration: int = 0

    def reason(self, min_delta: float) -> str:
        """For a person.

        Args:
            min_delta: As of `plateau_of`: a lower loss may have been no better.
        """
        waited = f"{EARLY_STOP}: {self.waited} validation{'s' if self.waited != 1 else ''}"
        if self.best == math.inf:
            return f"{waited} without a better loss (best: none is known)"
        best = f"{self.best:.4f} at step {self.best_iteration:,}"
        if not min_delta:
            return f"{waited} without a better loss (best: {best})"
        return f"{waited}, none better by at least {min_delta:g} than {best}"


def plateau_of(lines: Iterable[Mapping[str, Any]], min_delta: float) -> Plateau:
    """Follow the validations of a run; one that is not finite is no better than any.

    Args:
        lines: From `megaplug.runs.metrics.read_metrics`.
        min_delta: By how much a loss must be lower than the best to be better; 0: lower at all.
    """
    found = Plateau()
    for line in lines:
        if not is_validation(line):
            continue
        loss, iteration = line["valid_loss"], line["iteration"]
        better = loss is not None and loss < found.best and found.best - loss >= min_delta
        if better:
            found = Plateau(loss, iteration, 0, iteration)
        else:
            found = Plateau(found.best, found.best_iteration, found.waited + 1, iteration)
    return found


def has_stopped(
    lines: Iterable[Mapping[str, Any]], iteration: int, patience: int | None, min_delta: float
) -> Plateau | None:
    """The plateau at which a run has ended, or ends now; None where it goes on.

    Args:
        lines: As of `plateau_of`.
        iteration: The step of the checkpoint, or the one that was just validated; later ones do not count.
        patience: Validations without a better loss at which it ends; None for never.
        min_delta: As of `plateau_of`.
    """
    if patience is None:
        return None
    found = plateau_of((line for line in lines if line["iteration"] <= iteration), min_delta)
    return found if found.waited >= patience and found.iteration == iteration else None
