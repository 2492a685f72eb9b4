"""``launch.at_once``: runs of a sweep side by side on this machine, and what is shown of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megaplug.commands import cli
from megaplug.commands.sweep_points import Point
from megaplug.errors import UserError
from megaplug.job.checks import resolve_topology
from megaplug.job.derive import resolve_device
from megaplug.job.schema import Job
from megaplug.launchers.machine import detect_machine, visible_gpus
from megaplug.launchers.screen import count
from megaplug.launchers.side_by_side import SideBySide, Work
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.track import event_text

_EVERY_S = 10.0
# How a command says why it has not started anything.
_ERROR = "error: "


class Packed:
    """Runs of a sweep.

    Args:
        points: Whose runs are to be started, all of them checked.
        is_json: Whether a program reads what is said.
        alone: Gives the command that would start a point alone.
        started: Is told a point whose run begins.
    """

    def __init__(
        self,
        points: Sequence[Point],
        is_json: bool,
        alone: Callable[[Point], cli.CommandLine],
        started: Callable[[Point], None],
    ) -> None:
        self._points = points
        self._is_json = is_json
        self._alone = alone
        self._told = started
        self._shown_at: dict[int, float] = {}
        self._errors: dict[int, str] = {}

    def run(self) -> tuple[dict[int, int], int | None]:
        """Run them; returns the exit codes by the points' numbers, and the signal that has come first.

        Raises:
            UserError: A run needs what its neighbours have, too.
        """
        points = self._points
        if not points:
            return {}, None
        by_number = {point.number: point for point in points}
        machine, at_once = detect_machine(), min(_job(points[0]).launch.at_once or 1, len(points))
        works = [_work(point, self._alone(point)) for point in points]
        most = max(resolve_topology(_job(point)).world_size for point in points)
        threads = max(1, machine.cpu_count // (at_once * most))
        beside = SideBySide(
            at_once, visible_gpus(), threads, lambda number: self._told(by_number[number]), self._said
        )
        with StopSignals() as signals:
            codes = beside.run(works, signals)
            return codes, signals.heard

    def refused(self, codes: Mapping[int, int]) -> dict[int, str]:
        """Why runs could not be started, by the points' numbers.

        Args:
            codes: From `run`.
        """
        return {
            number: self._errors[number] for number, code in codes.items() if code and number in self._errors
        }

    def _said(self, number: int, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            if line.startswith(_ERROR):
                self._errors[number] = line.removeprefix(_ERROR)
            cli.tell(lambda text: print(text, file=sys.stderr, flush=True), f"point {number}  {line}")
        elif self._is_json:
            cli.tell(_print, json.dumps({**event, "point": number}))
        elif (text := self._text(number, event)) is not None:
            cli.tell(_print, f"point {number}  {text}")

    def _text(self, number: int, event: Mapping[str, Any]) -> str | None:
        """What a person is shown of an event; of steps one in ten seconds."""
        if event["event"] == "summary":
            reason = f": {event['reason']}" if event.get("reason") else ""
            return f"{event['status']} at step {event['iteration']} of {event['iters']}{reason}"
        if event["event"] != "step":
            return event_text(event) if event["event"] in ("note", "restart", "stopping") else None
        now = time.monotonic()
        if now - self._shown_at.get(number, float("-inf")) < _EVERY_S:
            return None
        self._shown_at[number] = now
        loss, rate = event.get("loss"), event.get("tokens_per_second")
        said = "" if loss is None else f"  loss {loss:.4f}"
        return f"step {event['iteration']}{said}{'' if rate is None else f'  {count(rate)} tokens/s'}"


def _print(text: str) -> None:
    print(text, flush=True)


def _job(point: Point) -> Job:
    assert point.job is not None
    return point.job


def _work(point: Point, command: cli.CommandLine) -> Work:
    """What a point's run is started by.

    Raises:
        UserError: Its layout was chosen for all that this machine has.
    """
    job = _job(point)
    if any(word.startswith("topology=auto") for word in point.words):
        message = "a layout that is chosen for the whole machine leaves no room for other runs"
        raise UserError(
            f"launch.at_once: {message}", hint="give the sizes of topology, or leave out launch.at_once"
        )
    on_gpus = resolve_device(job.device, detect_machine().num_gpus) == "cuda"
    num_gpus = resolve_topology(job).world_size if on_gpus else 0
    return Work(point.number, (sys.argv[0], *command.words(), "launch.output=json"), num_gpus)
