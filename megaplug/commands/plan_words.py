"""The words of ``launch/plan.py`` that are no keys of a job, such as ``tokens=15T``: what each is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaplug.commands.cli import CommandLine
from megaplug.errors import UserError
from megaplug.job.counts import ENDINGS, count_of, decimal_comma
from megaplug.job.schema import Job
from megaplug.job.suggest import closest

OUTPUTS = ("table", "json")


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        form: How it is typed, as ``--help`` shows it.
        meaning: What for.
        values: What it can be, where that is one of a few.
    """

    form: str
    meaning: str
    values: tuple[str, ...] = ()


WORDS: dict[str, Word] = {
    "output": Word("output=table|json", "for a person, or for a program", OUTPUTS),
    "tokens": Word("tokens=15T", "tokens of the whole training, for days and money; else those of the job"),
    "ranks": Word("ranks=all|[0,7]|0-15", "a line for each of these ranks, below the plan"),
    "pictures": Word("pictures=DIR", "a folder that receives the pictures"),
    "top": Word("top=10", "how many of the best are listed"),
}
"""Every word of every action; which action takes which stands in ``plan.ACTIONS``."""


@dataclass(frozen=True)
class Asked:
    """A question, ready to be answered.

    Attributes:
        job: As composed; the plain default where nothing was typed and the action does not need one.
        typed: The action's own words as they were typed.
        command: The flags and the job's overrides, for commands that are shown to the user.
    """

    job: Job
    typed: Mapping[str, str]
    command: CommandLine

    @property
    def job_words(self) -> list[str]:
        """The words that are the job's, without this command's own."""
        return split_words(self.command.overrides, ("action", *WORDS))[1]

    @property
    def as_json(self) -> bool:
        """Whether a program reads the answer."""
        return self.typed.get("output") == "json"

    def count(self, word: str, default: int | None = None) -> int | None:
        """A whole number above 0; ``15T``, ``1.5e12`` and ``300_000`` are understood.

        Raises:
            UserError: It is none.
        """
        return read_count(word, self.typed[word]) if word in self.typed else default

    def folder(self, word: str) -> Path | None:
        """A folder's path, which need not be there yet.

        Raises:
            UserError: A file is there.
        """
        if word not in self.typed:
            return None
        path = Path(self.typed[word]).expanduser()
        if not self.typed[word] or (path.exists() and not path.is_dir()):
            raise UserError(f"{word}={self.typed[word]} is not a folder", hint=f"such as {word}=pictures")
        return path

    def ranks(self, world_size: int) -> list[int]:
        """The ranks that ``ranks=...`` names, in order; none where it was not typed.

        Raises:
            UserError: It names none, or one that the world does not have.
        """
        return read_ranks(self.typed["ranks"], world_size) if "ranks" in self.typed else []


def read_count(word: str, text: str) -> int:
    """A whole number above 0, with the ending k, M, G (or B) or T for thousands and so on.

    Raises:
        UserError: It is none.
    """
    number = count_of(text)
    if number is None:
        hint = f"such as {WORDS[word].form}"
        if pointed := decimal_comma(text):
            hint = f"a decimal point is written, not a comma: {word}={pointed}"
        elif word == "tokens":
            hint += f" (endings: {ENDINGS})"
        raise UserError(f"{word}={text} is not a whole number above 0", hint=hint)
    return number


def read_ranks(text: str, world_size: int) -> list[int]:
    """``all``, ``3``, ``[0,7]``, ``0-15`` or several of these.

    Raises:
        UserError: It names no rank, or one that the world does not have.
    """
    if text == "all":
        return list(range(world_size))
    found: set[int] = set()
    for part in text.strip("[]").replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise UserError(f"ranks={text} cannot be read", hint="such as ranks=all, ranks=[0,7], ranks=0-15")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"ranks={text} counts down", hint=f"write ranks={last}-{first}")
        if last >= world_size:
            raise UserError(
                f"ranks={text}: there is no rank {part} among {world_size:,}",
                hint=f"ranks are counted from 0 to {world_size - 1}",
            )
        found.update(range(first, last + 1))
    return sorted(found)


def split_words(words: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words that are this command's own, and those that belong to the job."""
    typed: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        key, is_pair, value = word.partition("=")
        if is_pair and key in own:
            typed[key] = value
        else:
            rest.append(word)
    return typed, rest


def choose(key: str, value: str, known: Sequence[str]) -> str:
    """One of the known values.

    Raises:
        UserError: It is not one of them.
    """
    if value in known:
        return value
    meant = closest(value, known)
    listed = "one of: " + " | ".join(f"{key}={name}" for name in known)
    raise UserError(
        f"{key}={value} does not exist", hint=f"did you mean {meant}? {listed}" if meant else listed
    )
