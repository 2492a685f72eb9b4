"""Runs rehearsals in a process of their own, since they change torch for the whole process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megaplug.errors import UserError
from megaplug.job.schema import Job
from megaplug.plan.rehearsal.frozen import freeze, rehearsed_job
from megaplug.plan.rehearsal.result import RankRehearsal

# A traceback's last lines, which name the fault.
_SHOWN_LINES = 14


def rehearse(job: Job, ranks: Sequence[int]) -> Iterator[RankRehearsal]:
    """Rehearse ranks of a job.

    Args:
        job: A job that can exist.
        ranks: Which of its ranks.

    Returns:
        Them in this order, each as soon as it is done.

    Raises:
        UserError: The job cannot be rehearsed, or a rank failed to.
    """
    yield from rehearse_all([(job, rank) for rank in ranks])


def rehearse_all(wanted: Sequence[tuple[Job, int]]) -> Iterator[RankRehearsal]:
    """As :func:`rehearse`, for ranks of several jobs: torch and Megatron are imported once."""
    with tempfile.TemporaryDirectory(prefix="megaplug-rehearsal-") as folder:
        words = [f"{_frozen(job, Path(folder, str(at)))}:{rank}" for at, (job, rank) in enumerate(wanted)]
        log = Path(folder, "log")
        command = [sys.executable, "-m", "megaplug.runtime.rehearsal", *words]
        pipe = subprocess.PIPE
        with (
            log.open("w") as said,
            subprocess.Popen(command, stdout=pipe, stderr=said, text=True, env=_environment()) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                yield RankRehearsal.from_dict(json.loads(line))
        if child.returncode:
            last = "\n".join(log.read_text().strip().splitlines()[-_SHOWN_LINES:])
            raise UserError(f"a rehearsal failed; its last words:\n{last}", exit_code=1)


def _frozen(job: Job, folder: Path) -> Path:
    folder.mkdir()
    return freeze(rehearsed_job(job), folder).folder.job_file


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    # A rehearsal computes nothing that threads could share.
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
