"""``launch/plan.py``: questions about a machine or a job, answered before anything is started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megaplug.commands import cli
from megaplug.errors import UserError
from megaplug.job.compose import compose_job
from megaplug.job.schema import Job
from megaplug.job.suggest import closest

_HELP = """\
Questions that are answered before anything is started.

usage: {program} action=doctor [output=table|json] [key=value ...]

actions:
  doctor               what this machine has, what is wrong and the cure; ends with 1 if it cannot train

flags:
  -h, --help [NAME ..] this page, or what a key of the job means, such as --help data.cache_dir
  --config-dir DIR     a folder of your own, laid beside the shipped one
  --completion SHELL   the completion of bash, zsh or fish, to be read by it
  --version            the versions of megaplug, Megatron-core and torch

A job's keys may follow, such as runs_dir=... and data.cache_dir=..., where the doctor looks for room."""
_OUTPUTS = ("table", "json")


def main(argv: Sequence[str] | None = None) -> int:
    """Answers one question.

    Args:
        argv: The words after the command; the process's own if not given.

    Returns:
        The exit code: 0 for a good answer, 1 for a bad one, 2 if the question was wrong.
    """
    words = sys.argv[1:] if argv is None else argv
    return cli.guarded(lambda: _main(words))


def _main(words: Sequence[str]) -> int:
    own = {"action": tuple(ACTIONS), "output": _OUTPUTS}
    if (code := cli.complete(words, own)) is not None:
        return code
    command = cli.parse(words, cli.program_name("megaplug-plan"))
    if (code := cli.inform(command, lambda: _HELP.format(program=command.program))) is not None:
        return code
    if command.cfg is not None or command.multirun:
        raise UserError("--cfg and --multirun are flags of launch/train.py", hint="see --help")
    typed, rest = split_words(command.overrides)
    action = choose("action", typed.get("action"), own["action"])
    output = choose("output", typed.get("output", "table"), own["output"])
    # Without further words nothing is composed: the doctor answers where Hydra is missing, too.
    job = compose_job(rest, command.source) if rest else Job()
    return ACTIONS[action](job, output)


def split_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words that are this command's own (``action``, ``output``), and those that belong to the job."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, is_pair, value = word.partition("=")
        if is_pair and key in ("action", "output"):
            own[key] = value
        else:
            rest.append(word)
    return own, rest


def choose(key: str, value: str | None, known: Sequence[str]) -> str:
    """One of the known values.

    Raises:
        UserError: None was given, or it is not one of them.
    """
    if value and value in known:
        return value
    listed = "one of: " + " | ".join(f"{key}={name}" for name in known)
    if not value:
        raise UserError(f"no {key} was given", hint=listed)
    meant = closest(value, known)
    raise UserError(
        f"{key}={value} does not exist", hint=f"did you mean {meant}? {listed}" if meant else listed
    )


def _doctor(job: Job, output: str) -> int:
    from megaplug.data.cache import cache_root
    from megaplug.plan.doctor import can_train, examine
    from megaplug.plan.doctor.report import as_json, print_table

    findings = examine(Path(job.runs_dir), cache_root(job.data.cache_dir))
    if output == "json":
        print(as_json(findings))
    else:
        print_table(findings)
    return 0 if can_train(findings) else 1


ACTIONS: dict[str, Callable[[Job, str], int]] = {"doctor": _doctor}
