"""The flags beside the overrides, with Hydra's names; here a user's mistake becomes an exit code."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaplug.errors import UserError
from megaplug.job.compose import CONFIG_NAME, ConfigSource

FLAGS = "--cfg job, --resolve, --multirun, --config-dir, --config-name, --help, --version"
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@dataclass(frozen=True)
class CommandLine:
    """What was typed.

    Attributes:
        overrides: The ``key=value`` words.
        source: Where configuration is read from.
        cfg: ``job`` if the configuration is to be printed; None otherwise.
        resolve: With ``cfg``: references are replaced by what they refer to.
        multirun: Every combination of values is to be run.
        help: What can be typed is to be explained; ``overrides`` then names what in particular.
        version: The version is asked.
        json: With ``help``: for a program.
        completion: The shell whose completion is asked; None otherwise.
        program: The command without its words, as it can be typed again.
        job_file: The frozen job that is to be started in place of one that is composed; None to compose.
    """

    overrides: list[str]
    source: ConfigSource
    cfg: str | None
    resolve: bool
    multirun: bool
    help: bool
    version: bool
    json: bool
    completion: str | None
    program: str
    job_file: Path | None = None

    def words(self) -> list[str]:
        """Flags and overrides."""
        return [*self._flags(), *self.overrides]

    def typed(self, *changes: str) -> str:
        """The command as a line that can be pasted into a shell.

        Args:
            changes: Overrides that replace those of the same key or join the others; ``-key`` leaves one out.
        """
        keys = {change.lstrip("-").split("=", 1)[0] for change in changes}
        kept = [word for word in self.overrides if word.split("=", 1)[0] not in keys]
        added = [change for change in changes if not change.startswith("-")]
        return " ".join([self.program, shlex.join([*self._flags(), *kept, *added])]).strip()

    def _flags(self) -> list[str]:
        flags = [] if self.job_file is None else ["--job", str(self.job_file)]
        if self.source.extra_dir is not None:
            flags += ["--config-dir", str(self.source.extra_dir)]
        if self.source.name != CONFIG_NAME:
            flags += ["--config-name", self.source.name]
        if self.multirun:
            flags.append("--multirun")
        return flags


def parse(argv: Sequence[str], program: str, *, flags: str = FLAGS) -> CommandLine:
    """Split flags from overrides.

    Args:
        argv: The words after the command.
        program: How it was called.
        flags: Those that it takes, for who types another.

    Raises:
        UserError: A flag is not known or lacks its value.
    """
    parser = _Parser(flags)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", "-V", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--completion")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--job", type=Path)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-name", "-cn", default=CONFIG_NAME)
    found = parser.parse_intermixed_args(list(argv))
    if found.job is not None and "--job" not in flags:
        parser.error("--job belongs to launch/train.py")
    return CommandLine(
        overrides=found.overrides,
        source=ConfigSource(found.config_name.removesuffix(".yaml"), found.config_dir),
        cfg=found.cfg,
        resolve=found.resolve,
        multirun=found.multirun,
        help=found.help,
        version=found.version,
        json=found.json,
        completion=found.completion,
        program=program,
        job_file=found.job,
    )


class _Parser(argparse.ArgumentParser):
    def __init__(self, flags: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._flags = flags

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(message, hint=f"flags: {self._flags}")


def program_name(script: str) -> str:
    """How this command was called: the script of the clone, or the command of an installed package."""
    path = Path(sys.argv[0])
    return f"python {sys.argv[0]}" if path.suffix == ".py" else path.name or script


def sibling(program: str, name: str) -> str:
    """Another command beside this one: ``python launch/train.py`` beside ``python launch/plan.py``.

    Args:
        program: From `program_name`.
        name: The other's, such as ``train``.
    """
    path = Path(program.removeprefix("python "))
    if path.suffix == ".py":
        return f"python {path.with_name(f'{name}.py')}"
    return f"megaplug-{name}"


def complete(
    words: Sequence[str], own: Mapping[str, Sequence[str]] | None = None, *, takes_job: bool = True
) -> int | None:
    """Answer a shell that completes; None where it was no shell that asked.

    Args:
        words: All words after the command.
        own: Keys of the command that are no keys of a job, with their values.
        takes_job: Whether it takes those of a job, too.
    """
    if words[:1] != ["--complete"]:
        return None
    from megaplug.commands.completion import answer

    return show(answer(words[1:], own, takes_job=takes_job))


def inform(command: CommandLine, front_page: Callable[[], str]) -> int | None:
    """Answer ``--help``, ``--version`` and ``--completion``; None where none of them was asked.

    Args:
        command: What was typed.
        front_page: What ``--help`` alone shows.
    """
    if command.completion is not None:
        from megaplug.commands.completion import script

        return show(script(command.completion))
    if command.version:
        from megaplug.commands.help import version_text

        return show(version_text())
    if command.help:
        from megaplug.commands.help import help_text

        return show(help_text(command, front_page))
    return None


class UnwrittenError(UserError):
    """Where answers go nothing can be written: what is wrong can only be said on stderr."""


def answered(
    words: Sequence[str],
    answer: Callable[[Sequence[str]], int],
    error_json: Callable[[UserError], Mapping[str, object]],
) -> int:
    """With ``output=json`` every answer is JSON on stdout, that to a mistake, too: one line, as of several.

    Args:
        words: What was typed.
        answer: Gives the exit code.
        error_json: What a program is told of a mistake.

    Raises:
        UserError: A mistake, where a person is to read it.
    """
    try:
        return answer(words)
    except UserError as error:
        if "output=json" not in words or isinstance(error, UnwrittenError):
            raise
        show(json.dumps(error_json(error)))
        return error.exit_code


def show(text: str) -> int:
    """Print what was asked for; a reader that leaves early, such as ``head``, is no fault.

    Returns:
        0, the exit code.

    Raises:
        UnwrittenError: It cannot be written, as to a file on a full disk.
    """
    is_read(text)
    return 0


def is_read(text: str) -> bool:
    """Print, as `show` does; False where the reader has left."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes once more at exit, and there is nowhere left to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UnwrittenError(f"the answer cannot be written: {error.strerror}", exit_code=1) from error
        return False
    return True


def tell[T](show: Callable[[T], None], what: T) -> None:
    """Show something to a person who may have gone: a closed pipe or terminal is no reason to end a run.

    Nothing more is written to where it could not be, of stdout and stderr.
    """
    try:
        show(what)
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()  # what could not be written is still to be
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class Ended(BaseException):
    """A signal that ends commands has come; what is under way cleans up as after Ctrl-C.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def run(work: Callable[[Sequence[str]], int], words: Sequence[str] | None) -> int:
    """Run a command, as `guarded` does.

    Args:
        work: What the words ask for; returns the exit code.
        words: The words after the command; None for those of this process, which ends with the answer.
    """
    if words is not None:
        return guarded(lambda: work(words))
    # Nearly all that is made lives to the end: looking for cycles in it is a tenth of the time of an answer.
    gc.set_threshold(100_000)
    code = guarded(lambda: work(sys.argv[1:]))
    for number in (signal.SIGINT, *_ENDING):
        # All is done and said: whoever cannot wait for Python to tidy up has the answer's code, too.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))
    gc.freeze()
    return code


def guarded(work: Callable[[], int]) -> int:
    """Run a command; a user's mistake is one message and its exit code, anything else a traceback.

    Ctrl-C is one line and 130; SIGTERM, SIGHUP and SIGUSR2 are likewise one line, and 143, 129 or 140.

    Args:
        work: The command.
    """
    try:
        with _ended_by_signals():
            return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Ended) as error:
        # A second Ctrl-C is no news.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        by = f" by {error.number.name}" if isinstance(error, Ended) else ""
        # The terminal that it would be said to may be gone.
        with contextlib.suppress(OSError):
            print(f"interrupted{by}", file=sys.stderr, flush=True)
        return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `Ended` at the first of these signals, but for those that are ignored, as SIGHUP under nohup."""
    is_ending = False

    def end(number: int, _: object) -> None:
        nonlocal is_ending
        # What a scheduler repeats must not disturb the tidying up.
        if not is_ending:
            is_ending = True
            raise Ended(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
