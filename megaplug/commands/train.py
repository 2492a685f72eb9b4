"""``launch/train.py``: compose, check, freeze, start; the same command again continues."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megaplug.commands import cli
from megaplug.errors import UserError
from megaplug.job.compose import compose_config, compose_job, sweep_points
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
    command = cli.parse(words, cli.program_name("megaplug-train"))
    if (code := cli.inform(command, lambda: _front_page(command))) is not None:
        return code
    if command.cfg is not None:
        return _print_config(command)
    if command.multirun:
        return _sweep(command)
    job = _with_topology(compose_job(command.overrides, command.source), command.overrides)
    return _run(job, command)


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
    if job.launch.kind == "freeze":
        from megaplug.commands.run import freeze

        return freeze(job, command)
    from megaplug.commands.run import start

    return start(job, command)


def _sweep(command: cli.CommandLine) -> int:
    """Check every point first, list those that cannot be, run the others one after the other."""
    import dataclasses

    from megaplug.commands.resolved import check_job

    points = sweep_points(command.overrides, command.source)
    legal: list[tuple[list[str], Job]] = []
    for point in points:
        try:
            job = _with_topology(compose_job(point, command.source), point)
            problems = check_job(job)
        except UserError as error:
            print(f"not possible: {' '.join(point)}\n  {error}", file=sys.stderr)
            continue
        if problems:
            print(f"not possible: {' '.join(point)}", file=sys.stderr)
            print("\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
        else:
            legal.append((point, job))
    print(f"{len(legal)} of {len(points)} points can be run", flush=True)
    codes = []
    for number, (point, job) in enumerate(legal, start=1):
        print(f"point {number} of {len(legal)}: {' '.join(point)}", flush=True)
        one = dataclasses.replace(command, overrides=point, multirun=False)
        codes.append(cli.guarded(lambda job=job, one=one: _run(job, one)))  # type: ignore[misc]
        if codes[-1] > 128:
            break
    return max(codes, default=0) or (2 if len(legal) < len(points) else 0)
