"""Which checkpoints of a run are kept, and the removal of the others.

Three wishes, each of which keeps what it names: the newest few, those of every so many steps, and those with
the lowest validation loss. The newest is always kept: it is what the run goes on from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaplug.runs.checkpoints import Checkpoint, delete, list_checkpoints
from megaplug.runs.metrics import read_metrics, validations


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        keep: The newest checkpoints, at least one.
        keep_every: Those whose step is a multiple of this, too; None for none.
        keep_best: So many of those with the lowest validation loss, too.
    """

    keep: int
    keep_every: int | None = None
    keep_best: int = 0

    def __post_init__(self) -> None:
        assert self.keep >= 1 and self.keep_best >= 0
        assert self.keep_every is None or self.keep_every >= 1

    def at_once(self, save_interval: int, iters: int) -> int:
        """The most checkpoints that there are at any one time, the one that is being written included.

        Args:
            save_interval: Steps between two of them.
            iters: Steps of the whole run.
        """
        multiples = 0 if self.keep_every is None else iters // math.lcm(save_interval, self.keep_every)
        return min(self.keep + self.keep_best + multiples, math.ceil(iters / save_interval)) + 1


def kept(
    checkpoints: Sequence[Checkpoint], losses: Mapping[int, float], policy: Retention
) -> list[Checkpoint]:
    """The checkpoints that a policy keeps, oldest first.

    Args:
        checkpoints: All that there are, in any order.
        losses: The validation loss of the steps that were validated. A checkpoint of another step, or whose
            loss is not a number, is none of the best: only the other two wishes keep it. Of two equal ones
            the later is the better.
        policy: What is kept.
    """
    ordered = sorted(checkpoints, key=lambda found: (found.iteration, found.path.name))
    validated = [found for found in ordered if not math.isnan(losses.get(found.iteration, math.nan))]
    best = sorted(validated, key=lambda found: (losses[found.iteration], -found.iteration))
    wanted = {*ordered[-policy.keep :], *best[: policy.keep_best]}
    if policy.keep_every is not None:
        wanted |= {found for found in ordered if found.iteration % policy.keep_every == 0}
    return [found for found in ordered if found in wanted]


def validation_losses(metrics_file: Path) -> dict[int, float]:
    """The loss on the whole validation split by step, as a run has recorded it; only numbers."""
    return dict(validations(read_metrics(metrics_file)))


def prune(directory: Path, policy: Retention, losses: Mapping[int, float]) -> list[Checkpoint]:
    """Delete what a policy does not keep, and return it, oldest first.

    A checkpoint loses its name first, so that one that is half deleted is never taken for one.

    Args:
        directory: The run's folder of checkpoints.
        policy: What is kept.
        losses: As `validation_losses` finds them.

    Raises:
        UserError: If the disk refuses.
    """
    checkpoints = list_checkpoints(directory)
    wanted = kept(checkpoints, losses, policy)
    old = [found for found in checkpoints if found not in wanted]
    for checkpoint in old:
        delete(checkpoint)
    return old
