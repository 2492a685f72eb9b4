"""In which keys the jobs of several runs differ, read from their folders without building the jobs again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.job.schema import Job
from megaplug.runs.atomic import disk_errors

# What says where, how loudly or for how long a run goes on, and not what it computes.
_SILENT = ("name", "runs_dir", "resume", "model.name", "data.cache_dir", "train.stop_at")
_SILENT_SECTIONS = ("launch", "slurm", "logging", "watch", "alerts", "profile", "cluster")
_NOTHING = "-"


def read_keys(job_file: Path) -> dict[str, Any] | None:
    """Every key of a frozen job with its value, such as ``{"lr.lr": 1e-3}``; None where there is no file.

    A job of another version is read as well: what it holds is only shown.

    Raises:
        UserError: The file cannot be read, or is no frozen job.
    """
    import yaml

    # Several times as fast, where libyaml is.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with disk_errors(job_file, "read"):
        try:
            text = job_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
    try:
        content = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise UserError(f"{job_file} is not a frozen job: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("job"), dict):
        raise UserError(f"{job_file} is not a frozen job")
    return dict(_flat(content["job"], ""))


def keys_of(job: Job) -> dict[str, Any]:
    """Every key of a job that was composed, as `read_keys` gives those of a frozen one."""
    return dict(_flat(dataclasses.asdict(job), ""))


def differing(jobs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """The keys that do not have one value in all jobs, in the order in which jobs have them.

    Args:
        jobs: As `read_keys` gives them; those that are not known are passed over.
    """
    known = [job for job in jobs if job is not None]
    names = dict.fromkeys(key for job in known for key in job)
    return [key for key in names if len({shown(job.get(key)) for job in known}) > 1 and not _is_silent(key)]


def shown(value: Any) -> str:
    """A value as it is typed; nothing is ``-``."""
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return str(value)


def _flat(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _is_silent(key: str) -> bool:
    return key in _SILENT or key.partition(".")[0] in _SILENT_SECTIONS
