"""``sweep=optuna``: each point is proposed by what has come of those before, checked, and run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from megaplug.commands import cli
from megaplug.commands.proposals import Tried, need_optuna, propose
from megaplug.commands.sweep import Sweep, too_costly
from megaplug.commands.sweep_points import Point, Points, add_point
from megaplug.commands.sweep_report import explained_point, listed
from megaplug.errors import UserError
from megaplug.job.checks_values import value_problems
from megaplug.job.compose import CONFIG_NAME, compose_job
from megaplug.job.identity import digest
from megaplug.job.sweep_space import Space, section_of
from megaplug.runs.atomic import strict_json
from megaplug.runs.figures import figures_of

# What of the words decides no result, so that the sweep goes on with others of them.
_NO_RESULT = ("launch", "slurm", "sweep", "watch", "alerts", "logging", "resume", "runs_dir")
_OF_METRIC = {"valid_loss": "validation loss", "loss": "training loss"}
# So many of the best are told at the end.
_BEST = 5


class Study(Sweep):
    """The points of one command, one after the other or a few at a time.

    Args:
        space: What is chosen.
        command: What was typed.

    Raises:
        UserError: Optuna is not installed, nothing is left open, or runs could not be waited for.
    """

    def __init__(self, space: Space, command: cli.CommandLine) -> None:
        need_optuna()
        job = compose_job(space.first(), command.source)
        own = [each for each in value_problems(job) if each.key.startswith(("sweep.", "launch."))]
        if own:
            raise UserError.from_problems(own)
        if not space.dimensions:
            hint = "name values, lr.lr=1e-3,2e-3, or an interval, 'lr.lr=tag(log,interval(1e-4,1e-2))'"
            raise UserError("sweep=optuna: no key is left open", hint=hint)
        if job.launch.kind not in ("local", "print"):
            message = f"what is tried next depends on results, and launch={job.launch.kind} waits for none"
            raise UserError(f"sweep=optuna: {message}", hint="launch=local, or sweep=grid")
        if job.sweep.metric == "valid_loss" and not job.train.eval_iters:
            message = "sweep.metric: there is no validation loss to go by, since train.eval_iters is 0"
            raise UserError(message, hint="sweep.metric=loss goes by that of training")
        self._space = space
        self._config = job.sweep
        self._launch = job.launch
        fixed = [word for word in space.fixed if section_of(word) != "sweep"]
        what: dict[str, Any] = {
            "space": [each.as_json() for each in space.dimensions],
            "words": sorted(word for word in fixed if section_of(word) not in _NO_RESULT),
            "how": [self._config.metric, self._config.startup_trials, self._config.seed],
        }
        source = command.source
        if source.name != CONFIG_NAME or source.extra_dir is not None:
            extra = None if source.extra_dir is None else str(source.extra_dir.resolve())
            what["source"] = [source.name, extra]
        name = digest(what)
        if compose_job(replace(space, fixed=tuple(fixed)).first(), source).sweep.kind != "grid":
            # A configuration of the user's own chooses it for each point, too, which is one run.
            fixed.append("sweep.kind=grid")
        self._fixed = tuple(fixed)
        super().__init__(Points((), Path(job.runs_dir) / "sweeps" / name), command, job.launch)
        self._resumes = job.resume
        self._before: list[dict[str, str]] = []
        self._chosen: list[dict[str, str]] = []
        self._values: dict[int, float | None] = {}
        self._spent = 0.0

    def run(self) -> int:
        """Try all points that are left to be tried; the exit code.

        Raises:
            UserError: They cost too much, or a run has no result to go by.
        """
        if self._launch.kind == "print":
            self._before = self._earlier()
            return self._show()
        with self._alone_in_folder():
            self._before = self._earlier()
            return self._go_on()

    def _go_on(self) -> int:
        self._say({"event": "sweep", **self._report()}, [self._beginning()])
        while len(self._points.all) < self._config.trials and self._ended_by is None:
            left = self._next(self._launch.at_once or 1)
            try:
                self._pay(left)
            except UserError:
                if self._codes:
                    self._end()
                raise
            self._go_through(left)
            for point in left:
                self._tell_value(point)
        return self._end()

    def _next(self, number: int) -> list[Point]:
        """Propose and check up to so many points; those that are to be run."""
        first = len(self._points.all)
        for _ in range(min(number, self._config.trials - first)):
            done = len(self._chosen)
            new = done >= len(self._before)
            chosen = propose(self._space, self._tried(), self._config) if new else self._before[done]
            own = self._space.words(chosen)
            self._points = add_point(self._points, (*self._fixed, *own), own, self._command.source)
            self._chosen.append(chosen)
            if why := explained_point(self._points.all[-1], self._points):
                self._tell({"event": "passed_over", "number": done + 1, "why": why}, why)
        if self._launch.kind != "print":
            self._write(self._report())
        return [point for point in self._points.left if point.number > first]

    def _tried(self) -> list[Tried]:
        """What is known of every point so far."""
        both = zip(self._chosen, self._points.all, strict=True)
        return [Tried(chosen, self._value(point)) for chosen, point in both]

    def _run_of(self, point: Point) -> Point:
        """Itself, or the one that it repeats."""
        return point if point.repeats is None else self._points.all[point.repeats - 1]

    def _value(self, point: Point) -> float | None:
        """What has come of a point's run; None where it has not come to its end, or to no number."""
        point = self._run_of(point)
        if point.problems or not (point.is_done or self._codes.get(point.number) == 0):
            return None
        if point.number not in self._values:
            figures = figures_of(point.folder.metrics_file)
            value = figures.valid_loss if self._config.metric == "valid_loss" else figures.loss
            if value is None:
                raise UserError(
                    f"sweep.metric: {point.folder.path} has no {_OF_METRIC[self._config.metric]}",
                    hint="train.eval_interval says when it validates; sweep.metric=loss goes by training",
                    exit_code=1,
                )
            self._values[point.number] = value if math.isfinite(value) else None
        return self._values[point.number]

    def _pay(self, left: Sequence[Point]) -> None:
        """Be sure that the runs, and as many of their kind as are to come, cost no more than they may.

        Raises:
            UserError: They do.
        """
        prices = [point.gpu_hours for point in left if point.gpu_hours is not None]
        limit = self._launch.max_gpu_hours
        to_come = self._config.trials - len(self._points.all)
        if prices and limit is not None:
            expected = self._spent + sum(prices) + to_come * sum(prices) / len(prices)
            if expected > limit:
                raise too_costly(len(left) + to_come, expected, self._launch)
        self._spent += sum(prices)

    def _show(self) -> int:
        """``launch=print``: what was tried, and what would be next."""
        left = self._next(len(self._before) + 1)
        points = self._points
        if self._is_json:
            cli.show(json.dumps(strict_json(self._report()), indent=2))
            return 2 if len(points.impossible) == len(points.all) else 0
        more = self._config.trials - len(points.all)
        after = [f"then {more} more, each by what has come of those before"] if more > 0 else []
        cli.show("\n".join([*listed(points), *after, "launch=print: nothing was started"]))
        return 0 if left or points.runs else 2

    def _beginning(self) -> str:
        names = ", ".join(each.key for each in self._space.dimensions)
        trials, metric = self._config.trials, _OF_METRIC[self._config.metric]
        tried = f", {min(len(self._before), trials)} of them from before" if self._before else ""
        return f"{trials} points of {names} for the lowest {metric}{tried}: {self._points.folder}"

    def _tell_value(self, point: Point) -> None:
        if self._codes.get(point.number) != 0:
            return
        value, best = self._value(point), self._best
        shown = "no number" if value is None else f"{value:.4f}"
        so_far = "" if best is None else f"; the best so far is point {best}"
        self._tell(
            {"event": "value", "number": point.number, "value": value, "best": best},
            [f"point {point.number}: {_OF_METRIC[self._config.metric]} {shown}{so_far}"],
        )

    def _ranked(self) -> list[tuple[float, Point]]:
        """Results with their points, the best first."""
        found = ((self._value(point), point) for point in self._points.runs)
        return sorted(((value, point) for value, point in found if value is not None), key=itemgetter(0))

    @property
    def _best(self) -> int | None:
        """The number of the best point so far."""
        return next((point.number for _, point in self._ranked()), None)

    @property
    def _num_points(self) -> int:
        return self._config.trials

    @property
    def _is_whole(self) -> bool:
        return super()._is_whole and len(self._points.all) >= self._config.trials

    @property
    def _is_faulty(self) -> bool:
        # That some points are not possible is a part of the search.
        return not self._points.runs

    def _ending(self) -> Sequence[str]:
        metric = _OF_METRIC[self._config.metric]
        ranked = self._ranked()
        lines = []
        for place, (value, point) in enumerate(ranked[:_BEST]):
            best = "" if place else "best"
            own = " ".join(point.own)
            lines.append(f"{best:4}  point {point.number:>3}  {metric} {value:.4f}  {own}")
        if picture := self._picture(ranked):
            lines.append(f"  picture  {picture}")
        if (tried := len(self._points.all)) < self._config.trials:
            lines.append(f"{tried} of {self._config.trials} points were tried")
        return [*lines, *super()._ending()]

    def _picture(self, ranked: Sequence[tuple[float, Point]]) -> Path | None:
        """Draw results over what was chosen; None where there is nothing to draw or no room."""
        from megaplug.runs.slices import Axis, draw_slices

        if self._points.folder is None or len(ranked) < 2:
            return None
        axes = [
            Axis(
                each.key,
                [self._chosen[point.number - 1][each.key] for _, point in ranked],
                each.options,
                (each.low, each.high),
                each.is_log,
            )
            for each in self._space.dimensions
        ]
        picture = self._points.folder / "slices.png"
        try:
            self._make_folder()
            draw_slices(axes, [value for value, _ in ranked], picture, _OF_METRIC[self._config.metric])
        except UserError as error:  # a full disk, as a rule; what has become of the runs counts more
            print(f"no picture: {error}", file=sys.stderr)
            return None
        return picture

    def _report(self, running: int | None = None, **more: Any) -> dict[str, Any]:
        study = {
            "trials": self._config.trials,
            "metric": self._config.metric,
            "seed": self._config.seed,
            "space": [each.as_json() for each in self._space.dimensions],
            "chosen": [*self._chosen, *self._before[len(self._chosen) :]],
            "values": [self._value(point) for point in self._points.all],
            "best": self._best,
        }
        return super()._report(running, study=study, **more)

    def _earlier(self) -> list[dict[str, str]]:
        """What an earlier start of the same sweep has proposed.

        Raises:
            UserError: Its file cannot be read.
        """
        assert self._points.folder is not None
        file = self._points.folder / "sweep.json"
        if not (self._resumes and file.is_file()):
            return []
        try:
            found = json.loads(file.read_text())
            chosen = [_texts(each) for each in found["study"]["chosen"]]
            # Each can be told to Optuna again.
            for each in chosen:
                self._space.check(each)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} cannot be read: {error!r}", hint="resume=false begins the sweep anew", exit_code=1
            ) from error
        return chosen


def _texts(chosen: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in chosen.items()}
