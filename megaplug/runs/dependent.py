"""A child process ends with the one that started it, whatever ends that: the kernel kills it.

For helpers of a command that are all its own. Ranks, whose helpers outlive them, have `watchdog`.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; at once if it has ended already.

    Holds for this process alone: what it forks asks for itself. Signals that stop a command, which a terminal
    or SLURM sends to all of its processes, are left to the parent, which ends its children.

    Args:
        parent: The number of the process that started this one, as that knows it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
