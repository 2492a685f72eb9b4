"""What the events of a run add up to, independent of how it is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from megaplug.launchers.screen import count, duration

_RECENT_STEPS = 20


class Track:
    """Where a run stands.

    Args:
        iters: The step at which it is finished or stops for now.
        iteration: The step it starts from.
    """

    def __init__(self, iters: int, iteration: int = 0) -> None:
        self.iters = iters
        self.iteration = iteration
        self.phase = "starting"
        self.is_leaving = False
        self.loss: float | None = None
        self.valid_loss: float | None = None
        self.valid_losses: dict[str, float | None] = {}
        self.num_steps = 0
        self._saved = iteration
        self._stops = False
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)
        self._tokens = 0.0
        self._seconds = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """Add one event. The first step says nothing of the pace: it pays for what is made once."""
        kind = event["event"]
        if kind == "phase":
            if not self._stops:  # what was begun before it was heard
                self.phase, self.is_leaving = str(event.get("name", "")), False
        elif kind == "restart":
            self.phase, self.iteration = "starting again", int(event["from_iteration"])
            self._saved, self.is_leaving = self.iteration, False
            self._recent.clear()
        elif kind == "step":
            self.phase = "training"
            self.iteration = int(event["iteration"])
            self._look_at_the_end()
            self.loss = event.get("loss")
            self.num_steps += 1
            seconds, rate = event.get("seconds"), event.get("tokens_per_second")
            if seconds and rate and self.num_steps > 1:
                self._recent.append((seconds, rate * seconds))
                self._seconds += seconds
                self._tokens += rate * seconds
        elif kind == "saved":
            self._saved = max(self._saved, int(event["iteration"]))
            self._look_at_the_end()
        elif kind == "ending":
            self.phase, self.is_leaving = "waiting for the ranks to end", True
            if self._stops:
                self._look_at_the_end()
        elif kind == "stopping":
            self._stops, self.is_leaving = True, True
            if not event["saves"]:
                self.phase = "stopping"
            elif self.phase == "validating" or self.iteration >= self.iters:
                self._look_at_the_end()
            else:
                self.phase = "stopping: the step is finished and saved"
        elif kind == "valid":
            self._look_at_the_end()
            if event.get("split", "valid") != "valid":
                return
            if "source" in event:
                self.valid_losses[str(event["source"])] = event.get("valid_loss")
            else:
                self.valid_loss = event.get("valid_loss")

    def _look_at_the_end(self) -> None:
        """What is left to do where no further step comes."""
        saved = self._saved >= self.iteration
        if self._stops:
            waits = "saved, waiting for the ranks to end"
            self.phase = f"stopping: {waits if saved else f'saving step {self.iteration:,}'}"
        elif self.iteration >= self.iters:
            self.phase, self.is_leaving = "ending" if saved else f"saving step {self.iteration:,}", True

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last few steps; None before the second."""
        seconds = sum(seconds for seconds, _ in self._recent)
        return sum(tokens for _, tokens in self._recent) / seconds if seconds else None

    @property
    def mean_tokens_per_second(self) -> float | None:
        """Over all steps but the first; None before the second."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the last few steps, validation and saving not counted; None before the second."""
        if not self._recent:
            return None
        return (self.iters - self.iteration) * sum(seconds for seconds, _ in self._recent) / len(self._recent)

    def place_text(self) -> str:
        """The step, of how many."""
        return f"step {self.iteration:>{len(str(self.iters))}}/{self.iters}"

    def step_text(self) -> str:
        """Step, loss, tokens a second, time left."""
        parts = [self.place_text()]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.tokens_per_second is not None:
            parts.append(f"{count(self.tokens_per_second)} tokens/s")
        if self.seconds_left is not None and self.iteration < self.iters:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)


def event_text(event: Mapping[str, Any]) -> str | None:
    """The line for an event that is shown in words; None for one that only moves the progress line."""
    kind = event["event"]
    if kind == "valid":
        name = "test" if event.get("split") == "test" else "validation"
        loss = event["valid_loss"]
        if "source" in event:
            name = f"{name} of {event['source']}:"
        return f"step {event['iteration']}  {name} loss " + ("unknown" if loss is None else f"{loss:.4f}")
    if kind == "saved":
        took = f" in {event['seconds']:.2f} s" if "seconds" in event else ""
        # Where it was written while training went on.
        if "stood_still" in event and event["stood_still"] < 0.9 * event["seconds"]:
            took += f", for which training stood still {event['stood_still']:.2f} s"
        return f"step {event['iteration']}  checkpoint saved{took}"
    if kind == "stopping":
        return _stopping_text(event)
    if kind == "restart":
        row = f"{event['number']} ({event['in_a_row']} of {event['at_most']} in a row)"
        place = f"from step {event['from_iteration']}" if event["from_iteration"] else "from the beginning"
        return f"restart {row}, {place}: {event['reason']}"
    if kind == "kernels":
        return _kernels_text(event)
    if kind == "note":
        return str(event.get("text", ""))
    return None


def _stopping_text(event: Mapping[str, Any]) -> str:
    told = f"{event['signal']} to rank {event['rank']}" if "rank" in event else event["signal"]
    if not event["saves"]:
        return f"{told}: stopping at once: no step is done yet, there is nothing to save"
    within = f"within {duration(event['grace_s'])} (launch.grace_s)"
    again = "Ctrl-C again" if told == "SIGINT" else "Ctrl-C"
    return f"{told}: stopping: the step is finished and saved, {within}; {again} ends at once"


def _kernels_text(event: Mapping[str, Any]) -> str:
    """What runs, as rank 0 has read it from what Megatron built; laid out like the header above it."""
    parts = event["kernels"]
    width = max(map(len, parts))
    rows = [f"    {key.replace('_', ' '):<{width}}  {value}" for key, value in parts.items()]
    return "\n".join(["  kernels that run", *rows])
