"""Runs of a sweep side by side on this machine: each a command of its own, with GPUs and cores of its own.

Each ends with this process, however that ends. A signal is passed on to all, and none is started after it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megaplug
from megaplug.launchers.stops import SIGNALS, StopSignals

_ROOT = str(Path(megaplug.__file__).resolve().parent.parent)
# The command as it is typed, which ends with the process that has started it.
_GUARD = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from megaplug.runs import watchdog; "
    "watchdog.start(int(sys.argv.pop(1))); del sys.argv[0]; "
)
_TRAIN = "from megaplug.entry import train; sys.exit(train())"


@dataclass(frozen=True)
class Work:
    """One run.

    Attributes:
        number: What it is known by.
        words: How it is typed: the script, and what stands behind it.
        num_gpus: How many it needs for itself; 0 on a CPU.
    """

    number: int
    words: tuple[str, ...]
    num_gpus: int = 0


@dataclass
class _Running:
    work: Work
    process: subprocess.Popen[bytes]
    gpus: tuple[str, ...]
    pidfd: int
    pending: bytes = field(default=b"")

    @property
    def out(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()


class SideBySide:
    """Runs started as room comes free.

    Args:
        at_once: So many at most.
        gpus: What CUDA_VISIBLE_DEVICES calls the GPUs that there are.
        omp_num_threads: Threads of each rank, where the environment does not say.
        started: Is told the number of a run that begins.
        said: Is told each line that a run has written, with its number.
    """

    def __init__(
        self,
        at_once: int,
        gpus: Sequence[str],
        omp_num_threads: int,
        started: Callable[[int], None],
        said: Callable[[int, str], None],
    ) -> None:
        self._at_once = at_once
        self._free = list(gpus)
        self._threads = omp_num_threads
        self._started = started
        self._said = said
        self._running: list[_Running] = []
        self.codes: dict[int, int] = {}

    def run(self, works: Sequence[Work], signals: StopSignals) -> dict[int, int]:
        """Run them all, in their order; returns the exit codes by number, of those that were started.

        Args:
            works: No one needs more GPUs than there are.
            signals: What comes there is passed on.
        """
        waiting = list(works)
        with self._ending() as parent_fd, selectors.DefaultSelector() as selector:
            selector.register(signals.reader, selectors.EVENT_READ)
            while True:
                while waiting and not signals.asked and self._has_room(waiting[0]):
                    self._start(waiting.pop(0), parent_fd, selector)
                if not self._running:
                    return self.codes
                for key, _ in selector.select():
                    if key.data is None:
                        self._pass_on(signals.reader.recv(64))
                    elif key.data in self._running:
                        self._look(key.data, key.fd, selector)

    def _has_room(self, work: Work) -> bool:
        return len(self._running) < self._at_once and work.num_gpus <= len(self._free)

    def _start(self, work: Work, parent_fd: int, selector: selectors.BaseSelector) -> None:
        gpus, self._free = tuple(self._free[: work.num_gpus]), self._free[work.num_gpus :]
        environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        process = subprocess.Popen(
            [sys.executable, "-c", _GUARD + _TRAIN, _ROOT, str(parent_fd), *work.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[parent_fd],
            # Ctrl-C in a terminal reaches this process alone, which passes it on.
            process_group=0,
        )
        running = _Running(work, process, gpus, os.pidfd_open(process.pid))
        os.set_blocking(running.out, False)
        self._running.append(running)
        for fd in (running.out, running.pidfd):
            selector.register(fd, selectors.EVENT_READ, running)
        self._started(work.number)

    def _look(self, running: _Running, fd: int, selector: selectors.BaseSelector) -> None:
        is_open = self._read(running)
        if not is_open and running.out in selector.get_map():
            selector.unregister(running.out)
        if fd == running.pidfd:
            for one in (running.out, running.pidfd):
                if one in selector.get_map():
                    selector.unregister(one)
            self._close(running)

    def _read(self, running: _Running) -> bool:
        """Tell the lines that have come; whether more can."""
        while True:
            try:
                chunk = os.read(running.out, 1 << 16)
            except BlockingIOError:
                return True
            *lines, running.pending = (running.pending + chunk).split(b"\n")
            if not chunk and running.pending:
                lines, running.pending = [*lines, running.pending], b""
            for line in lines:
                self._said(running.work.number, line.decode(errors="replace"))
            if not chunk:
                return False

    def _close(self, running: _Running) -> None:
        code = running.process.wait()
        self.codes[running.work.number] = code if code >= 0 else 128 - code
        self._free = sorted([*self._free, *running.gpus])
        self._running.remove(running)
        os.close(running.pidfd)
        assert running.process.stdout is not None
        running.process.stdout.close()

    def _pass_on(self, numbers: bytes) -> None:
        for number in numbers:
            if number in SIGNALS:
                for running in self._running:
                    running.process.send_signal(number)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[int]:
        """A pipe whose end is this process's; what runs when the block is left early is killed."""
        parent_read, parent_write = os.pipe()
        try:
            yield parent_read
        finally:
            for running in [*self._running]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.process.pid, signal.SIGKILL)
                self._close(running)
            os.close(parent_read)
            os.close(parent_write)
