"""``--job runs/<name>-<hash>/job.yaml``: start what was frozen, however ``conf/`` has changed since."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megaplug.commands.cli import CommandLine
from megaplug.commands.node import on_this_node, serve
from megaplug.commands.run import start
from megaplug.errors import UserError
from megaplug.job.compose import ConfigSource, compose_job
from megaplug.job.freeze import FrozenJob, read_frozen
from megaplug.job.schema import LaunchConfig
from megaplug.runs.submitted import read_submitted


def start_frozen(command: CommandLine) -> int:
    """Start a frozen job here, or its share of a job on several nodes.

    Raises:
        UserError: It cannot be read, or the words would change more than where it runs.
    """
    assert command.job_file is not None
    if not command.job_file.is_file():
        message = f"--job: there is no file {command.job_file}"
        raise UserError(message, hint="launch=freeze and launch=slurm write one into the run's folder")
    frozen = read_frozen(command.job_file)
    strange = [word for word in command.overrides if not word.startswith(("launch=", "launch."))]
    if strange:
        message = f"{strange[0].partition('=')[0]} is frozen in {command.job_file}"
        raise UserError(message, hint="only launch=... and launch.*=... can be said beside --job")
    job = on_this_node(dataclasses.replace(frozen.job, launch=_launch(command, frozen), resume=True))
    if job.launch.kind == "nodes" and job.launch.node_rank:
        return serve(job)
    if job.launch.kind not in ("local", "nodes"):
        raise UserError(f"launch={job.launch.kind} composes its job", hint="leave out --job")
    return start(job, _as_typed(command, frozen), frozen).exit_code


def _launch(command: CommandLine, frozen: FrozenJob) -> LaunchConfig:
    """As it was frozen, but for what is typed; which nodes there are is for whoever starts it to say."""
    typed = compose_job(command.overrides, command.source).launch
    keys = [word.partition("=")[0].removeprefix("launch.") for word in command.overrides]
    values = {key: getattr(typed, key) for key in keys if key != "launch"}
    nobody = {"nnodes": None, "node_rank": None}
    return dataclasses.replace(frozen.job.launch, **nobody | {"kind": typed.kind} | values)


def _as_typed(command: CommandLine, frozen: FrozenJob) -> CommandLine:
    """What a person has typed to submit it, which is what they type to go on; this command where none has."""
    submitted = read_submitted(frozen.folder)
    if submitted is None:
        return command
    extra = None if submitted.config_dir is None else Path(submitted.config_dir)
    return dataclasses.replace(
        command,
        overrides=list(submitted.overrides),
        source=ConfigSource(submitted.config_name, extra),
        program=submitted.program,
        job_file=None,
    )
