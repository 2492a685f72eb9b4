"""Where the ranks of a job that hangs stand: asked from outside, since they do not answer any more."""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaplug.launchers.ranks import LocalRank
from megaplug.runs.events import STACK_SIGNAL

_POLL_S, _SETTLED_S = 0.02, 0.3
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>[0-9]+) in (?P<function>.+)$')
# How the stack of a main thread ends, and the one of any thread that is too deep for faulthandler.
_OUTERMOST = re.compile(r"(\bin (<module>|_run_module_as_main)|^  \.\.\.)\n\Z", re.MULTILINE)
# How a rank waits for others: torch's own collectives, handles of such that were started before, and on a GPU
# whatever waits for the device, which waits for the collective.
_COLLECTIVE_FILES = "/torch/distributed/"
_WAITING_LINE = re.compile(r"\.(wait|item|tolist|cpu|synchronize)\(|\bTCPStore\(|\bbarrier\(")
_NEAREST_FRAMES = 4
_STOPPED = "T"
UNKNOWN = "?"
"""The state of a rank whose machine does not answer."""


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(Path(self.file).parts[-3:])}:{self.line})"


@dataclass(frozen=True)
class Stand:
    """Where one rank stands.

    Attributes:
        state: The kernel's letter: ``R`` runs, ``S`` sleeps, ``D`` waits for a disk, ``T`` is stopped; or
            `UNKNOWN`.
        text: What faulthandler has written; empty where the rank gave nothing.
    """

    state: str
    text: str

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or its like."""
        return self.state == _STOPPED

    @property
    def frames(self) -> list[Frame]:
        """The main thread's, innermost first: faulthandler writes it last."""
        block = self.text.rpartition("most recent call first):\n")[2]
        matches = map(_FRAME.match, block.splitlines())
        return [Frame(found["file"], int(found["line"]), found["function"]) for found in matches if found]

    @property
    def waits(self) -> bool:
        """Whether it is seen to wait for other ranks."""
        frames = self.frames
        if any(_COLLECTIVE_FILES in frame.file for frame in frames[:_NEAREST_FRAMES]):
            return True
        return bool(frames) and bool(
            _WAITING_LINE.search(linecache.getline(frames[0].file, frames[0].line))
            and not frames[0].file.endswith("/threading.py")
        )


def state_of(pid: int) -> str:
    """The kernel's letter for the state of a process; ``X`` where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by SIGSTOP or its like."""
    return state_of(pid) == _STOPPED


def ask(ranks: Sequence[LocalRank], wait_s: float) -> dict[int, Stand]:
    """Have every rank that still can write its stack.

    A stopped rank is not woken, and one that has not yet said what is to be done on the signal is not sent
    it: it would die of it.

    Args:
        ranks: Those that live.
        wait_s: For the last of them to answer.
    """
    states = {rank.rank: state_of(rank.process.pid) for rank in ranks}
    asked = [rank for rank in ranks if states[rank.rank] != _STOPPED and _hears(rank.process.pid)]
    before = {rank.rank: os.fstat(rank.stack_fd).st_size for rank in asked}
    texts = dict.fromkeys(before, "")
    for rank in asked:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(rank.pidfd, STACK_SIGNAL)
    deadline = time.monotonic() + wait_s
    changed = time.monotonic()
    # Nothing marks the end of a stack: it is there when all look whole and none has grown for a moment.
    while (now := time.monotonic()) < deadline:
        found = {rank.rank: _written(rank.stack_fd, before[rank.rank]) for rank in asked}
        if found != texts:
            texts, changed = found, now
        if all(map(_OUTERMOST.search, found.values())) and now - changed > _SETTLED_S:
            break
        time.sleep(_POLL_S)
    return {rank: Stand(state, texts.get(rank, "")) for rank, state in states.items()}


def _written(fd: int, start: int) -> str:
    return os.pread(fd, 1 << 20, start).decode(errors="replace")


def _hears(pid: int) -> bool:
    """Whether a process catches the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) >> (STACK_SIGNAL - 1) & 1)
