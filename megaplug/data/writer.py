"""Writes ``.bin``/``.idx`` with Megatron's own writer, in a process of its own.

Megatron's writer brings torch with it: seconds of import, half a gigabyte, and warnings meant for ranks. The
process that starts a run stays free of them, and the child ends when the files are written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import megaplug
from megaplug.job.facts import SPLITS

RAW = "tokens.raw"
PIECES = "pieces.npy"
_LOG = "writer.log"
_TELL_EVERY = 4_000_000  # bytes


def write_splits(folder: Path, dtype: str, advance: Callable[[int], None]) -> None:
    """Turns ``tokens.raw`` and ``pieces.npy`` into ``<split>.bin`` and ``.idx``, and removes both.

    Args:
        folder: Holds ``tokens.raw``, all ids end to end, and ``pieces.npy``, int64 ``[num_pieces, 3]``: the
            number of the split, first token in ``tokens.raw`` and number of tokens of each document to be.
        dtype: numpy's name for the type of the ids.
        advance: Is told numbers of bytes written.

    Raises:
        OSError: The disk refused.
        RuntimeError: The child failed otherwise; its output is in the message.
    """
    paths = [str(Path(megaplug.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", __name__, str(folder), dtype]
    log = folder / _LOG
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                word, _, number = line.partition(" ")
                if word == "errno":
                    raise OSError(int(number), os.strerror(int(number)))
                if word == "written":
                    advance(int(number))
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        tail = log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"writing the dataset ended with {child.returncode}:\n{tail}")
    for name in (RAW, PIECES, _LOG):
        (folder / name).unlink()


def _write(folder: Path, dtype_name: str) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = np.dtype(dtype_name)
    tokens = np.memmap(folder / RAW, dtype=dtype, mode="r")
    pieces = np.load(folder / PIECES)
    builders = {
        int(split): IndexedDatasetBuilder(str(folder / f"{SPLITS[split]}.bin"), dtype=dtype.type)
        for split in np.unique(pieces[:, 0])
    }
    untold = 0
    for split, start, length in pieces.tolist():
        builders[split].add_document(tokens[start : start + length], [length])
        untold += length * dtype.itemsize
        if untold >= _TELL_EVERY:
            print("written", untold, flush=True)
            untold = 0
    for split, builder in builders.items():
        builder.finalize(str(folder / f"{SPLITS[split]}.idx"))


def main(folder: str, dtype: str) -> int:
    """What the child does; tells its parent of the disk's refusals by number."""
    try:
        _write(Path(folder), dtype)
    except OSError as error:
        if not error.errno:
            raise
        print("errno", error.errno, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
