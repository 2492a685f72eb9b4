"""The ranks of a run, started again from the last checkpoint where they fail and that may help."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megaplug.commands.readiness import first_iteration, make_ready, rank_environment, repair_notes
from megaplug.commands.resolved import Resolved
from megaplug.errors import UserError
from megaplug.job.checks_alerts import WEBHOOK_PREFIX
from megaplug.job.schema import Job
from megaplug.launchers import local
from megaplug.launchers.alerts import Alerts
from megaplug.launchers.crew import Event
from megaplug.launchers.hang import Limits
from megaplug.launchers.nodes import Nodes
from megaplug.launchers.restarts import Restarts
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.supervisor import Patience
from megaplug.launchers.verdict import Outcome
from megaplug.runs import checkpoints
from megaplug.runs.checkpoints import RepairReport
from megaplug.runs.folder import RunFolder
from megaplug.runs.history import append_event
from megaplug.runs.lock import RunLock
from megaplug.runs.state import RunState, write_state


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        outcome: Of the last ranks.
        restarts: What was tried.
        why_no_more: Why a run that has failed was not started again; empty where that was not asked for.
    """

    outcome: Outcome
    restarts: Restarts
    why_no_more: str = ""


def alerts_of(job: Job) -> Alerts:
    """Where a job's events are sent."""
    config = job.alerts
    # Its name was checked with all other keys; what it holds stands nowhere else.
    webhook = None if config.webhook is None else os.environ[config.webhook.removeprefix(WEBHOOK_PREFIX)]
    return Alerts(config.command, webhook, config.events, config.timeout_s)


class Attempts:
    """One command's starts of a run whose lock is held and whose folder is ready.

    Args:
        resolved: The job.
        folder: Its folder.
        command: What each rank executes.
        lock: Inherited by all ranks; held from the first start to the end of the last.
        alerts: Are told of every start but the first, of every failure, and of the end.
        tell: Shows an event.
        nodes: The other machines of the job; None where this one is alone.
    """

    def __init__(
        self,
        resolved: Resolved,
        folder: RunFolder,
        command: Sequence[str],
        lock: RunLock,
        alerts: Alerts,
        tell: Callable[[Event], None],
        nodes: Nodes | None = None,
    ) -> None:
        self._resolved = resolved
        self._folder = folder
        self._command = command
        self._lock = lock
        self._alerts = alerts
        self._tell = tell
        self._nodes = nodes
        self._restarts = Restarts(resolved.job.watch.max_restarts)
        self._shift = 0

    def run(self, iteration: int, signals: StopSignals, report: RepairReport | None = None) -> Course:
        """Start the ranks, again where it may help, until they have ended for good.

        Args:
            iteration: The step of the checkpoint that they begin from.
            signals: What hears them: a signal between two starts ends the run, too.
            report: What was found of the checkpoints; what was damaged is written down.
        """
        if report is not None:
            self._record_damage(report, iteration)
        # What `launch/runs.py action=resume` types again.
        self._record("start", iteration=iteration, command=self._lock.command, cwd=str(Path.cwd()))
        try:
            course = self._course(iteration, signals)
        except UserError as error:
            self._record("end", status="failed", reason=error.message)
            raise
        self._record("end", **_said(course.outcome))
        return course

    def _course(self, iteration: int, signals: StopSignals) -> Course:
        while True:
            outcome = self._attempt(iteration, signals)
            if outcome.status != "failed":
                return Course(outcome, self._restarts)
            self._record("stall" if outcome.kind == "hang" else "failure", **_said(outcome))
            why_not = self._restarts.why_not(outcome, iteration)
            if why_not:
                return Course(outcome, self._restarts, why_not if self._restarts.at_most else "")
            began_at = iteration
            try:
                with signals.waiting():
                    report = checkpoints.repair(self._folder.checkpoints)
                    make_ready(self._resolved, self._folder, report)
            except UserError as error:
                return Course(outcome, self._restarts, f"its folder cannot be made ready: {error.message}")
            iteration = first_iteration(self._resolved, report)
            for note in repair_notes(report, self._resolved.source):
                self._tell({"event": "note", "text": note})
            self._record_damage(report, iteration)
            stop_at = self._resolved.job.train.stop_at
            if stop_at is not None and iteration >= stop_at:
                return Course(outcome, self._restarts, "train.stop_at is reached, and saved")
            if (number := signals.pending()) is not None:
                return Course(self._stopped(outcome, int(number), number.name), self._restarts)
            restart = self._restarts.take(outcome, began_at, iteration)
            if restart is None:
                return Course(outcome, self._restarts, self._restarts.enough)
            # Megatron asks for another device, to find out which of two is right.
            self._shift += outcome.kind == "unexplained"
            counted = {"at_most": self._restarts.at_most, "in_a_row": self._restarts.in_a_row}
            event = {**dataclasses.asdict(restart), **counted}
            self._tell({"event": "restart", **event})
            self._record("restart", **event)

    def _attempt(self, iteration: int, signals: StopSignals) -> Outcome:
        resolved, job = self._resolved, self._resolved.job
        if self._nodes is not None and (why := self._nodes.complete(signals, self._tell)):
            return self._without_nodes(why, iteration, signals)
        limits = {item.name: getattr(job.watch, item.name) for item in dataclasses.fields(Limits)}
        return local.run(
            self._command,
            self._folder,
            resolved.topology.world_size,
            lock_fd=self._lock.fd,
            env=rank_environment(job, self._folder),
            grace_s=job.launch.grace_s,
            address=job.launch.master_addr or "127.0.0.1",
            port=job.launch.master_port,
            omp_num_threads=job.launch.omp_num_threads,
            iters=resolved.derived.iters,
            iteration=iteration,
            on_event=self._tell,
            patience=Patience(limits=Limits(**limits)),
            restart_reasons=self._restarts.reasons,
            shift=self._shift,
            signals=signals,
            nodes=self._nodes,
        )

    def _without_nodes(self, why: str, iteration: int, signals: StopSignals) -> Outcome:
        """The outcome of ranks that were not started, since not all nodes have joined."""
        if (number := signals.pending()) is not None:
            reason = f"stopped by {number.name} before all nodes had joined"
            outcome = Outcome("stopped", iteration, iteration, reason, None, 128 + number, signal=number.name)
        else:
            hint = "the same command starts each of them, with its own launch.node_rank"
            outcome = Outcome("failed", iteration, iteration, why, None, 1, hint=hint, kind="missing")
        return self._written(outcome)

    def _stopped(self, outcome: Outcome, number: int, name: str) -> Outcome:
        """The outcome of a run that a signal ends between two starts."""
        reason = f"stopped by {name} before it was started again"
        saved = outcome.saved_iteration
        return self._written(
            Outcome("stopped", outcome.iteration, saved, reason, exit_code=128 + number, signal=name)
        )

    def _written(self, outcome: Outcome) -> Outcome:
        """The same outcome, which no supervisor has written down: no rank was there."""
        write_state(
            self._folder.state_file,
            RunState(
                outcome.status,
                outcome.iteration,
                outcome.saved_iteration,
                self._resolved.derived.iters,
                reason=outcome.reason,
                num_restarts=len(self._restarts.done),
                restart_reasons=self._restarts.reasons,
                signal=outcome.signal,
            ),
        )
        return outcome

    def _record_damage(self, report: RepairReport, iteration: int) -> None:
        if not report.set_aside:
            return
        found = [
            {"iteration": one.iteration, "path": str(one.path), "fault": one.faults[0]}
            for one in report.set_aside
        ]
        gone = [str(path) for path in report.forgotten]
        self._record("damage", from_iteration=iteration, set_aside=found, deleted=gone)

    def _record(self, event_kind: str, **values: Any) -> None:
        """Write an event down and have it sent; a disk that refuses is told and changes nothing."""
        event = {
            "event": event_kind,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": self._folder.name,
            "folder": str(self._folder.path.resolve()),
            "iters": self._resolved.derived.iters,
            "num_restarts": len(self._restarts.done),
            **values,
        }
        try:
            append_event(self._folder.events_file, event)
        except UserError as error:
            self._tell({"event": "note", "text": str(error)})
        self._alerts.send({**event, "text": _sentence(event)})
        for fault in self._alerts.faults():
            self._tell({"event": "note", "text": fault})


def _said(outcome: Outcome) -> dict[str, Any]:
    keys = ("status", "reason", "kind", "rank", "iteration", "saved_iteration", "hint")
    return {key: getattr(outcome, key) for key in keys}


def _sentence(event: dict[str, Any]) -> str:
    """An event for a person who reads it in a chat."""
    what = {
        "damage": "has damaged checkpoints",
        "start": "starts",
        "failure": "has failed",
        "stall": "stands still",
        "restart": f"is started again from step {event.get('from_iteration', 0):,}",
        "end": f"has ended: {event.get('status', '')}",
    }[event["event"]]
    at = f" at step {event['iteration']:,} of {event['iters']:,}" if event.get("iteration") else ""
    reason = f": {event['reason']}" if event.get("reason") else ""
    return f"{event['run']} {what}{at if event['event'] != 'restart' else ''}{reason}"
