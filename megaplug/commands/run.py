"""A resolved job's way from its folder to its summary."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from megaplug.commands import cli
from megaplug.commands.attempts import Attempts, Course, alerts_of
from megaplug.commands.cli import CommandLine
from megaplug.commands.failure import changed_command, failure_details
from megaplug.commands.next_command import next_command, past_early_stop
from megaplug.commands.notes import job_notes
from megaplug.commands.planned import plan_rows
from megaplug.commands.preview import preview_json, preview_text
from megaplug.commands.readiness import first_iteration, make_ready, open_folder, repair_notes
from megaplug.commands.reading import reading
from megaplug.commands.requeue import queue_again
from megaplug.commands.resolved import Resolved, problems_here, ranks_here, resolve
from megaplug.errors import UserError
from megaplug.job.attention import attention_layers
from megaplug.job.freeze import FrozenJob
from megaplug.job.overlap import overlap_line
from megaplug.job.packages import packages_line
from megaplug.job.schema import Job
from megaplug.job.sharding import described
from megaplug.job.translate import megatron_arguments
from megaplug.job.upcycling import UPCYCLE
from megaplug.launchers.crew import Event
from megaplug.launchers.nodes import Nodes
from megaplug.launchers.progress import Progress, make_progress
from megaplug.launchers.screen import Header, Summary, count
from megaplug.launchers.stops import StopSignals
from megaplug.launchers.verdict import AT_ONCE
from megaplug.plan.cluster import AUTO
from megaplug.runs import checkpoints
from megaplug.runs.early_stop import has_stopped
from megaplug.runs.folder import RunFolder, find_latest
from megaplug.runs.lock import RunLock
from megaplug.runs.metrics import read_metrics
from megaplug.runs.state import RunState, read_state


def show(job: Job, command: CommandLine) -> int:
    """``launch=print``: show the job and start nothing.

    Where no cluster is named, the job is this machine's, and what it lacks is warned of.
    """
    resolved = resolve(job, on_this_machine=False)
    folder = _latest(resolved) or RunFolder(Path(job.runs_dir) / f"{job.name}-{resolved.digest}")
    arguments = megatron_arguments(
        resolved.job, resolved.topology, resolved.derived, resolved.facts, folder, source=resolved.source
    )
    here = problems_here(resolved) if job.cluster.name == AUTO else []
    if job.launch.output == "json":
        return cli.show(preview_json(resolved, str(folder.path), arguments, here))
    warned = [
        ("WARNING", f"not on this machine: {found.message}; cluster=h100 plans for others") for found in here
    ]
    header = Header([*_header(resolved, words=command.overrides).rows, *warned])
    return cli.show(preview_text(resolved, str(folder.path), arguments, header.lines()))


def freeze(job: Job, command: CommandLine) -> int:
    """``launch=freeze``: write the run's folder, on a machine that need not be the one that runs it."""
    resolved = resolve(job, on_this_machine=False)
    folder = open_folder(resolved)
    with RunLock.acquire(folder, command.typed()):
        report = checkpoints.repair(folder.checkpoints)
        for note in repair_notes(report, resolved.source):
            print(note, file=sys.stderr)
        make_ready(resolved, folder, report)
    files = {"folder": str(folder.path), "job": str(folder.job_file), "command": str(folder.command_file)}
    if job.launch.output == "json":
        return cli.show(json.dumps({"event": "frozen", **files}))
    return cli.show(f"{folder.job_file}\n{folder.command_file}")


@dataclass(frozen=True)
class End:
    """How a run has ended that was started here.

    Attributes:
        exit_code: See ``megaplug.commands.train.main``.
        heard: The first signal that came while it was watched, also where it came too late to stop it.
    """

    exit_code: int
    heard: Signals | None = None


def start(job: Job, command: CommandLine, frozen: FrozenJob | None = None) -> End:
    """``launch=local``, and node 0 of ``launch=nodes``: start the run, or continue it, and wait for its end.

    Args:
        job: As composed.
        command: What was typed.
        frozen: What the job was made of, where it is one that was frozen before; it goes on in its folder.
    """
    has_own = frozen is not None and bool(checkpoints.list_checkpoints(frozen.folder.checkpoints))
    resolved = _resolved(job, frozen, goes_on=has_own)
    folder = open_folder(resolved) if frozen is None else frozen.folder
    with RunLock.acquire(folder, command.typed()) as lock, _nodes(resolved, folder) as nodes:
        with reading(job.logging.progress != "none" and job.launch.output == "text") as seen:
            report = checkpoints.repair(folder.checkpoints, seen.tell)
        if has_own and report.newest is None:
            resolved = _resolved(job, frozen, goes_on=False)
        iteration = first_iteration(resolved, report)
        notes = repair_notes(report, resolved.source)
        if job.profile.kind == "nsys" and "NSYS_PROFILING_SESSION_ID" not in os.environ:
            notes.append(f"nsys is not watching; it does with: {_nsys_line(folder, command)}")
        if nothing_to_do(resolved, folder, iteration, command):
            print("\n".join(notes), file=sys.stderr, end="\n" if notes else "")
            if nodes is not None:
                with StopSignals() as signals:
                    nodes.complete(signals, lambda event: print(event["text"], file=sys.stderr), is_over=True)
                nodes.dismiss(0, "node 0 says that there is nothing to do")
            return End(0)
        make_ready(resolved, folder, report)
        end = min(resolved.derived.iters, resolved.job.train.stop_at or resolved.derived.iters)
        shown = make_progress(job.logging.progress, job.launch.output, end, iteration)
        with shown as progress, StopSignals() as signals:
            cli.tell(progress.header, _header(resolved, folder, iteration, command.overrides))

            def tell(event: Event) -> None:
                cli.tell(progress.event, event)

            for note in notes:
                tell({"event": "note", "text": note})
            with alerts_of(job) as alerts:
                ranks = [sys.executable, "-m", "megaplug.runtime", str(folder.job_file.resolve())]
                attempts = Attempts(resolved, folder, ranks, lock, alerts, tell, nodes)
                course = attempts.run(iteration, signals, report)
                if said := queue_again(course.outcome, folder, iteration):
                    tell({"event": "note", "text": said})
                if nodes is not None:
                    reason = course.outcome.reason or "all steps are done"
                    nodes.dismiss(course.outcome.exit_code, f"{course.outcome.status}: {reason}")
                # Whoever has pressed Ctrl-C twice waits for nothing.
                for fault in alerts.finish(signals.reader) if course.outcome.kind != AT_ONCE else []:
                    tell({"event": "note", "text": fault})
            with signals.waiting():
                cli.tell(progress.summary, _summary(resolved, folder, course, progress, command))
    return End(course.outcome.exit_code, signals.heard)


def _resolved(job: Job, frozen: FrozenJob | None, *, goes_on: bool) -> Resolved:
    """The job with all that is known of it.

    Args:
        job: As composed.
        frozen: What it was made of, where it was frozen before.
        goes_on: Whether that has checkpoints of its own to go on from.

    Raises:
        UserError: It is not the run any more that was frozen.
    """
    resolved = resolve(job, frozen=frozen if goes_on else None)
    if frozen is not None and resolved.digest != frozen.digest:
        raise UserError(
            f"{frozen.folder.job_file} would be another run now ({resolved.digest}): its data has changed",
            hint="type the command again that has frozen it",
        )
    return resolved


def _nodes(resolved: Resolved, folder: RunFolder) -> AbstractContextManager[Nodes | None]:
    """The other machines of the job, which may join from now on; None where this one is alone."""
    launch = resolved.job.launch
    if launch.nnodes in (None, 1):
        return nullcontext()
    assert launch.nnodes is not None and launch.master_addr is not None, "these are checked"
    per_node = ranks_here(resolved.job, resolved.topology)
    return Nodes(folder, launch.nnodes, per_node, launch.master_addr, launch.master_port, launch.join_s)


def _nsys_line(folder: RunFolder, command: CommandLine) -> str:
    """The command under NVIDIA Nsight Systems, which records from the first marked step to the last."""
    capture = "--capture-range=cudaProfilerApi --capture-range-end=stop"
    output = shlex.quote(str(folder.profile / "nsys"))
    return f"nsys profile -s none -t nvtx,cuda -o {output} {capture} {command.typed()}"


def _latest(resolved: Resolved) -> RunFolder | None:
    return find_latest(Path(resolved.job.runs_dir), resolved.job.name, resolved.digest)


def nothing_to_do(resolved: Resolved, folder: RunFolder, iteration: int, command: CommandLine) -> bool:
    """Say so where the run is finished, or already where it was told to stop."""
    state = read_state(folder.state_file)
    train, stop_at = resolved.job.train, resolved.job.train.stop_at
    lines = read_metrics(folder.metrics_file) if train.early_stop_patience is not None else []
    early = has_stopped(lines, iteration, train.early_stop_patience, train.early_stop_min_delta)
    if early is not None and 0 < iteration < resolved.derived.iters:
        at = f"step {iteration:,} of {resolved.derived.iters:,}"
        said = f"{folder.path} has finished at {at}: {early.reason(train.early_stop_min_delta)}"
        goes_on = past_early_stop(command)
        _say(resolved.job, RunState("finished", iteration, iteration, resolved.derived.iters), said, goes_on)
        return True
    if state is not None and state.status == "finished" and iteration >= resolved.derived.iters:
        said = f"{folder.path} is finished: {state.iteration:,} of {state.iters:,} steps"
        _say(resolved.job, state, said, f"{command.typed('resume=false')}   # starts over in a new folder")
        return True
    if stop_at is not None and iteration >= stop_at and stop_at < resolved.derived.iters:
        said = f"{folder.path} is already at step {iteration:,}, and train.stop_at is {stop_at:,}"
        goes_on = f"{command.typed('-train.stop_at')}   # goes on to step {resolved.derived.iters:,}"
        _say(resolved.job, state or RunState("stopped", iteration), said, goes_on)
        return True
    return False


def _say(job: Job, state: RunState, said: str, next_command: str) -> None:
    """Why nothing is started, as text or as the summary's JSON."""
    if job.launch.output == "json":
        summary = Summary(state.status, state.iteration, state.iters, said, next_command=next_command)
        print(json.dumps(summary.as_json()))
    else:
        print(f"{said}\n  next  {next_command}")


def _header(
    resolved: Resolved, folder: RunFolder | None = None, iteration: int = 0, words: Sequence[str] = ()
) -> Header:
    job, topology, derived, facts = resolved.job, resolved.topology, resolved.derived, resolved.facts
    ranks = "1 rank" if topology.world_size == 1 else f"{topology.world_size} ranks, {topology.label}"
    if job.topology.zero != 1:
        ranks += f", {described(job)}"
    precision = job.precision
    number_format = f"{precision.dtype} with FP8" if precision.fp8_format else precision.dtype
    attention = attention_layers(job.attention).described(job.model.num_layers)
    layers = f"{derived.backend} layers, {attention}"
    length = f"{count(derived.tokens)} in all, {count(derived.epochs)} epochs"
    rows = [
        ("model", f"{job.model.name}, {count(resolved.parameters)} parameters ({resolved.parameters:,})"),
        ("topology", ranks),
        ("device", f"{derived.device}, {layers}, {number_format}"),
        ("kernels", packages_line(job.kernels.apex, job.kernels.te, derived.device, derived.backend)),
        *plan_rows(resolved),
        ("data", f"{facts.source}: {count(facts.num_tokens['train'])} training tokens"),
        ("training", f"{derived.iters:,} steps of {count(derived.tokens_per_iter)} tokens, {length}"),
    ]
    if resolved.source is not None:
        taken = {"weights": "the weights", "all": "the whole state", UPCYCLE: "the weights, MLPs as experts,"}
        rows.append(("starts from", f"{taken[job.load_state]} of {resolved.source.checkpoint.path}"))
        rows += [("passed over", why) for why in resolved.source.passed_over]
    if overlap := overlap_line(derived.overlap):
        rows.append(("overlap", overlap))
    if notes := job_notes(job, words):
        rows.append(("note", "; ".join(notes)))
    if folder is not None:
        rows.append(("folder", str(folder.path)))
    if iteration:
        rows.append(("resumes", f"from step {iteration:,}"))
    return Header(rows)


def _pictures(folder: RunFolder, unigram: float | None, progress: Progress) -> list[tuple[str, str]]:
    """Draw what has been recorded; what was drawn, with its path."""
    from megaplug.runs.curve import draw_loss_curve
    from megaplug.runs.expert_map import draw_expert_map

    line = None if unigram is None else ("unigram model", unigram)
    files = []
    try:
        if draw_loss_curve(folder.metrics_file, folder.loss_curve, folder.name, line):
            files.append(("loss curve", str(folder.loss_curve)))
        if draw_expert_map(folder.metrics_file, folder.expert_map, folder.name):
            files.append(("experts", str(folder.expert_map)))
    except UserError as error:  # a full disk, as a rule; what has become of the run counts more
        progress.note(f"no pictures: {error}")
    return files


def _summary(
    resolved: Resolved, folder: RunFolder, course: Course, progress: Progress, command: CommandLine
) -> Summary:
    outcome, restarts = course.outcome, course.restarts
    comes_again = restarts.comes_again
    changed = changed_command(resolved, folder, outcome, command)
    way_on = "" if comes_again else changed  # otherwise it is what comes next
    unigram = resolved.facts.unigram_loss
    files = [("folder", str(folder.path)), ("logs", str(folder.logs))]
    if outcome.kind != AT_ONCE:
        files += _pictures(folder, unigram, progress)
    if resolved.job.logging.tensorboard:
        files.append(("TensorBoard", f"tensorboard --logdir {folder.tensorboard}"))
    return Summary(
        status=outcome.status,
        iteration=outcome.iteration,
        iters=resolved.derived.iters,
        reason=outcome.reason,
        loss=progress.track.loss,
        valid_loss=progress.track.valid_loss,
        valid_losses=progress.track.valid_losses,
        unigram_loss=unigram,
        tokens_per_second=progress.track.mean_tokens_per_second,
        files=files,
        next_command=next_command(
            outcome, folder, command, resolved.derived.iters, comes_again=comes_again, changed=changed
        ),
        rank=outcome.rank,
        log_tail=outcome.log_tail,
        hint="" if outcome.kind == "memory" else outcome.hint,
        details=[*_restart_rows(course), *failure_details(resolved, folder, outcome, way_on)],
        num_restarts=len(restarts.done),
        restart_reasons=restarts.reasons,
    )


def _restart_rows(course: Course) -> list[tuple[str, str]]:
    """How often it was started again, and why not once more."""
    rows = [
        (f"restart {restart.number}", f"from step {restart.from_iteration:,}: {restart.reason}")
        for restart in course.restarts.done
    ]
    return [*rows, ("not again", course.why_no_more)] if course.why_no_more else rows
