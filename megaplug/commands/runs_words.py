"""The words of ``launch/runs.py``, and which runs they name."""

from __future__ import annotations

from pathlib import Path

from megaplug.commands import actions
from megaplug.commands.actions import FILES, SWITCH, folders_of
from megaplug.commands.plan_words import OUTPUTS, Word
from megaplug.errors import UserError
from megaplug.job.suggest import closest
from megaplug.runs.folder import RunFolder

WORDS: dict[str, Word] = {
    "output": Word("output=table|json", "for a person, or for a program", OUTPUTS),
    "run": Word("run=FOLDER", "a run's folder, name or pattern such as 'tiny-*'; [a,b] are several", FILES),
    "runs_dir": Word("runs_dir=FOLDER", "where runs are that are not named by their folder: runs", FILES),
    "picture": Word("picture=FILE", "where the picture goes: comparison.png beside the first run", FILES),
    "rank": Word("rank=0", "what this rank writes, in place of the steps"),
    "yes": Word("yes=true", "delete what is shown; else nothing is deleted", SWITCH),
}
"""Every word of every action; which action takes which stands in ``runs.ACTIONS``."""


class Asked(actions.Asked):
    """What was typed, and the runs that it names."""

    @property
    def runs_dir(self) -> Path:
        """Where runs are that are named by their names."""
        return Path(self.typed.get("runs_dir", "runs")).expanduser()

    @property
    def has_none(self) -> bool:
        """Whether no run and no folder is named, and none was made yet."""
        return not {"run", "runs_dir"} & set(self.typed) and not any(
            map(is_run, folders_of(self.runs_dir / "*"))
        )

    def runs(self) -> list[RunFolder]:
        """The runs that ``run=`` names, or all in ``runs_dir``, in the order of their names.

        Raises:
            UserError: There is none.
        """
        if "run" not in self.typed:
            found = [RunFolder(path) for path in folders_of(self.runs_dir / "*") if is_run(path)]
            if not found:
                where = "is not a folder" if not self.runs_dir.is_dir() else "holds no run"
                raise UserError(f"runs_dir={self.runs_dir} {where}", hint="python launch/train.py makes one")
            return found
        paths: dict[Path, None] = {}
        for text in self.several("run"):
            paths |= dict.fromkeys(self._named(text))
        return [RunFolder(path) for path in paths]

    def run(self) -> RunFolder:
        """The one run that ``run=`` names.

        Raises:
            UserError: It names none, or several.
        """
        if "run" not in self.typed:
            raise UserError("no run is named", hint=f"run=FOLDER; {self._there()}")
        found = self.runs()
        if len(found) > 1:
            names = ", ".join(folder.name for folder in found[:4])
            raise UserError(f"run={self.typed['run']} names {len(found)} runs: {names}", hint="name one")
        return found[0]

    def rank(self) -> int | None:
        """The rank whose log is asked for.

        Raises:
            UserError: It is no number.
        """
        text = self.typed.get("rank")
        if text is not None and not text.isdecimal():
            raise UserError(f"rank={text} is not the number of a rank", hint="such as rank=0")
        return None if text is None else int(text)

    def _named(self, text: str) -> list[Path]:
        places = (Path(text).expanduser(), self.runs_dir / text)
        for pattern in places if text else ():
            if found := [path for path in folders_of(pattern) if is_run(path)]:
                return found
        if any(place.is_dir() for place in places):
            message = f"run={text} is no run: it has neither job.yaml nor state.json"
            raise UserError(message, hint=self._there())
        raise UserError(f"there is no run {text!r}", hint=self._there(text))

    def _there(self, text: str = "") -> str:
        """What could have been meant."""
        names = [path.name for path in folders_of(self.runs_dir / "*") if is_run(path)]
        if not names:
            return f"there is none in {self.runs_dir}; runs_dir= names another folder"
        if meant := closest(text, names):
            return f"did you mean {meant}?"
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"there are {', '.join(names[:4])}{more}"


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return path.is_dir() and ((path / "job.yaml").is_file() or (path / "state.json").is_file())
