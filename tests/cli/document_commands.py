"""The commands that stand in README.md and docs/: found, understood, and typed for the reader.

A command is a line of a ```bash block; a backslash at its end goes on. A comment above it may say why it is
not run here, so that a reader knows, too. ``# needs a GPU`` or ``# needs <package>``: a training command must
at least compose, or be refused for just that. ``# takes ten minutes``: its program must explain itself.
``# ends with 2: ...``: it is refused, and is meant to be.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Steps after which a training run of a document is stopped.
STEPS = 2
_MARK = re.compile(r"^# (needs|takes|ends) (.+)$")
_SHELL = set("|&;<>$*?`(){}~")
_ASKS = ("--help", "-h", "--cfg", "-c", "--version", "--completion")
# Programs that go on until they are stopped: that they are there is all that is asked.
_SERVERS = ("tensorboard",)


@dataclass(frozen=True)
class Command:
    """One command of a document.

    Attributes:
        line: As it stands there.
        needs: What this machine may not have; empty if nothing.
        takes: How long it takes, if that is too long to be run here; else empty.
        ends: ``with 2`` and why, where it is meant to be refused; else empty.
    """

    line: str
    needs: str = ""
    takes: str = ""
    ends: str = ""

    @property
    def words(self) -> list[str]:
        """Its words, without variables that are set in front of it."""
        words = shlex.split(self.line, comments=True)
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words = words[1:]
        return words

    @property
    def exit_code(self) -> int:
        """What it is meant to end with."""
        return int(self.ends.split()[1].rstrip(":")) if self.ends else 0

    @property
    def launched(self) -> str | None:
        """``train`` for ``python launch/train.py`` and ``megaplug-train``; None for other programs."""
        match self.words:
            case ["python", script, *_] if script.startswith("launch/"):
                return Path(script).stem
            case [program, *_] if program.startswith("megaplug-"):
                return program.removeprefix("megaplug-")
        return None

    @property
    def arguments(self) -> list[str]:
        """What follows the program, or the script."""
        return self.words[2:] if self.words[0] == "python" else self.words[1:]

    @property
    def trains(self) -> bool:
        """Whether ranks would be started."""
        starts_nothing = any(word in (*_ASKS, "launch=print", "launch=freeze") for word in self.arguments)
        return self.launched == "train" and not starts_nothing

    @property
    def is_plain(self) -> bool:
        """Whether no shell is needed to understand it."""
        return not _SHELL & set(self.line) and self.line.split()[0] == self.words[0]


def documents() -> list[Path]:
    """All that a reader is given."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[Command]:
    """The commands of a document, in its order."""
    for block in blocks(text, "bash"):
        marks: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            if mark := _MARK.match(line):
                marks[mark[1]] = mark[2]
            elif line.strip() and not line.startswith("#"):
                yield Command(line.strip(), **marks)
                marks = {}


def make_clone(folder: Path) -> Path:
    """A folder that looks like the clone in which a reader stands, and may be written to."""
    folder.mkdir(parents=True)
    for item in ROOT.iterdir():
        if item.name not in ("runs", ".git", ".venv", "my"):
            (folder / item.name).symlink_to(item)
    for source in ("text", "books", "code"):
        text = folder / "my" / source
        text.mkdir(parents=True)
        for name in ("one", "two", "three"):
            story = f"the story of {name}, from {source}: it was a day like any other day\n"
            (text / f"{name}.txt").write_text(story * 400)
    return folder


def try_command(command: Command, clone: Path) -> str | None:
    """What can be said of a command without starting ranks: why it is wrong, or None.

    A command of ``launch/`` is typed in this process, with ``launch=print`` where it would train; what needs
    a shell or another program is left to :func:`run_command`.
    """
    if command.words[0] == "make":
        # -n: what it would do is planned from the Makefile, not done
        return _failed(_run(["make", "-n", *command.words[1:]], ROOT))
    if command.words[:2] == ["pip", "install"]:
        return _unknown_packages(command.words[2:])
    if command.takes:
        return _explains_itself(command)
    if command.launched is None or not command.is_plain or any(w.startswith("load=") for w in command.words):
        return None
    words = [word.replace("launch=freeze", "launch=print") for word in command.arguments]
    words += ["launch=print"] if command.trains else []
    code, said = _called(command.launched, words, clone)
    if code == command.exit_code and "Traceback" not in said:
        return None
    if command.needs and code == 2 and "Traceback" not in said and _is_named(command.needs, said):
        return None
    return f"ended with {code}: {said[-3000:]}"


def run_command(command: Command, clone: Path, env: Mapping[str, str]) -> str | None:
    """Run a command as it is typed, a training run for a few steps: why it failed, or None."""
    if command.needs or command.takes or command.words[0] in ("make", "pip", "."):
        return None
    if command.words[0] in _SERVERS:
        return None if shutil.which(command.words[0], path=env["PATH"]) else "is not installed"
    line = command.line
    if command.trains:
        line = f"{line} train.stop_at={STEPS}" if "train.stop_at=" not in line else line
        line = re.sub(r"train\.stop_at=\d+", f"train.stop_at={STEPS}", line)
    return _failed(_run(["bash", "-ec", line], clone, env), command.exit_code)


def reader_environment(folder: Path) -> dict[str, str]:
    """An environment in which ``python`` and the installed commands are those of this test."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    launched = {f"megaplug-{file.stem}": str(file) for file in (ROOT / "launch").glob("*.py")}
    for name, script in {"python": "", **launched}.items():
        # Not a link: a Python finds its packages by the place from which it is called.
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {script} "$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        # The tests' own ranks want these queues, FSDP refuses them.
        **{name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"},
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def _called(program: str, words: list[str], clone: Path) -> tuple[int, str]:
    """A command's ``main`` in this process: its exit code and all that it said."""
    module = importlib.import_module(f"megaplug.commands.{program}")
    said, before, name = io.StringIO(), Path.cwd(), sys.argv[0]
    os.chdir(clone)
    sys.argv[0] = f"launch/{program}.py"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = module.main(words)
    finally:
        os.chdir(before)
        sys.argv[0] = name
    return code, said.getvalue()


def _explains_itself(command: Command) -> str | None:
    match command.words:
        case ["bash" | "sh", script, *_]:
            return _failed(_run(["bash", "-n", script], ROOT))
        case ["python", script, *_]:
            return _failed(_run([sys.executable, script, "--help"], ROOT))
        case ["make", *_]:
            return None
    return f"no test knows how to ask {command.line!r} for help"


def _unknown_packages(words: list[str]) -> str | None:
    """Packages that pyproject.toml does not name: a reader would be sent to another project of that name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = {_package(line) for lines in [project["dependencies"], *extras.values()] for line in lines}
    for word in words:
        if match := re.fullmatch(r"(?:megaplug|\.)\[(.+)\]", word):
            unknown = [extra for extra in match[1].split(",") if extra not in extras]
            if unknown:
                return f"pyproject.toml has no extra {unknown}"
        elif not word.startswith("-") and word != "." and _package(word) not in known:
            return f"pyproject.toml does not name {word}"
    return None


def _package(requirement: str) -> str:
    return re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _is_named(needs: str, said: str) -> bool:
    """Whether a refusal names what the document says is needed."""
    word = re.sub(r"^an? ", "", needs.strip("` .")).split(",")[0]
    return word.lower().replace("_", " ") in said.lower().replace("_", " ")


def _run(
    words: list[str], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def _failed(done: subprocess.CompletedProcess[str], exit_code: int = 0) -> str | None:
    if done.returncode == exit_code:
        return None
    return f"ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
