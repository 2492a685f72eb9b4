"""The signals that stop a job: the first lets it save, a Ctrl-C after it ends everything at once.

A scheduler repeats itself (SIGUSR2 before the time limit, SIGTERM at it), and what it repeats must not cut a
save short. Only a person presses Ctrl-C twice. A SIGINT that SLURM sends to all processes of a job is
one: every launcher and every rank hears it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
# What ends a rank that has nothing to save yet.
OF_RANKS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignals:
    """Signals arrive as bytes on a socket, so that one `select` waits for everything; restored afterwards.

    What is ignored stays ignored: nohup ignores SIGHUP, a shell's background job ignores SIGINT.

    Attributes:
        reader: Each signal is a byte here.
        heard: The first signal that came, also where it came too late to stop anything.
        insisted: Somebody has pressed Ctrl-C who had asked before, or after another signal.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self.insisted = False
        self._first: int | None = None
        self._is_waiting = False

    def __enter__(self) -> Self:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers: dict[int, Any] = {number: signal.signal(number, self._take) for number in heard}
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.reader.close()
        self._writer.close()

    def pending(self) -> signal.Signals | None:
        """The first signal that has come and that nobody has read yet; it stays there."""
        try:
            numbers = self.reader.recv(64, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        return next((signal.Signals(number) for number in numbers if number in SIGNALS), None)

    @property
    def asked(self) -> bool:
        """Whether somebody has asked the job to stop, here or anywhere."""
        return self._first is not None

    def ask(self, number: int, *, again: bool = False) -> None:
        """Note that a signal asks the job to stop.

        Args:
            number: It.
            again: Whether one had come before to where it came.
        """
        if number == signal.SIGINT and self.asked and (again or self._first != signal.SIGINT):
            self.insisted = True
        self._first = self._first or number

    def pass_on(self, number: int, *, again: bool = False) -> None:
        """Take a signal that was sent to another machine of the job.

        Args:
            number: It.
            again: Whether one had come to that machine before.
        """
        self.ask(number, again=again)
        with contextlib.suppress(BlockingIOError):  # of so many that wait already one more says nothing new
            self._writer.send(bytes([number]))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Here a second Ctrl-C raises KeyboardInterrupt, as where a terminal takes nothing more."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def _take(self, number: int, _: FrameType | None) -> None:
        self.ask(number, again=self.heard is not None)
        self.heard = self.heard or signal.Signals(number)
        if self.insisted and number == signal.SIGINT and self._is_waiting:
            raise KeyboardInterrupt
