"""A job as it is run: resolved, checked, and written down once for every rank to read.

``job.yaml`` holds all of it; ``command.sh`` the equivalent plain Megatron-LM command for a person.
"""

from __future__ import annotations

import dataclasses
import subprocess
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaplug.errors import UserError
from megaplug.job.derive import Derived
from megaplug.job.facts import DataFacts
from megaplug.job.plain_command import command_script
from megaplug.job.schema import Job
from megaplug.job.typed import job_from_dict
from megaplug.runs.atomic import write_text_atomic
from megaplug.runs.folder import RunFolder
from megaplug.topology import Topology

FORMAT_VERSION = 1
_HEADER = "# The frozen job of this run, written at every start, read by the ranks. Not to be edited.\n"


@dataclass(frozen=True)
class FrozenJob:
    """What a rank needs to know.

    Attributes:
        job: Every key, with device and backend resolved.
        topology: The resolved rank grid.
        derived: Lengths, vocabulary, intervals.
        facts: The data.
        megatron_args: The words for Megatron's parser.
        digest: Eight digits for all that decides the result.
        model_fingerprint: The model as its weights know it.
        revision: The commit of the code that froze it, ``+changes`` if files differed; empty if unknown.
        megaplug_version: The version of this package.
        folder: The run's folder; where the file lies, not a part of it.
    """

    job: Job
    topology: Topology
    derived: Derived
    facts: DataFacts
    megatron_args: list[str]
    digest: str
    model_fingerprint: dict[str, Any]
    revision: str
    megaplug_version: str
    folder: RunFolder


def write_frozen(frozen: FrozenJob) -> None:
    """Write ``job.yaml`` and ``command.sh`` into the run's folder, each at once or not at all."""
    command = command_script(frozen.megatron_args, frozen.topology.world_size, frozen.folder.job_file)
    write_text_atomic(frozen.folder.command_file, command)
    write_text_atomic(frozen.folder.job_file, frozen_text(frozen))


def frozen_text(frozen: FrozenJob) -> str:
    """What ``job.yaml`` says of a job: all but where it lies."""
    import yaml

    content = {
        "format": FORMAT_VERSION,
        "megaplug": frozen.megaplug_version,
        "revision": frozen.revision,
        "digest": frozen.digest,
        "job": dataclasses.asdict(frozen.job),
        "topology": dataclasses.asdict(frozen.topology),
        "derived": dataclasses.asdict(frozen.derived),
        "data": dataclasses.asdict(frozen.facts),
        "model_fingerprint": frozen.model_fingerprint,
        "megatron_args": frozen.megatron_args,
    }
    return _HEADER + yaml.safe_dump(content, sort_keys=False, width=110)


def read_frozen(path: Path) -> FrozenJob:
    """Read a ``job.yaml``.

    Raises:
        UserError: The file is missing, is no frozen job, or was written by another format version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", exit_code=1) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a frozen job: {error}", exit_code=1) from error
    return frozen_from_text(text, path)


def frozen_from_text(text: str, path: Path) -> FrozenJob:
    """What `frozen_text` was given.

    Args:
        text: As it wrote it.
        path: The ``job.yaml`` in the run's folder; it need not exist.

    Raises:
        UserError: It is no frozen job, or was written by another format version.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not a frozen job: {str(error).splitlines()[0]}", exit_code=1) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{path} is not a frozen job of format {FORMAT_VERSION} (found {found})", exit_code=1)
    try:
        return FrozenJob(
            job=job_from_dict(content["job"]),
            topology=_from_dict(Topology, content["topology"]),
            derived=_from_dict(Derived, content["derived"]),
            facts=_from_dict(DataFacts, content["data"]),
            megatron_args=list(content["megatron_args"]),
            digest=content["digest"],
            model_fingerprint=content["model_fingerprint"],
            revision=content["revision"],
            megaplug_version=content["megaplug"],
            folder=RunFolder(path.resolve().parent),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a whole frozen job: {error}", exit_code=1) from error


def _from_dict[T](kind: type[T], values: dict[str, Any]) -> T:
    """Build a flat dataclass from plain values; lists become tuples where the field is one."""
    hints = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = {
        key: tuple(value) if isinstance(value, list) and typing.get_origin(hints[key]) is tuple else value
        for key, value in values.items()
        if key in known
    }
    return kind(**given)


def code_revision() -> str:
    """The commit this package is at; empty when it is not in a clone of its repository."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
