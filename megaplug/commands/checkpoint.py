"""``launch/checkpoint.py``: what a run has saved is listed, shown, verified, pruned and copied."""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import megaplug
from megaplug.commands import cli
from megaplug.commands.checkpoint_words import WORDS, Asked
from megaplug.commands.plan_words import choose, split_words
from megaplug.errors import UserError
from megaplug.job.suggest import closest

_HELP = """\
The checkpoints of runs: what there is, what is in it, whether it is whole. Nothing of it is run, and no
torch is imported.

usage: {program} [action=NAME] [run=FOLDER | path=FOLDER] [word=value ...]

actions:
{actions}

words:
{words}

flags:
  -h, --help [NAME ..]  this page, or what an action or a word means, such as --help prune
  --completion SHELL    the completion of bash, zsh or fish, to be read by it
  --version             the versions of megaplug, Megatron-core and torch

Without run= and path=, list and verify take all runs in runs/.
Ends with 0, with 2 for a mistake or a disk that refuses; list, show, verify and copy with 1 if a checkpoint
is damaged, which list and show see by names and sizes, and verify and copy by every byte."""

_FLAGS = "--help, --completion, --version"
# Keys of the documents that a program reads change with this.
FORMAT = 1


@dataclass(frozen=True)
class Action:
    """Something that can be done with checkpoints.

    Attributes:
        module: Has ``answer(asked: Asked) -> Answer``.
        meaning: For ``--help``.
        words: Its own words, beside ``output``.
    """

    module: str
    meaning: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What an action has found or done.

    Attributes:
        report: For a program.
        text: For a person.
        exit_code: 0, or 1 where something is damaged.
    """

    report: dict[str, Any]
    text: str
    exit_code: int = 0


ACTIONS: dict[str, Action] = {
    "list": Action(
        "megaplug.commands.checkpoint_list",
        "step, date, size and validation loss of each, and what the run keeps of them (the default)",
        ("run",),
    ),
    "show": Action(
        "megaplug.commands.checkpoint_show",
        "of one: the model and topology that wrote it, its files, the shapes and formats of its tensors",
        ("run", "path", "iteration", "tensors"),
    ),
    "verify": Action(
        "megaplug.commands.checkpoint_verify",
        "read every file and compare its SHA-256; ends with 1 if one is damaged, and names it",
        ("run", "path", "iteration"),
    ),
    "prune": Action(
        "megaplug.commands.checkpoint_prune",
        "show which would go under keep, keep_every and keep_best; yes=true deletes them",
        ("run", "keep", "keep_every", "keep_best", "yes"),
    ),
    "copy": Action(
        "megaplug.commands.checkpoint_copy",
        "copy one to another folder, verified on the way; broken off, the same command goes on",
        ("run", "path", "iteration", "to"),
    ),
}
"""Every action by its name; ``list`` is the default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Does one thing with checkpoints.

    Args:
        argv: The words after the command; the process's own if not given.

    Returns:
        The exit code: 0, 1 if a checkpoint is damaged, 2 for a mistake or a disk that refuses.
    """
    return cli.run(lambda words: cli.answered(words, _answer, _error), argv)


def _answer(words: Sequence[str]) -> int:
    own = {"action": tuple(ACTIONS)} | {name: word.values for name, word in WORDS.items()}
    if (code := cli.complete(words, own, takes_job=False)) is not None:
        return code
    command = cli.parse(words, cli.program_name("megaplug-checkpoint"), flags=_FLAGS)
    if command.help and command.overrides:
        return cli.show("\n\n".join(_explained(name) for name in command.overrides))
    if (code := cli.inform(command, lambda: help_page(command.program))) is not None:
        return code
    if command.cfg is not None or command.resolve or command.multirun or command.source.extra_dir is not None:
        raise UserError("no job is composed here, and its flags mean nothing", hint=f"flags: {_FLAGS}")
    typed, strange = split_words(command.overrides, ("action", *WORDS))
    if strange:
        raise _misspelt(strange[0])
    name = choose("action", typed.pop("action", "list"), tuple(ACTIONS))
    action = ACTIONS[name]
    for word, value in typed.items():
        if word not in ("output", *action.words):
            takers = " and ".join(f"action={one}" for one, other in ACTIONS.items() if word in other.words)
            raise UserError(f"{word}=... means nothing to action={name}", hint=f"it belongs to {takers}")
        if not value:
            raise UserError(f"{word}= has no value", hint=f"{WORDS[word].form}: {WORDS[word].meaning}")
        if WORDS[word].values and word in ("output", "tensors", "yes"):
            choose(word, value, WORDS[word].values)
    found = cast(Callable[[Asked], Answer], importlib.import_module(action.module).answer)(
        Asked(typed, command)
    )
    head = {"megaplug": megaplug.__version__, "format": FORMAT, "action": name}
    cli.show(json.dumps({**head, **found.report}, indent=2) if typed.get("output") == "json" else found.text)
    return found.exit_code


def _misspelt(word: str) -> UserError:
    key, is_pair, _ = word.partition("=")
    if word in ACTIONS:
        return UserError(f"{word!r} is no key=value", hint=f"did you mean action={word}?")
    meant = closest(key, ("action", *WORDS))
    if not is_pair and meant is None:
        return UserError(f"{word!r} is no key=value", hint=f"a run's folder is named by run={word}")
    hint = f"did you mean {meant}?" if meant else f"words: {', '.join(['action', *WORDS])}"
    return UserError(f"{key}: there is no such word", hint=hint)


def _error(error: UserError) -> dict[str, Any]:
    problems = [{"message": problem.message, "hint": problem.hint} for problem in error.problems]
    return {
        "megaplug": megaplug.__version__,
        "format": FORMAT,
        "problems": problems,
        "exit_code": error.exit_code,
    }


def help_page(program: str) -> str:
    """What ``--help`` alone shows."""
    return _HELP.format(
        program=program,
        actions=_table([(name, action.meaning) for name, action in ACTIONS.items()]),
        words=_table([(word.form, word.meaning) for word in WORDS.values()]),
    )


def _explained(name: str) -> str:
    """What an action or a word means."""
    word = name.split("=")[-1] if name.startswith("action=") else name.partition("=")[0]
    if word in ACTIONS:
        own = [(WORDS[one].form, WORDS[one].meaning) for one in ("output", *ACTIONS[word].words)]
        return f"action={word}: {ACTIONS[word].meaning}\n{_table(own)}"
    if word == "action":
        return "action=NAME\n" + _table([(one, action.meaning) for one, action in ACTIONS.items()])
    if word in WORDS:
        takers = ", ".join(f"action={one}" for one, action in ACTIONS.items() if word in action.words)
        return f"{WORDS[word].form}\n  {WORDS[word].meaning}{f' ({takers})' if takers else ''}"
    meant = closest(word, (*ACTIONS, *WORDS))
    hint = f"did you mean {meant}?" if meant else f"there are {', '.join([*ACTIONS, *WORDS])}"
    raise UserError(f"there is no action or word {name!r}", hint=hint)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines: list[str] = []
    for left, right in rows:
        first, *more = textwrap.wrap(right, 110 - 24, break_on_hyphens=False)
        lines += [f"  {left:<22}{first}", *(" " * 24 + line for line in more)]
    return "\n".join(lines)
