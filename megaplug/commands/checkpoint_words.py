"""The words of ``launch/checkpoint.py``: what each is, and which runs and checkpoints they name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megaplug.commands import actions
from megaplug.commands.actions import FILES, SWITCH, folders_of
from megaplug.commands.plan_words import OUTPUTS, Word
from megaplug.errors import UserError
from megaplug.job.counts import count_of
from megaplug.runs.checkpoints import Checkpoint, list_checkpoints
from megaplug.runs.folder import RunFolder

WORDS: dict[str, Word] = {
    "output": Word("output=table|json", "for a person, or for a program", OUTPUTS),
    "run": Word(
        "run=FOLDER",
        "a run's folder, or one that holds iter_* folders; [a,b] or a pattern for several",
        FILES,
    ),
    "path": Word("path=FOLDER", "one checkpoint, such as runs/.../checkpoints/iter_0000100", FILES),
    "iteration": Word("iteration=100", "the checkpoint of this step; the newest where it is not given"),
    "tensors": Word("tensors=all", "every tensor, those of the optimizer, too", ("weights", "all")),
    "keep": Word("keep=2", "the newest that stay; else as the run's checkpoint.keep"),
    "keep_every": Word("keep_every=1000", "those that stay whose step is a multiple; null: none", ("null",)),
    "keep_best": Word("keep_best=1", "so many of the lowest validation loss stay"),
    "yes": Word("yes=true", "delete what is shown; else nothing is deleted", SWITCH),
    "to": Word("to=FOLDER", "the folder that receives the checkpoint, made where it is not there", FILES),
}
"""Every word of every action; which action takes which stands in ``checkpoint.ACTIONS``."""

_RUNS = Path("runs")


@dataclass(frozen=True)
class Place:
    """A folder of checkpoints.

    Attributes:
        given: As it was named.
        directory: Where the ``iter_*`` folders are.
        run: The run that they belong to; None where they lie elsewhere.
    """

    given: Path
    directory: Path
    run: RunFolder | None


class Asked(actions.Asked):
    """What was typed, and the runs and checkpoints that it names."""

    def count(self, word: str, *, least: int = 1) -> int | None:
        """A whole number; None where it was not typed, or as ``null``.

        Raises:
            UserError: It is none, or too small.
        """
        text = self.typed.get(word)
        if text is None or text == "null":
            return None
        number = 0 if text == "0" else count_of(text)
        if number is None or number < least:
            raise UserError(
                f"{word}={text} is not a whole number of {least} or more", hint=f"such as {WORDS[word].form}"
            )
        return number

    def places(self) -> list[Place]:
        """The folders of checkpoints that ``run=`` names, or all below ``runs`` where it is not given.

        Raises:
            UserError: There is none.
        """
        if "run" not in self.typed:
            found = [place for path in folders_of(_RUNS / "*") if (place := _place(path)) is not None]
            if not found:
                raise UserError("no run is named, and there is none in runs/", hint="name one: run=FOLDER")
            return found
        places = []
        for text in self.several("run"):
            paths = folders_of(Path(text).expanduser()) if text else []
            if not paths:
                raise UserError(f"run={text} is not a folder", hint=_there())
            found = [place for path in paths if (place := _place(path)) is not None]
            if not found:
                raise UserError(f"{paths[0]} is neither a run nor a folder of checkpoints", hint=_there())
            places += found
        return places

    def checkpoint(self) -> tuple[Checkpoint, Place]:
        """The one checkpoint that ``path=``, or ``run=`` with or without ``iteration=``, names.

        Raises:
            UserError: None or several, or there is no such checkpoint.
        """
        if (named := self.typed.get("path")) is not None:
            for word in ("run", "iteration"):
                if word in self.typed:
                    raise UserError(
                        f"path= names a checkpoint, and {word}={self.typed[word]} another way to one",
                        hint="give path=, or run= with or without iteration=",
                    )
            path = Path(named).expanduser()
            match = re.fullmatch(r"iter_([0-9]+)", path.absolute().name)
            if match is None or not path.is_dir():
                what = "is not a checkpoint: their names are iter_<step>" if path.is_dir() else "is no folder"
                raise UserError(f"path={named} {what}", hint=f"such as {WORDS['path'].meaning.split()[-1]}")
            place = _place(path.absolute().parent)
            assert place is not None
            return Checkpoint(path, int(match[1])), place
        if "run" not in self.typed:
            raise UserError("no checkpoint is named", hint=f"run=FOLDER or path=FOLDER; {_there()}")
        places = self.places()
        if len(places) > 1:
            raise UserError(f"run={self.typed['run']} names {len(places)} runs", hint="name one")
        (place,) = places
        present, step = list_checkpoints(place.directory), self.count("iteration", least=0)
        if not present:
            raise UserError(
                f"{place.given} has no checkpoint", hint="it was stopped before its first was saved"
            )
        chosen = [found for found in present if found.iteration == step] if step is not None else present
        if not chosen:
            steps = ", ".join(f"{found.iteration:,}" for found in present)
            raise UserError(
                f"{place.given} has no checkpoint of step {step:,}", hint=f"it has those of {steps}"
            )
        return chosen[-1], place


def _place(path: Path) -> Place | None:
    """What a folder is: a run, its ``checkpoints``, one that holds ``iter_*`` folders; None for another."""
    if (path / "checkpoints").is_dir():
        return Place(path, path / "checkpoints", RunFolder(path))
    if path.absolute().name == "checkpoints":
        parent = path.parent if path.parent != path else path.absolute().parent
        return Place(path, path, RunFolder(parent))
    return Place(path, path, None) if list_checkpoints(path) else None


def _there() -> str:
    """What could have been meant."""
    names = [str(path) for path in folders_of(_RUNS / "*") if _place(path) is not None]
    if not names:
        return "give the folder of a run, such as runs/tiny-0123abcd"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"there are {', '.join(names[:4])}{more}"
