"""``python -m megaplug.runtime.rehearsal JOB_YAML RANK...``: one JSON object a rank on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    """Rehearse the ranks one after the other, each in a fork of its own.

    Args:
        words: The file of the frozen job, and the numbers of the ranks.
    """
    from megaplug.job.freeze import read_frozen
    from megaplug.runtime import environment

    frozen = read_frozen(Path(words[0]))
    environment.prepare(frozen)
    with contextlib.redirect_stdout(sys.stderr):
        from megaplug.runtime.rehearsal import stage

        stage.prepare(frozen)
    for rank in (int(word) for word in words[1:]):
        if (child := os.fork()) == 0:
            with contextlib.redirect_stdout(sys.stderr):
                found = stage.rehearse(frozen, rank)
            print(json.dumps(found), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            return 1
    return 0


if __name__ == "__main__":
    # Before torch is imported: a rehearsal touches no GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main(sys.argv[1:]))
