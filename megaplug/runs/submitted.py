"""``slurm.json``: the jobs of a scheduler's that were submitted for a run, and what was typed to do so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors, write_json_atomic, write_text_atomic
from megaplug.runs.folder import RunFolder


@dataclass(frozen=True)
class Submitted:
    """What was submitted last.

    Attributes:
        jobs: Their numbers, as SLURM has given them: of an array ``<job>_<task>``.
        time: ISO 8601, UTC.
        program: The command without its words.
        overrides: Its words.
        config_dir: The folder that was laid beside ``conf/``; None where none was.
        config_name: The primary configuration.
    """

    jobs: tuple[str, ...]
    time: str
    program: str
    overrides: tuple[str, ...]
    config_dir: str | None
    config_name: str


def write_submitted(folder: RunFolder, submitted: Submitted) -> None:
    """Keep it in the run's folder; what was said of jobs before has lost its meaning."""
    with disk_errors(folder.path, "write in"):
        for mark in folder.path.glob(folder.ended_file("*").name):
            mark.unlink(missing_ok=True)
    write_json_atomic(folder.submitted_file, asdict(submitted))


def read_submitted(folder: RunFolder) -> Submitted | None:
    """What was submitted last; None where nothing was.

    Raises:
        UserError: The file cannot be read, or is none of this version's.
    """
    with disk_errors(folder.submitted_file, "read"):
        try:
            text = folder.submitted_file.read_text(errors="replace")
        except FileNotFoundError:
            return None
    try:
        content: dict[str, Any] = json.loads(text)
        return Submitted(**content | {key: tuple(content[key]) for key in ("jobs", "overrides")})
    except (ValueError, TypeError, KeyError) as error:
        message = f"{folder.submitted_file} does not say which jobs were submitted"
        raise UserError(message, hint="remove it once squeue shows none of them") from error


def mark_ended(folder: RunFolder, jobs: Iterable[str]) -> None:
    """Leave word that jobs are to end for good, whatever signal ends them."""
    for job in jobs:
        write_text_atomic(folder.ended_file(job), "action=stop\n")


def forget_ended(folder: RunFolder, jobs: Iterable[str]) -> None:
    """Take that back, since they are gone."""
    with disk_errors(folder.path, "write in"):
        for job in jobs:
            folder.ended_file(job).unlink(missing_ok=True)
