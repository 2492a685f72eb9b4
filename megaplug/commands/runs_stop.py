"""``action=stop``: a run is told to save and end, and waited for."""

from __future__ import annotations

import os
import select
import signal
import socket
from pathlib import Path

from megaplug.commands.actions import Answer
from megaplug.commands.runs_list import row_of
from megaplug.commands.runs_queue import Queue, queues_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.launchers import slurm
from megaplug.runs.folder import RunFolder
from megaplug.runs.standing import Standing, standing, wait_until_free
from megaplug.runs.submitted import forget_ended, mark_ended


def answer(asked: Asked) -> Answer:
    """Stop the run that is named."""
    folder = asked.run()
    stands = standing(folder)
    (queue,) = queues_of([folder])
    if queue:
        mark_ended(folder, queue)
        slurm.end(queue)
    elif stands.is_alive:
        _tell(folder, stands)
    wait_until_free(folder.lock_file)
    if queue:
        _see_out(folder, queue)
    row = row_of(folder)
    state = row.stands.state
    saved = 0 if state is None else state.saved_iteration
    how = "" if stands.is_alive else "was only queued: " if queue else "was not running: "
    text = f"{folder.name} {how}{row.stands.status} at step {row.iteration:,}, saved up to step {saved:,}"
    return Answer({"run": row.as_json([]), "was_running": stands.is_alive}, text)


def _see_out(folder: RunFolder, queue: Queue) -> None:
    """Cancel jobs that are still there though no process of the run lives: one that has not started any yet.

    Nobody was there to hear a signal, and nothing is to be saved.

    Raises:
        UserError: SLURM does not answer, refuses, or keeps one.
    """
    if left := _not_ending(folder):
        slurm.cancel(left)
        wait_until_free(folder.lock_file)
        if left := _not_ending(folder):
            listed = ", ".join(f"{job} {state}" for job, state in left.items())
            raise UserError(f"SLURM has cancelled jobs that are still there: {listed}", exit_code=1)
    forget_ended(folder, queue)


def _not_ending(folder: RunFolder) -> Queue:
    """The jobs of a run that may still start something."""
    (queue,) = queues_of([folder])
    return {job: state for job, state in queue.items() if not state.startswith("COMPLETING")}


def _tell(folder: RunFolder, stands: Standing) -> None:
    """Send SIGTERM to its launcher.

    Raises:
        UserError: It is not here, not known, or somebody else's.
    """
    holder = stands.holder
    if holder is None:
        raise UserError(f"it is not known which process runs {folder.name}", hint="try again in a second")
    if holder.host != socket.gethostname():
        message = f"{folder.name} runs on {holder.host}, and this is {socket.gethostname()}"
        raise UserError(message, hint=f"stop it there: ssh {holder.host} kill {holder.pid}")
    try:
        launcher = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return  # it has gone, and its ranks end by themselves
    try:
        # The number may be a stranger's by now, while ranks have the lock. Should it change hands after this,
        # the signal reaches nobody: the descriptor stays that of the process that was opened.
        if _has_open(holder.pid, folder.lock_file):
            signal.pidfd_send_signal(launcher, signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError):
        return
    except PermissionError as error:
        if _has_ended(launcher):
            return  # nothing can be seen of it any more
        raise UserError(f"process {holder.pid} is another user's", hint="ask them to stop it") from error
    finally:
        os.close(launcher)


def _has_open(pid: int, file: Path) -> bool:
    """Whether a process has a file open.

    Raises:
        FileNotFoundError, ProcessLookupError: It has ended.
        PermissionError: It is another user's, or has ended and was not yet waited for.
    """
    wanted = file.stat()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.path.samestat(link.stat(), wanted):
                return True
        except FileNotFoundError:
            continue  # closed since it was listed
    return False


def _has_ended(process: int) -> bool:
    return bool(select.select([process], [], [], 0)[0])
