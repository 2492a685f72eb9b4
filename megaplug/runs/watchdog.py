"""Ranks do not outlive their supervisor: a thread that ends the process group when the supervisor is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from megaplug.runs.events import PARENT_FD


def start(parent_fd: int | None) -> threading.Thread | None:
    """Watch a pipe whose write end only the supervisor holds; when it closes, kill the whole process group.

    The group is killed, not this process alone, since Megatron forks managers that outlive a rank. Where this
    process still is in its parent's group (started by hand, or forked by a test) only this process is killed:
    the group would be somebody else's.

    Args:
        parent_fd: Read end of the pipe; None where there is no supervisor, and then nothing is watched.

    Returns:
        The daemon thread.
    """
    if parent_fd is None:
        return None
    owns_group = os.getpgrp() == os.getpid() or os.getpgrp() != os.getpgid(os.getppid())
    thread = threading.Thread(target=_watch, args=(parent_fd, owns_group), name="watchdog", daemon=True)
    thread.start()
    return thread


def start_from_environment() -> threading.Thread | None:
    """As `start`, with the pipe that the supervisor has named in the environment."""
    fd = os.environ.get(PARENT_FD)
    return start(int(fd) if fd else None)


def _watch(parent_fd: int, owns_group: bool) -> None:
    while os.read(parent_fd, 1):
        pass  # nobody writes to it; only its end counts
    if owns_group:
        os.killpg(os.getpgrp(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """``<parent fd> <command>``: run a shell's command in this process group, and end as `start` does."""
    start(int(sys.argv[1]))
    sys.exit(subprocess.run(["/bin/sh", "-c", sys.argv[2]]).returncode % 256)
