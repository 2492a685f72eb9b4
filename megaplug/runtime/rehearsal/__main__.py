"""``python -m megaplug.runtime.rehearsal PARENT``: a rank from each line read, a JSON line of what it has.

Read is ``{"job": <text of a job.yaml>, "rank": 3, "origins": false}``, a line each, to the end. Told is what
`stage.rehearse` has counted, in this order, or ``{"failed": {...}}`` as the last line. Nothing is written to
a disk.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megaplug.errors import UserError
from megaplug.runs.dependent import end_with
from megaplug.runs.helper_output import content, in_memory, last_words


def main(parent: int) -> int:
    """Rehearse ranks, each in a fork of its own and as many at a time as there are cores.

    Args:
        parent: The process that asks; this one and its forks end with it.

    Returns:
        0; 1 if a rank failed.
    """
    end_with(parent)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Whatever libraries print is no answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    waiting = [json.loads(line) for line in sys.stdin]
    try:
        _prepare()
    except UserError as error:
        return _failed(answers, message=error.message, hint=error.hint)
    return _rehearse_all(waiting, answers)


def _prepare() -> None:
    """What is done once for all ranks: it takes longer than a small rehearsal."""
    try:
        # Libraries that Megatron brings ask for it when they are imported.
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"libraries want a folder for temporary files: {error.strerror}",
            hint="free some space there, or type TMPDIR=<a folder with space> before the command",
        ) from error
    try:
        from megaplug.runtime.rehearsal import stage

        stage.prepare()
    except (ImportError, OSError) as error:
        raise UserError(
            f"torch or Megatron cannot be imported: {error}",
            hint="action=doctor says what is missing here",
        ) from error


@dataclass
class _Fork:
    """The process of a rank, and the files in memory that it writes.

    Attributes:
        rank: Its number in the world.
        pid: Of the process.
        found: What it counted.
        said: What it and its libraries printed.
        status: How it ended; None while it runs.
    """

    rank: int
    pid: int
    found: TextIO
    said: TextIO
    status: int | None = None


def _rehearse_all(asked: Sequence[Mapping[str, Any]], answers: TextIO) -> int:
    at_once = len(os.sched_getaffinity(0))
    forks: list[_Fork] = []
    for number in range(len(asked)):
        while len(forks) <= number or forks[number].status is None:
            while len(forks) < len(asked) and sum(fork.status is None for fork in forks) < at_once:
                forks.append(_start(**asked[len(forks)]))
            pid, status = os.wait()
            ended = next(fork for fork in forks if fork.pid == pid)
            ended.status = os.waitstatus_to_exitcode(status)
            if ended.status:
                # The others end with this process.
                return _tell_failure(ended, answers)
        print(content(forks[number].found), file=answers, flush=True)
    return 0


def _start(job: str, rank: int, origins: bool) -> _Fork:
    here = os.getpid()
    found, said = in_memory("found"), in_memory("said")
    if pid := os.fork():
        return _Fork(rank, pid, found, said)
    end_with(here)
    code = 1
    try:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
        found.write(json.dumps(_rehearse(job, rank, origins)))
        code = 0
    except UserError as error:
        found.write(json.dumps({"message": error.message, "hint": error.hint}))
    except BaseException:  # noqa: BLE001  the process ends here, and its last words are read
        traceback.print_exc()
    for file in (found, sys.stdout, sys.stderr):
        file.flush()
    # Nothing of the process that it was forked from is to be closed.
    os._exit(code)


def _rehearse(job: str, rank: int, origins: bool) -> dict[str, object]:
    from megaplug.job.freeze import frozen_from_text
    from megaplug.runs.folder import RunFolder
    from megaplug.runtime import environment, loudness
    from megaplug.runtime.rehearsal import stage

    frozen = frozen_from_text(job, RunFolder(Path(os.devnull)).job_file)
    loudness.set_level(frozen.job.logging.level)
    environment.prepare(frozen)
    return stage.rehearse(frozen, rank, with_origins=origins)


def _tell_failure(fork: _Fork, answers: TextIO) -> int:
    known = json.loads(content(fork.found) or "{}")
    said = last_words(content(fork.said))
    return _failed(answers, rank=fork.rank, status=fork.status, said=said, **known)


def _failed(answers: TextIO, **values: object) -> int:
    print(json.dumps({"failed": values}), file=answers, flush=True)
    return 1


if __name__ == "__main__":
    # Before torch is imported: a rehearsal touches no GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main(int(sys.argv[1])))
