"""When and whom a kill of the campaign hits: a moment of a run's life, and a victim in it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.campaigns import Command
from benchmarks.run_figures import being_saved, tracked
from megaplug.errors import UserError
from megaplug.runs.checkpoints import SAVING, list_checkpoints
from megaplug.runs.folder import RunFolder

# "any" is uniform over the life of a run that nobody disturbs, the others wait for a phase.
AIMS = ("any", "saving", "named", "pruning", "metrics")
VICTIMS = ("launcher", "a rank", "all ranks", "all at once")


@dataclass(frozen=True)
class Life:
    """How long an undisturbed run takes, in seconds.

    Attributes:
        start_s: To its first step.
        training_s: From there to its end.
        writing_s: One checkpoint, from its folder to its name.
    """

    start_s: float
    training_s: float
    writing_s: float


@dataclass(frozen=True)
class Strike:
    """A kill that is meant.

    It waits for steps and not for a time: on a busy machine no two runs take equally long.

    Attributes:
        aim: One of `AIMS`.
        after_step: It lands when this step was heard of; None for a time before the first.
        after_s: Seconds from then on, or from the start of the command. A phase is looked for only then.
        delay_s: From the moment that the phase is seen.
        victim: One of `VICTIMS`.
        rank: Which, where it is one.
    """

    aim: str
    after_step: int | None
    after_s: float
    delay_s: float
    victim: str
    rank: int

    @classmethod
    def draw(cls, chance: random.Random, life: Life, whole: int, iters: int, world_size: int) -> Strike:
        """A kill of a run that goes on from a checkpoint."""
        aim = chance.choice(("any",) * (len(AIMS) - 1) + AIMS[1:])
        training_s, steps = life.training_s * (1 - whole / iters), range(whole + 1, iters + 1)
        after_step: int | None
        in_start = chance.uniform(0.0, life.start_s + training_s) < life.start_s
        if not steps or (aim == "any" and in_start):
            after_step, after_s = None, chance.uniform(0.0, life.start_s)
        else:
            last = iters if aim == "any" else max(steps[0], iters - 4)
            after_step = chance.randint(steps[0], last)
            # As long as two steps, one of which is saved.
            after_s = chance.uniform(0.0, 2 * life.training_s / iters)
        delay_s = chance.uniform(0.0, life.writing_s) if aim == "saving" else 0.0
        return cls(aim, after_step, after_s, delay_s, chance.choice(VICTIMS), chance.randrange(world_size))

    def land(self, command: Command) -> bool:
        """Wait for the moment and kill; False if the command has ended before it."""

        def is_late_enough() -> bool:
            command.ranks()
            if self.after_step is None:
                return time.monotonic() >= command.began + self.after_s or bool(command.of("step"))
            return any(event["iteration"] >= self.after_step for event in command.of("step"))

        if not command.wait_for(is_late_enough, poll_s=0.002):
            return False
        if self.after_step is not None:
            time.sleep(self.after_s)
        if self.aim != "any":
            folder = command.folder()
            assert folder is not None
            if not command.wait_for(_phase(self.aim, folder), poll_s=0.0005):
                return False
            time.sleep(self.delay_s)
        return self._kill(command)

    def _kill(self, command: Command) -> bool:
        ranks = command.ranks()
        command.living()  # so that they are known
        if command.process.poll() is not None:
            return False
        victims: list[int] = []
        if self.victim == "a rank":
            victims = [ranks[self.rank]] if self.rank in ranks else []
        elif self.victim == "all ranks":
            victims = list(ranks.values())
        if victims:
            hit = [_killed(pid) for pid in victims]
            return any(hit)
        # Before there are ranks there is only the launcher.
        command.process.kill()
        if self.victim == "all at once" and ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks[0], signal.SIGKILL)
        return True


def _killed(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _phase(aim: str, folder: RunFolder) -> Callable[[], bool]:
    """Whether a run is in that phase, as its folder shows."""
    place = folder.checkpoints / SAVING
    size = folder.metrics_file.stat().st_size if folder.metrics_file.exists() else 0

    def named() -> bool:
        found = list_checkpoints(folder.checkpoints)
        return bool(found) and found[-1].iteration > tracked(folder)

    def pruning() -> bool:
        return place.is_dir() and any(entry.name.startswith("old_") for entry in place.iterdir())

    def metrics() -> bool:
        return folder.metrics_file.exists() and folder.metrics_file.stat().st_size != size

    phases: dict[str, Callable[[], bool]] = {
        "saving": lambda: bool(being_saved(folder)),
        "named": named,
        "pruning": pruning,
        "metrics": metrics,
    }
    return _unless_it_goes(phases[aim])


def _unless_it_goes(phase: Callable[[], bool]) -> Callable[[], bool]:
    """A folder may be removed while it is listed."""

    def holds() -> bool:
        try:
            return phase()
        except (OSError, UserError):
            return False

    return holds
