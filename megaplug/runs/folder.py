"""The folders of a run: ``<runs_dir>/<name>-<digest>``, then ``-2``, ``-3``, ...; the newest one resumes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megaplug.errors import UserError
from megaplug.runs.atomic import disk_errors


@dataclass(frozen=True)
class RunFolder:
    """The names in a run's folder. Nothing is made by naming it.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's own name: ``<name>-<digest>[-N]``."""
        return self.path.name

    @property
    def job_file(self) -> Path:
        """The frozen job."""
        return self.path / "job.yaml"

    @property
    def command_file(self) -> Path:
        """The equivalent plain Megatron-LM command."""
        return self.path / "command.sh"

    @property
    def kernels_file(self) -> Path:
        """Which kernels run: written by rank 0 once model and optimizer are built."""
        return self.path / "kernels.json"

    @property
    def state_file(self) -> Path:
        """What has happened, see `megaplug.runs.state`."""
        return self.path / "state.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON line a step, see `megaplug.runs.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        """One JSON line for each start, failure, restart and end, see `megaplug.runs.history`."""
        return self.path / "events.jsonl"

    @property
    def loss_curve(self) -> Path:
        """The picture of the loss."""
        return self.path / "loss.png"

    @property
    def expert_map(self) -> Path:
        """The picture of how evenly experts are used; only where there are some."""
        return self.path / "experts.png"

    @property
    def profile(self) -> Path:
        """Traces of profiled steps."""
        return self.path / "profile"

    @property
    def logs(self) -> Path:
        """Megatron's own output, one file a rank."""
        return self.path / "logs"

    def log_file(self, rank: int) -> Path:
        """What rank ``rank`` has written to its stdout and stderr."""
        return self.logs / f"rank{rank}.log"

    def stack_file(self, rank: int) -> Path:
        """Where rank ``rank`` stood when the run was found to hang."""
        return self.logs / f"rank{rank}.stack"

    @property
    def index_cache(self) -> Path:
        """Megatron's indices of the data: which sample comes when."""
        return self.path / "index_cache"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Megatron's ``--save`` and ``--load`` folder."""
        return self.path / "checkpoints"

    @property
    def batch_script(self) -> Path:
        """What SLURM is given."""
        return self.path / "job.sbatch"

    @property
    def submitted_file(self) -> Path:
        """Which jobs it has made of it, see `megaplug.runs.submitted`."""
        return self.path / "slurm.json"

    def ended_file(self, job: str) -> Path:
        """There where a person has ended a job of its, so that it does not queue itself again."""
        return self.path / f"ended-{job}"

    @property
    def nodes_key(self) -> Path:
        """What the launchers of a job on several machines prove to each other; for its owner alone."""
        return self.path / "nodes.key"

    @property
    def lock_file(self) -> Path:
        """See `megaplug.runs.lock`."""
        return self.path / "lock"


def _stem(name: str, digest: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"name: {name!r} cannot be a folder's name",
            hint="use letters, digits, '.', '_' and '-', and begin with a letter or digit",
        )
    return f"{name}-{digest}"


def _numbers(runs_dir: Path, stem: str) -> list[int]:
    """The numbers N of the folders of this stem that exist, ascending; the plain name counts as 1."""
    pattern = re.compile(re.escape(stem) + r"(?:-([1-9][0-9]*))?")
    if not runs_dir.is_dir():
        return []
    with disk_errors(runs_dir, "list"):
        matches = [pattern.fullmatch(entry.name) for entry in runs_dir.iterdir() if entry.is_dir()]
    return sorted(int(match[1] or 1) for match in matches if match)


def _numbered(runs_dir: Path, stem: str, number: int) -> RunFolder:
    return RunFolder(runs_dir / (stem if number == 1 else f"{stem}-{number}"))


def find_latest(runs_dir: Path, name: str, digest: str) -> RunFolder | None:
    """The newest folder of a run, or None where there is none."""
    stem = _stem(name, digest)
    numbers = _numbers(runs_dir, stem)
    return _numbered(runs_dir, stem, numbers[-1]) if numbers else None


def open_first(runs_dir: Path, name: str, digest: str) -> RunFolder:
    """The first folder of a run, made if nobody has: two launchers at once get the same, and one its lock.

    Raises:
        UserError: If the folder cannot be made.
    """
    folder = _numbered(runs_dir, _stem(name, digest), 1)
    with disk_errors(runs_dir, "make a run's folder in"):
        folder.logs.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
    return folder


def create_next(runs_dir: Path, name: str, digest: str) -> RunFolder:
    """Make the next folder of a run, never one that exists, and leave the older ones as they are.

    Raises:
        UserError: If the folder cannot be made.
    """
    stem = _stem(name, digest)
    with disk_errors(runs_dir, "make a run's folder in"):
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = _numbers(runs_dir, stem)
            folder = _numbered(runs_dir, stem, numbers[-1] + 1 if numbers else 1)
            try:
                folder.path.mkdir()
            except FileExistsError:
                if not folder.path.is_dir():  # a file has the name: no number would ever come free
                    raise
                continue  # another launcher was faster
            folder.logs.mkdir()
            folder.checkpoints.mkdir()
            return folder
