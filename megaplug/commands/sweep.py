"""``--multirun``: points are checked first; those that can be are run one after the other, and compared."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megaplug.commands import cli
from megaplug.commands.actions import Answer
from megaplug.commands.run import freeze, start
from megaplug.commands.runs_compare import compare
from megaplug.commands.submit import submit_all
from megaplug.commands.sweep_packed import Packed
from megaplug.commands.sweep_points import Point, Points, check_points
from megaplug.commands.sweep_report import as_json, confirming, explained, hours, listed
from megaplug.errors import UserError
from megaplug.job.compose import compose_job, sweep_space
from megaplug.job.schema import LaunchConfig
from megaplug.job.sweep_space import section_of
from megaplug.runs.atomic import disk_errors, strict_json, write_json_atomic
from megaplug.runs.figures import figures_of
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock

_SIGNALLED = 128


def sweep(command: cli.CommandLine) -> int:
    """Check all points, run those that are left, and compare all runs.

    Returns:
        The exit code: 1 where a run failed, 2 where none did and a point could not be run, else 0; 128 + N
        where signal N ended the sweep.

    Raises:
        UserError: No point can be run, or they cost more than ``launch.max_gpu_hours``.
    """
    space = sweep_space(command.overrides, command.source)
    own = [word for word in space.fixed if section_of(word) in ("sweep", "experiment")]
    if compose_job(own, command.source).sweep.kind == "optuna":
        from megaplug.commands.sweep_study import Study

        return Study(space, command).run()
    points = check_points(command.overrides, command.source)
    job = points.job
    if job is None or job.launch.kind != "print":
        return Sweep(points, command, None if job is None else job.launch).run()
    if job.launch.output == "json":
        cli.show(json.dumps(strict_json(as_json(points, command.typed())), indent=2))
    else:
        lines = listed(points)
        if _costs(points):
            lines.append(f"more than launch.max_gpu_hours: {confirming(points.gpu_hours)} starts it")
        cli.show("\n".join([*lines, "launch=print: nothing was started"]))
    return 2 if points.impossible else 0


def _costs(points: Points) -> bool:
    """Whether a sweep has to be confirmed."""
    limit = None if points.job is None else points.job.launch.max_gpu_hours
    return limit is not None and points.gpu_hours > limit


def too_costly(number: int, gpu_hours: float, launch: LaunchConfig) -> UserError:
    """That runs need more than was said that they may.

    Args:
        number: How many runs are left.
        gpu_hours: Modelled, of all of them.
        launch: With the limit.
    """
    are = "the run that is left needs" if number == 1 else f"the {number} runs that are left need"
    message = f"{are} {hours(gpu_hours)} GPU-hours (modelled): more than {launch.max_gpu_hours:g}"
    hint = f"{confirming(gpu_hours)} starts them; launch=print lists them"
    return UserError(f"launch.max_gpu_hours: {message}", hint=hint)


class Sweep:
    """The runs of one command.

    Args:
        points: Checked.
        command: What was typed.
        launch: Where and how all are run; None where no point can be composed.
    """

    def __init__(self, points: Points, command: cli.CommandLine, launch: LaunchConfig | None) -> None:
        self._points = points
        self._command = command
        as_typed = "launch.output=json" in command.overrides
        self._is_json = launch.output == "json" if launch is not None else as_typed
        self._freezes = launch is not None and launch.kind == "freeze"
        self._codes: dict[int, int] = {}
        self._refused: dict[int, str] = {}
        self._ended_by: int | None = None

    def run(self) -> int:
        """Start what is left, one after the other; the exit code."""
        points = self._points
        self._say({"event": "sweep", **self._report()}, explained(points))
        self._confirm()
        with self._alone_in_folder() if points.left else self._alone_if_possible():
            if points.job is not None and points.job.launch.kind == "slurm":
                return self._submit()
            self._go_through(points.left)
            return self._end()

    def _alone_in_folder(self) -> RunLock:
        """Nobody else runs this sweep meanwhile: what its points have come to is written by one.

        Raises:
            UserError: Somebody does, or there can be no folder.
        """
        assert self._points.folder is not None
        self._make_folder()
        # Its runs are the same whatever else is typed, so that only other runs go beside it.
        beside = "name=... makes runs of another name of it"
        return RunLock.acquire(RunFolder(self._points.folder), self._command.typed(), beside=beside)

    def _alone_if_possible(self) -> AbstractContextManager[object]:
        """As `_alone_in_folder`; where nothing is left to run the disk may refuse, such as a colleague's."""
        try:
            return self._alone_in_folder()
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                return nullcontext()
            raise

    def _go_through(self, left: Sequence[Point]) -> None:
        """Start runs, one after the other or side by side, until all have ended or a signal has come."""
        job = self._points.job
        if job is not None and (job.launch.at_once or 1) > 1 and not self._freezes:
            packed = Packed(left, self._is_json, self._alone, self._begins)
            codes, heard = packed.run()
            self._codes |= codes
            self._refused |= packed.refused(codes)
            self._ended_by = None if heard is None else _SIGNALLED + heard
            return
        for point in left:
            code = cli.guarded(functools.partial(self._start, point))
            self._codes[point.number] = code
            if code > _SIGNALLED or self._ended_by is not None:
                self._ended_by = self._ended_by or code
                return

    def _end(self) -> int:
        """Compare, write, and say how far it has come; the exit code."""
        code = self._exit_code()
        compared = self._compared()
        report = self._report(comparison=None if compared is None else compared.report)
        self._write(report)
        text = [] if compared is None else [compared.text]
        self._say({"event": "sweep_end", "exit_code": code, **report}, [*text, *self._ending()])
        return code

    def _confirm(self) -> None:
        points = self._points
        if not points.runs:
            raise UserError(f"none of the {len(points.all)} points can be run", hint="why stands above")
        if _costs(points) and not self._freezes:
            assert points.job is not None
            raise too_costly(len(points.left), points.gpu_hours, points.job.launch)

    def _submit(self) -> int:
        """Have SLURM start what is left; the exit code."""
        points, place = self._points, self._points.folder
        assert place is not None
        left = [(point.job, self._alone(point)) for point in points.left if point.job is not None]
        arrays = submit_all(left, place)
        report = self._report()
        self._write(report)
        said = [
            {"job": array.job, "script": str(array.script), "runs": len(array.folders)} for array in arrays
        ]
        lines = []
        for array in arrays:
            how = f"job {array.job}" if array.job else f"next: sbatch {shlex.quote(str(array.script))}"
            lines.append(f"{len(array.folders)} runs in {array.script}: {how}")
        lines.append(
            f"how they stand: {cli.sibling(self._command.program, 'runs')}; afterwards action=compare"
        )
        code = 2 if points.impossible else 0
        self._say({"event": "sweep_submitted", "exit_code": code, "arrays": said, **report}, lines)
        return code

    def _alone(self, point: Point) -> cli.CommandLine:
        """What would start a point alone."""
        return dataclasses.replace(self._command, overrides=list(point.words), multirun=False)

    def _start(self, point: Point) -> int:
        assert point.job is not None
        self._begins(point)
        one = self._alone(point)
        try:
            if self._freezes:
                return freeze(point.job, one)
            end = start(point.job, one)
        except UserError as error:
            self._refused[point.number] = error.message
            raise
        if end.heard is not None:
            # What has come too late for this run ends those that would follow.
            self._ended_by = _SIGNALLED + end.heard
        return end.exit_code

    @property
    def _num_points(self) -> int:
        return len(self._points.all)

    def _begins(self, point: Point) -> None:
        """Tell that a point's run begins."""
        points = self._points
        place, num_runs, own = points.runs.index(point) + 1, len(points.runs), " ".join(point.own)
        of_runs = f" (run {place} of {num_runs})" if num_runs < len(points.all) else ""
        self._tell(
            {"event": "point", "number": point.number, "run": place, "num_runs": num_runs, "own": own},
            [f"point {point.number} of {self._num_points}: {own}{of_runs}"],
        )
        self._write(self._report(running=point.number))

    def _exit_code(self) -> int:
        codes = self._codes
        if self._ended_by is not None and not self._is_whole:
            # Side by side none may have been started yet.
            return [0, *codes.values()][-1] or self._ended_by
        if any(codes[number] == 1 or codes[number] > _SIGNALLED for number in self._failed):
            return 1
        return 2 if self._is_faulty or any(codes.values()) else 0

    @property
    def _failed(self) -> list[int]:
        """The points whose run has failed: also by a signal to it alone, and none was to the sweep."""
        ended = self._ended_by is not None
        return [number for number, code in self._codes.items() if code and not (ended and code > _SIGNALLED)]

    @property
    def _is_faulty(self) -> bool:
        """Whether points were named that cannot be run."""
        return bool(self._points.impossible)

    @property
    def _is_whole(self) -> bool:
        """Whether nothing is left to do."""
        return self._num_good == len(self._points.runs)

    @property
    def _num_good(self) -> int:
        """Runs that have come to their end, now or before."""
        return len(self._points.runs) - len(self._points.left) + list(self._codes.values()).count(0)

    def _compared(self) -> Answer | None:
        """The comparison; None where there are not two runs with a step."""
        folder = self._points.folder
        if folder is None:
            return None
        there = [point.folder for point in self._points.runs if point.folder.path.is_dir()]
        try:
            if sum(figures_of(run.metrics_file).iteration is not None for run in there) < 2:
                return None
            return compare(there, folder / "comparison.png")
        except UserError as error:  # a full disk, as a rule; what has become of the runs counts more
            print(f"no comparison: {error}", file=sys.stderr)
            return None

    def _ending(self) -> Sequence[str]:
        """How far the sweep has come, and what goes on with it."""
        num_runs, good = len(self._points.runs), self._num_good
        parts = [f"{good} of {num_runs} runs are {'frozen' if self._freezes else 'finished'}"]
        if failed := self._failed:
            parts.append(f"failed: {'points' if len(failed) > 1 else 'point'} {', '.join(map(str, failed))}")
        lines = [f"{'; '.join(parts)}: {self._points.folder}/sweep.json"]
        if not self._is_whole:
            lines.append(f"  next  {self._command.typed()}   # runs what is missing")
        return lines

    def _report(self, running: int | None = None, **more: Any) -> dict[str, Any]:
        return as_json(self._points, self._command.typed(), running, self._refused) | more

    def _make_folder(self) -> None:
        assert self._points.folder is not None
        with disk_errors(self._points.folder, "make"):
            self._points.folder.mkdir(parents=True, exist_ok=True)

    def _write(self, report: Mapping[str, Any]) -> None:
        """Write ``sweep.json``; a disk that refuses is told, and ends no run."""
        assert self._points.folder is not None
        try:
            write_json_atomic(self._points.folder / "sweep.json", report)
        except UserError as error:
            cli.tell(lambda said: print(said, file=sys.stderr, flush=True), f"no sweep.json: {error}")

    def _say(self, event: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Answer, before the first run or after the last."""
        if text := self._text(event, lines):
            cli.show(text)

    def _tell(self, event: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Say what goes on; where that cannot be written, runs go on all the same."""
        if text := self._text(event, lines):
            cli.tell(lambda said: print(said, flush=True), text)

    def _text(self, event: Mapping[str, Any], lines: Sequence[str]) -> str:
        return json.dumps(strict_json(event)) if self._is_json else "\n".join(lines)
