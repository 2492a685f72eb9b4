"""What lies behind an exception: a disk that takes nothing more, a helper process that has gone."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from traceback import FrameSummary

REFUSED_BY_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_SAID_BY_DISK = {os.strerror(number): number for number in REFUSED_BY_DISK}
# Torch writes its archives in C++, which does not pass on why it could not.
_ARCHIVE = re.compile(r"PytorchStreamWriter failed writing")
_GONE = (EOFError, ConnectionError)
_OF_HELPERS = re.compile(r"[/\\]multiprocessing[/\\](managers|connection|queues|process|synchronize)\.py$")
_OF_SAVING = re.compile(r"[/\\]megaplug[/\\]runtime[/\\]saving\.py$")
# How Megatron says that a process that was to write has left without a word.
_NO_ANSWER = "results_queue should not be empty"
HELPER_GONE = "a helper process of this rank has gone (killed, perhaps by the kernel for want of memory)"


def _chain(
    error: BaseException, frames: Sequence[FrameSummary] = ()
) -> Iterator[tuple[BaseException, list[str]]]:
    """An exception, what it came from, and what ranks have sent of theirs; each with the files on its way.

    What was sent has lost its traceback, which torch sends beside it.
    """
    seen: set[int] = set()
    left: list[tuple[BaseException | None, list[str]]] = [(error, _files(frames))]
    while left:
        found, files = left.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found, files + _files(traceback.extract_tb(found.__traceback__))
        left += [(found.__cause__, []), (found.__context__, [])]
        failures = getattr(found, "failures", None)
        if isinstance(failures, dict):
            left += [(sent, _files(beside)) for sent, beside in failures.values()]


def _files(frames: Sequence[FrameSummary]) -> list[str]:
    return [frame.filename for frame in frames]


def refused_by_disk(error: BaseException) -> str:
    """``no space left on /a/file`` and the like; empty where no disk is behind it.

    Args:
        error: As raised. What a forked process has passed on is text alone.
    """
    number, place = 0, ""
    for found, _ in _chain(error):
        if isinstance(found, OSError) and found.errno in REFUSED_BY_DISK:
            number = number or found.errno
            # What is written to an open file fails without its name.
            place = place or str(found.filename or "")
        for said, its_number in _SAID_BY_DISK.items():
            if said in str(found):
                number = number or its_number
                named = re.search(r"cannot [\w ]+? (/[^:\n]+): " + said, str(found))
                place = place or (named[1] if named else "")
    if number:
        return _refusal(number, place or "its disk")
    if any(_ARCHIVE.search(str(found)) for found, _ in _chain(error)):
        return "the disk did not take all of a checkpoint's file"
    return ""


def _refusal(number: int, place: str) -> str:
    if number == errno.EROFS:
        return f"{place} may not be written to (read-only file system)"
    return f"no space left on {place}" if number == errno.ENOSPC else f"the disk quota of {place} is used up"


def helper_gone(error: BaseException, frames: Sequence[FrameSummary] = ()) -> bool:
    """Whether a process of this rank's own has ended before its time: a queue's server, a writer.

    Args:
        error: As raised, or as another process has sent it.
        frames: What was sent beside it.
    """
    return any(
        HELPER_GONE in str(found)
        or _NO_ANSWER in str(found)
        or (isinstance(found, _GONE) and any(_OF_HELPERS.search(file) for file in files))
        for found, files in _chain(error, frames)
    )


def while_saving(error: BaseException) -> bool:
    """Whether it was raised on the way through a checkpoint being saved."""
    return any(_OF_SAVING.search(file) for _, files in _chain(error) for file in files)
