"""Where what lay on the device at a peak was made: a view to understand a rehearsal with.

A rehearsal takes a few times longer with it (``benchmarks/rehearse_random.py --only N --origins 30``).
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megaplug.runtime.rehearsal.book import Book

# Files whose frames say nothing of who asked for memory.
_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_SHOWN_FRAMES = 3


@dataclass
class _Life:
    """Of one storage, or of one filling of it, in changes of the book since it was opened."""

    nbytes: int
    origin: str
    born: int
    died: int | None = None


class OriginBook(Book):
    """A book that remembers who made each storage, and so can say what was there at the peak."""

    def __init__(self) -> None:
        self._lives: dict[int, _Life] = {}
        self._ended: list[_Life] = []
        self._changes = 0
        self._peak_change = 0
        super().__init__()

    def start_peak(self) -> None:
        """As the book's; whatever ended before is of no more interest."""
        super().start_peak()
        self._peak_change = self._changes
        self._ended = [life for life in self._ended if life.died == self._changes]

    def _changed(self, key: int, exact: int, in_blocks: int, category: str) -> None:
        self._changes += 1
        life = self._lives.pop(key, None)
        if life is not None:
            life.died = self._changes
            self._ended.append(life)
        nbytes = exact + (life.nbytes if life else 0)
        if nbytes:
            self._lives[key] = _Life(nbytes, f"{category:11} {origin()}", self._changes)
        super()._changed(key, exact, in_blocks, category)

    def _alive_at_peak(self) -> Counter[tuple[str, int]]:
        """How many storages of each origin and size were there."""
        at = self._peak_change
        lives = [*self._lives.values(), *self._ended]
        return Counter(
            (life.origin, life.nbytes)
            for life in lives
            if life.born <= at and (life.died is None or life.died > at)
        )

    def origins(self) -> list[str]:
        """A line each: how many, MiB in all, bytes of one, who made them; the largest first."""
        found = sorted(self._alive_at_peak().items(), key=lambda item: -item[0][1] * item[1])
        return [
            f"{count:4} {count * nbytes / 2**20:9.2f} MiB {nbytes:12} {origin}"
            for (origin, nbytes), count in found
        ]


def origin() -> str:
    """The step of autograd that runs, if one does, and the frames of Megatron and of ours nearest to it."""
    current: Any = torch._C
    node = current._current_autograd_node()
    frames: list[str] = [node.name()] if node is not None else []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(frames) < _SHOWN_FRAMES + (node is not None):
        file = frame.f_code.co_filename
        if not file.startswith((_OURS, _TORCH)):
            frames.append(f"{Path(file).stem}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(frames)
