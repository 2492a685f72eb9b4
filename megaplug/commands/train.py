"""``launch/train.py``: compose, check, freeze, start; the same command again continues."""

from __future__ import annotations

from collections.abc import Sequence

from megaplug.commands import cli
from megaplug.errors import UserError
from megaplug.job.compose import compose_config, compose_job
from megaplug.job.schema import Job

_PURPOSE = "Train a model with Megatron-core, from a laptop's cores to many GPUs."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: finished, stopped where it was told to, or there was nothing to do; 1: a run failed; 2: a mistake was
    found before anything was started; 128 + N: signal N stopped the run; the summary says
    whether it could save.
    """
    return cli.run(_main, argv)


def _main(words: Sequence[str]) -> int:
    if (code := cli.complete(words)) is not None:
        return code
    command = cli.parse(words, cli.program_name("megaplug-train"), flags=f"--job FILE, {cli.FLAGS}")
    if (code := cli.inform(command, lambda: _front_page(command))) is not None:
        return code
    if command.job_file is not None and (command.cfg is not None or command.multirun):
        raise UserError(
            "--job starts one job that is composed already", hint="leave out --cfg and --multirun"
        )
    if command.cfg is not None:
        return _print_config(command)
    if command.multirun:
        from megaplug.commands.sweep import sweep

        return sweep(command)
    if command.job_file is not None:
        from megaplug.commands.frozen import start_frozen

        return start_frozen(command)
    job = compose_job(command.overrides, command.source)
    if job.sweep.kind != "grid":
        raise UserError(f"sweep={job.sweep.kind} is for many runs", hint="--multirun makes them")
    return _run(_with_topology(job, command.overrides), command)


def _front_page(command: cli.CommandLine) -> str:
    from megaplug.commands.help import front_page

    return front_page(command, _PURPOSE)


def _print_config(command: cli.CommandLine) -> int:
    from omegaconf import OmegaConf

    from megaplug.job.typed import to_job

    config = compose_config(command.overrides, command.source)
    to_job(config)
    return cli.show(OmegaConf.to_yaml(config, resolve=command.resolve).rstrip())


def _with_topology(job: Job, words: Sequence[str]) -> Job:
    """The job with its topology chosen where that is asked for (``topology=auto``)."""
    if not job.topology.auto:
        return job
    from megaplug.commands.searched import choose

    return choose(job, words)


def _run(job: Job, command: cli.CommandLine) -> int:
    if job.launch.kind == "print":
        from megaplug.commands.run import show

        return show(job, command)
    if job.launch.kind == "slurm":
        from megaplug.commands.submit import submit

        return submit(job, command)
    if job.launch.kind == "freeze":
        from megaplug.commands.run import freeze

        return freeze(job, command)
    if job.launch.kind == "nodes":
        from megaplug.commands.node import on_this_node, serve

        job = on_this_node(job)
        if job.launch.node_rank:
            return serve(job)
    from megaplug.commands.run import start

    return start(job, command).exit_code
