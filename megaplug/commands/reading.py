"""How far the reading of checkpoints is: gigabytes take seconds, in which nothing else would be seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaplug.data.progress import Progress, progress
from megaplug.runs.manifest import read_manifest


class Reading:
    """Takes what is read, of one checkpoint after the other, on any thread.

    Args:
        shown: What a person sees.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._lock = threading.Lock()
        self._current: Path | None = None

    def begin(self, checkpoint: Path, about: str = "", times: int = 1) -> None:
        """A checkpoint is read next.

        Args:
            checkpoint: Its folder.
            about: What is done with it, where it is not only read.
            times: How often its bytes are counted.
        """
        self._current = checkpoint
        self._shown.stage(f"{checkpoint}{about}", times * bytes_of(checkpoint))

    def tell(self, checkpoint: Path, num_bytes: int) -> None:
        """So many bytes more of a checkpoint have been read."""
        with self._lock:
            if checkpoint != self._current:
                self.begin(checkpoint)
            self._shown.advance(num_bytes)


def bytes_of(checkpoint: Path) -> int:
    """What a checkpoint's manifest says that its files hold; 0 where it has none."""
    manifest = read_manifest(checkpoint) if checkpoint.is_dir() else None
    return 0 if manifest is None else sum(entry["size"] for entry in manifest["files"].values())


@contextmanager
def reading(talks: bool) -> Iterator[Reading]:
    """What shows a bar on a terminal, elsewhere a line when it takes two seconds, or nothing."""
    with progress(None if talks else False, "reading") as shown:
        yield Reading(shown)
