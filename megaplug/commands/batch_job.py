"""The batch script of a run, or of all runs of a sweep: what of the keys stands in which line of it."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import megaplug
from megaplug.commands.cli import CommandLine
from megaplug.commands.resolved import Resolved
from megaplug.errors import UserError
from megaplug.job.checks import resolve_topology
from megaplug.job.freeze import code_revision
from megaplug.job.schema import Job
from megaplug.launchers.batch_script import rendered, template_file
from megaplug.runs.folder import RunFolder

_NEVER_IN_A_PATH = '"\\\n\0'
# Where the launchers of a job meet: jobs that share a node have ports of their own.
_PORT = "$((20000 + SLURM_JOB_ID % 20000))"
_FIRST_NODE = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


@dataclass(frozen=True)
class Prepared:
    """A run that can be queued.

    Attributes:
        resolved: Its job.
        folder: Its folder, in which that is frozen.
        command: What was typed, or would be for this run alone.
    """

    resolved: Resolved
    folder: RunFolder
    command: CommandLine

    @property
    def ranks_of_a_node(self) -> int:
        """How many ranks each node runs."""
        return self.resolved.topology.world_size // (self.resolved.job.launch.nnodes or 1)

    @property
    def kind(self) -> tuple[object, ...]:
        """What has to be the same for runs to be one array."""
        return self.resolved.job.launch.nnodes, self.ranks_of_a_node, self.resolved.derived.device


def on_nodes(job: Job) -> Job:
    """The job with the device and the number of nodes that it asks SLURM for.

    Raises:
        UserError: Its rank grid is not possible.
    """
    device = job.cluster.device if job.device == "auto" and job.cluster.device else job.device
    job = dataclasses.replace(job, device=device)
    if job.launch.nnodes is not None or device == "auto" or job.topology.auto:
        return job
    world_size = resolve_topology(job).world_size
    per_node = world_size if device == "cpu" else job.cluster.gpus_per_node
    # Where it is not known, the checks say so.
    nnodes = None if per_node is None else -(-world_size // per_node)
    launch = dataclasses.replace(job.launch, nnodes=nnodes)
    return dataclasses.replace(job, launch=launch)


def script_of(runs: Sequence[Prepared], file: Path) -> str:
    """The batch script of one run, or an array's of several of one kind.

    Args:
        runs: They.
        file: Where the script will be; logs go beside it.

    Raises:
        UserError: A folder has a name that cannot stand in one.
    """
    first, is_array = runs[0], len(runs) > 1
    job, place = first.resolved.job, file.resolve().parent
    config, folders = job.slurm, [run.folder.path.resolve() for run in runs]
    for path in (*folders, place, Path.cwd()):
        if strange := [character for character in _NEVER_IN_A_PATH if character in str(path)]:
            raise UserError(f"a batch script cannot name {str(path)!r}: it has {strange[0]!r} in it")
    # The next of a chain goes on by itself.
    is_queued_again = config.requeue and config.chain == 1
    on_gpus = first.resolved.derived.device == "cuda"
    gres = config.gres or (f"gpu:{first.ranks_of_a_node}" if on_gpus else None)
    name = f"sweep-{place.name}" if is_array else first.folder.name
    at_once = f"%{job.launch.at_once}" if job.launch.at_once else ""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    title = f"{name}: written by megaplug {megaplug.__version__} {code_revision()[:12]}, {now}"
    address, port = job.launch.master_addr, job.launch.master_port
    return rendered(
        template_file().read_text(),
        {
            "title": " ".join(title.split()),
            "file": shlex.quote(str(file.resolve())),
            "name": name,
            "output": f'"{str(place).replace("%", "%%")}/slurm-{"%A_%a" if is_array else "%j"}.log"',
            "nodes": str(job.launch.nnodes),
            "array": f"0-{len(runs) - 1}{at_once}" if is_array else None,
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "time": config.time,
            "gres": None if gres == "none" else gres,
            "cpus_per_task": None if config.cpus_per_task is None else str(config.cpus_per_task),
            "mem": config.mem,
            "exclusive": "--exclusive" if config.exclusive else None,
            "signal_s": str(config.signal_s),
            "requeue": "--requeue" if is_queued_again else "--no-requeue",
            "options": [
                f"--{name}={value}" if value else f"--{name}" for name, value in config.options.items()
            ],
            "folder": _folder_line(folders),
            "cwd": shlex.quote(str(Path.cwd())),
            "modules": shlex.join(config.modules),
            "setup": config.setup and shlex.quote(str(Path(config.setup).expanduser().absolute())),
            "environment": [f"{name}={shlex.quote(value)}" for name, value in config.environment.items()],
            "master_addr": _FIRST_NODE if address is None else shlex.quote(address),
            "master_port": _PORT if port is None else str(port),
            "again": '"$folder/requeue-$SLURM_JOB_ID"' if is_queued_again else None,
            "srun_options": _srun_options(job, folders),
            "within": _within(job, folders),
            "train": shlex.join([config.python or sys.executable, *_program()]),
        },
    )


def _folder_line(folders: Sequence[Path]) -> str:
    if len(folders) == 1:
        return f"folder={shlex.quote(str(folders[0]))}"
    listed = "".join(f"    {shlex.quote(str(folder))}\n" for folder in folders)
    return f"folders=(\n{listed})\nfolder=${{folders[$SLURM_ARRAY_TASK_ID]}}"


def _mounts(job: Job, folders: Sequence[Path]) -> list[str]:
    """What a container has to see: the runs, the working folder, this package, and what the user names."""
    root = Path(megaplug.__file__).resolve().parent.parent
    own = dict.fromkeys([*(str(folder.parent) for folder in folders), str(Path.cwd()), str(root)])
    return [*(f"{path}:{path}" for path in own), *job.slurm.mounts]


def _srun_options(job: Job, folders: Sequence[Path]) -> str:
    if job.slurm.container != "pyxis":
        return ""
    mounts = ",".join(_mounts(job, folders))
    return shlex.join([f"--container-image={job.slurm.image}", f"--container-mounts={mounts}"])


def _within(job: Job, folders: Sequence[Path]) -> str:
    if job.slurm.container != "apptainer":
        return ""
    gpus = [] if job.device == "cpu" else ["--nv"]
    binds = [word for mount in _mounts(job, folders) for word in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", *gpus, *binds, str(job.slurm.image)])


def _program() -> list[str]:
    """What was called, so that another machine can call it from another folder."""
    path = Path(sys.argv[0])
    found = path if path.suffix == ".py" else Path(shutil.which(path.name) or path)
    return [str(found.resolve())]
