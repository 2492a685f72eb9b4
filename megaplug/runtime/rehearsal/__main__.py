"""``python -m megaplug.runtime.rehearsal JOB_YAML:RANK...``: a JSON object for each on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    """Rehearse ranks, each in a fork of its own and as many at a time as there are cores.

    Args:
        words: The file of a frozen job and the number of a rank, joined by a colon.

    Returns:
        0; 1 if a rank failed, whose traceback is on standard error.
    """
    with contextlib.redirect_stdout(sys.stderr):
        # Once for all of them: it takes longer than a small rehearsal.
        from megaplug.runtime.rehearsal import stage

        stage.prepare()
    at_once = len(os.sched_getaffinity(0))
    running: dict[int, str] = {}
    waiting, done = list(words), set[str]()
    for word in words:
        while word not in done:
            while waiting and len(running) < at_once:
                next_word = waiting.pop(0)
                running[_start(next_word)] = next_word
            pid, status = os.wait()
            last = running.pop(pid)
            done.add(last)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                print(_file(last, "log").read_text(errors="replace"), file=sys.stderr)
                print(f"megaplug: rank {last.rpartition(':')[2]} could not be rehearsed", file=sys.stderr)
                return 1
        print(_file(word, "json").read_text(), flush=True)
    return 0


def _file(word: str, kind: str) -> Path:
    """What a rank finds (``json``) and says (``log``), beside its job."""
    file, _, rank = word.rpartition(":")
    return Path(file).with_name(f"rank_{rank}.{kind}")


def _start(word: str) -> int:
    if pid := os.fork():
        return pid
    with _file(word, "log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    _file(word, "json").write_text(json.dumps(_rehearse(word)))
    # Nothing of the process that it was forked from is to be closed.
    os._exit(0)


def _rehearse(word: str) -> dict[str, object]:
    from megaplug.job.freeze import read_frozen
    from megaplug.runtime import environment, loudness
    from megaplug.runtime.rehearsal import stage

    file, _, rank = word.rpartition(":")
    frozen = read_frozen(Path(file))
    loudness.set_level(frozen.job.logging.level)
    environment.prepare(frozen)
    return stage.rehearse(frozen, int(rank))


if __name__ == "__main__":
    # Before torch is imported: a rehearsal touches no GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main(sys.argv[1:]))
