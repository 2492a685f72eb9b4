"""``action=stop``: a run is told to save and end, and waited for."""

from __future__ import annotations

import os
import signal
import socket
import time

from megaplug.commands.actions import Answer
from megaplug.commands.runs_list import row_of
from megaplug.commands.runs_words import Asked
from megaplug.errors import UserError
from megaplug.runs.folder import RunFolder
from megaplug.runs.standing import Standing, lock_is_held, standing

_POLL_S = 0.1


def answer(asked: Asked) -> Answer:
    """Stop the run that is named."""
    folder = asked.run()
    stands = standing(folder)
    if stands.is_alive:
        _tell(folder, stands)
        while lock_is_held(folder.lock_file):
            time.sleep(_POLL_S)
    row = row_of(folder)
    state = row.stands.state
    saved = 0 if state is None else state.saved_iteration
    how = "" if stands.is_alive else "was not running: "
    text = f"{folder.name} {how}{row.stands.status} at step {row.iteration:,}, saved up to step {saved:,}"
    return Answer({"run": row.as_json([]), "was_running": stands.is_alive}, text)


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
        # The number is not another process's by now: the launcher itself still has the lock.
        if standing(folder).holder == holder:
            signal.pidfd_send_signal(launcher, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise UserError(f"process {holder.pid} is another user's", hint="ask them to stop it") from error
    finally:
        os.close(launcher)
