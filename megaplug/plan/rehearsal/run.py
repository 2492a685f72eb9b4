"""Runs rehearsals in processes of their own, since they change torch for the whole process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megaplug.errors import UserError
from megaplug.job.schema import Job
from megaplug.plan.rehearsal.frozen import freeze, rehearsed_job
from megaplug.plan.rehearsal.result import RankRehearsal

# A traceback's last lines, which name the fault.
_SHOWN_LINES = 24


def rehearse(job: Job, ranks: Sequence[int]) -> list[RankRehearsal]:
    """Rehearse ranks of a job.

    Args:
        job: A job that can exist.
        ranks: Which of its ranks.

    Raises:
        UserError: The job cannot be rehearsed, or a rank failed to.
    """
    with tempfile.TemporaryDirectory(prefix="megaplug-rehearsal-") as folder:
        frozen = freeze(rehearsed_job(job), Path(folder))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "megaplug.runtime.rehearsal",
                str(frozen.folder.job_file),
                *map(str, ranks),
            ],
            capture_output=True,
            text=True,
            env=_environment(),
        )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-_SHOWN_LINES:])
        raise UserError(f"the rehearsal of ranks {list(ranks)} failed:\n{last}", exit_code=1)
    return [RankRehearsal.from_dict(json.loads(line)) for line in done.stdout.splitlines()]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    # A rehearsal computes nothing that threads could share.
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
