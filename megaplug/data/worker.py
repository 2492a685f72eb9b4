"""The child process of `megaplug.data.crew`: reads tasks, a line each, and writes what comes of them.

It tells ``["read", bytes]`` now and then, and at the end of each task ``["done", result]``,
``["error", ...]`` for a mistake of the user's, or ``["errno", number]`` where the disk refused.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megaplug.data.tasks import Desk
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig
from megaplug.runs.dependent import end_with

_TELL_EVERY = 500_000  # bytes


class _Told:
    """Adds up small numbers of bytes before they are told."""

    def __init__(self) -> None:
        self._untold = 0

    def __call__(self, num_bytes: int) -> None:
        self._untold += num_bytes
        if self._untold >= _TELL_EVERY:
            self.flush()

    def flush(self) -> None:
        if self._untold:
            _say("read", self._untold)
        self._untold = 0


def _say(word: str, value: Any) -> None:
    print(json.dumps([word, value]), flush=True)


def main(number: int, parent: int) -> int:
    """Works until there is nothing more to read."""
    end_with(parent)
    desk = Desk(number, TokenizerConfig(**json.loads(sys.stdin.readline())))
    told = _Told()
    for line in sys.stdin:
        try:
            result = desk.do(json.loads(line), told)
            told.flush()
            _say("done", result)
        except UserError as error:
            _say("error", {"message": error.message, "hint": error.hint})
        except OSError as error:
            if not error.errno:
                raise
            _say("errno", error.errno)
    desk.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
