"""Commands that do one of several things with what lies on the disk: ``action=NAME word=value ...``.

They compose no job and import neither torch nor Hydra, so that they answer at once.
"""

from __future__ import annotations

import glob
import importlib
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megaplug
from megaplug.commands import cli
from megaplug.commands.plan_words import Word, choose, split_words
from megaplug.errors import UserError
from megaplug.job.suggest import closest

_FLAGS = "--help, --completion, --version"
# Keys of the documents that a program reads change with this.
FORMAT = 1
# Words with this in place of values are files.
FILES = (":files",)
SWITCH = ("false", "true")


@dataclass(frozen=True)
class Action:
    """Something that can be done.

    Attributes:
        module: Has ``answer(asked) -> Answer``.
        meaning: For ``--help``.
        words: Its own words, beside ``output``.
    """

    module: str
    meaning: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """What was typed; each command adds what its own words name.

    Attributes:
        typed: The words; of one that was typed twice, the last.
        command: All of it.
    """

    typed: Mapping[str, str]
    command: cli.CommandLine

    @property
    def as_json(self) -> bool:
        """Whether a program reads the answer."""
        return self.typed.get("output") == "json"

    def several(self, word: str) -> list[str]:
        """What a word names: ``[a,b]`` are two; of one name, brackets are part of a pattern."""
        text = self.typed[word]
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        return [one.strip() for one in text.split(",")]


@dataclass(frozen=True)
class Answer:
    """What an action has found or done.

    Attributes:
        report: For a program.
        text: For a person.
        exit_code: 0, or 1 where something is wrong with what was found.
        is_last: Whether others were told before; to a program each is one line then, with an ``event``.
    """

    report: dict[str, Any]
    text: str
    exit_code: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class Tool:
    """One such command.

    Attributes:
        program: What it is called where the package is installed.
        page: What ``--help`` shows, with places for ``program``, ``actions`` and ``words``.
        actions: By their names.
        default: The action that nobody needs to name.
        words: Every word of every action.
        chosen: Those whose values are all that there is.
        asked: Makes of the typed words what an action is given.
        names_by: The word that names what the action is about.
    """

    program: str
    page: str
    actions: Mapping[str, Action]
    default: str
    words: Mapping[str, Word]
    chosen: tuple[str, ...]
    asked: Callable[[Mapping[str, str], cli.CommandLine], Asked]
    names_by: str

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Do one thing.

        Args:
            argv: The words after the command; the process's own if not given.

        Returns:
            The exit code: 0, 1 if something is wrong with what was found, 2 for a mistake or a disk that
            refuses.
        """
        return cli.run(lambda words: cli.answered(words, self._answer, _error), argv)

    def _answer(self, words: Sequence[str]) -> int:
        own = {"action": tuple(self.actions)} | {name: word.values for name, word in self.words.items()}
        if (code := cli.complete(words, own, takes_job=False)) is not None:
            return code
        command = cli.parse(words, cli.program_name(self.program), flags=_FLAGS)
        if command.help and command.overrides:
            return cli.show("\n\n".join(self._explained(name) for name in command.overrides))
        if (code := cli.inform(command, lambda: self.help_page(command.program))) is not None:
            return code
        source = command.source
        if command.cfg is not None or command.resolve or command.multirun or source.extra_dir is not None:
            message = "no job is composed here, and its flags mean nothing"
            raise UserError(message, hint=f"flags: {_FLAGS}")
        typed, strange = split_words(command.overrides, ("action", *self.words))
        if strange:
            raise self._misspelt(strange[0])
        name = choose("action", typed.pop("action", self.default), tuple(self.actions))
        action = self.actions[name]
        for word, value in typed.items():
            if word not in ("output", *action.words):
                hint = f"it belongs to {self._takers(word, ' and ')}"
                raise UserError(f"{word}=... means nothing to action={name}", hint=hint)
            if not value:
                meaning = f"{self.words[word].form}: {self.words[word].meaning}"
                raise UserError(f"{word}= has no value", hint=meaning)
            if word in ("output", *self.chosen):
                choose(word, value, self.words[word].values)
        asked = self.asked(typed, command)
        found: Answer = importlib.import_module(action.module).answer(asked)
        if not asked.as_json:
            cli.show(found.text)
            return found.exit_code
        head = {"megaplug": megaplug.__version__, "format": FORMAT, "action": name}
        if found.is_last:
            cli.show(json.dumps({"event": "answer", **head, **found.report}))
        else:
            cli.show(json.dumps({**head, **found.report}, indent=2))
        return found.exit_code

    def _takers(self, word: str, between: str) -> str:
        return between.join(f"action={name}" for name, action in self.actions.items() if word in action.words)

    def _misspelt(self, word: str) -> UserError:
        key, is_pair, _ = word.partition("=")
        if word in self.actions:
            return UserError(f"{word!r} is no key=value", hint=f"did you mean action={word}?")
        meant = closest(key, ("action", *self.words))
        if not is_pair and meant is None:
            hint = f"a run's folder is named by {self.names_by}={word}"
            return UserError(f"{word!r} is no key=value", hint=hint)
        hint = f"did you mean {meant}?" if meant else f"words: {', '.join(['action', *self.words])}"
        return UserError(f"{key}: there is no such word", hint=hint)

    def help_page(self, program: str) -> str:
        """What ``--help`` alone shows."""
        return self.page.format(
            program=program,
            actions=_table([(name, action.meaning) for name, action in self.actions.items()]),
            words=_table([(word.form, word.meaning) for word in self.words.values()]),
        )

    def _explained(self, name: str) -> str:
        """What an action or a word means."""
        word = name.split("=")[-1] if name.startswith("action=") else name.partition("=")[0]
        if word in self.actions:
            action = self.actions[word]
            own = [(self.words[one].form, self.words[one].meaning) for one in ("output", *action.words)]
            return f"action={word}: {action.meaning}\n{_table(own)}"
        if word == "action":
            rows = [(one, action.meaning) for one, action in self.actions.items()]
            return f"action=NAME\n{_table(rows)}"
        if word in self.words:
            takers, found = self._takers(word, ", "), self.words[word]
            return f"{found.form}\n  {found.meaning}{f' ({takers})' if takers else ''}"
        meant = closest(word, (*self.actions, *self.words))
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join([*self.actions, *self.words])}"
        raise UserError(f"there is no action or word {name!r}", hint=hint)


def _error(error: UserError) -> dict[str, Any]:
    problems = [{"message": problem.message, "hint": problem.hint} for problem in error.problems]
    return {
        "megaplug": megaplug.__version__,
        "format": FORMAT,
        "problems": problems,
        "exit_code": error.exit_code,
    }


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines: list[str] = []
    for left, right in rows:
        first, *more = textwrap.wrap(right, 110 - 24, break_on_hyphens=False)
        lines += [f"  {left:<22}{first}", *(" " * 24 + line for line in more)]
    return "\n".join(lines)


def folders_of(pattern: Path) -> list[Path]:
    """The folders that a path names, in the order of their names."""
    if pattern.is_dir():
        return [pattern]
    return sorted(path for path in map(Path, glob.glob(str(pattern))) if path.is_dir())  # noqa: PTH207


def columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of columns of one width each; those in ``left`` begin at their left edge."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
