"""``launch=slurm``: check and freeze the job here, write its batch script, and have SLURM queue it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

import megaplug
from megaplug.commands.cli import CommandLine
from megaplug.commands.readiness import first_iteration, make_ready, open_folder, repair_notes
from megaplug.commands.resolved import Resolved, resolve
from megaplug.commands.run import nothing_to_do
from megaplug.errors import UserError
from megaplug.job.checks import resolve_topology
from megaplug.job.freeze import code_revision
from megaplug.job.schema import Job
from megaplug.launchers import slurm
from megaplug.launchers.batch_script import rendered, template_file
from megaplug.plan.cluster import AUTO, cluster_of
from megaplug.runs import checkpoints
from megaplug.runs.atomic import write_text_atomic
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock
from megaplug.runs.submitted import Submitted, read_submitted, write_submitted

_NEVER_IN_A_PATH = '"\\\n\0'
# Where the launchers of a job meet: jobs that share a node have ports of their own.
_PORT = "$((20000 + SLURM_JOB_ID % 20000))"
_FIRST_NODE = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def submit(job: Job, command: CommandLine) -> int:
    """Queue a run, or what is left of it.

    Raises:
        UserError: What is wrong with the job, all at once; a job of this run is in the queue already; SLURM
            refuses it.
    """
    resolved = resolve(_on_nodes(job), on_this_machine=False)
    if resolved.source is not None:
        # Whatever that run saves until this one is started.
        pinned = dataclasses.replace(resolved.job, load=str(resolved.source.checkpoint.path.resolve()))
        resolved = dataclasses.replace(resolved, job=pinned)
    folder = open_folder(resolved)
    with RunLock.acquire(folder, command.typed()):
        _refuse_twice(folder, job)
        report = checkpoints.repair(folder.checkpoints)
        for note in repair_notes(report, resolved.source):
            print(note, file=sys.stderr)
        if nothing_to_do(resolved, folder, first_iteration(resolved, report), command):
            return 0
        make_ready(resolved, folder, report)
        write_text_atomic(folder.batch_script, script_of(resolved, folder, command))
        jobs = _queue(resolved.job, folder, command) if job.launch.submit else []
    _say(resolved, folder, jobs)
    return 0


def _on_nodes(job: Job) -> Job:
    """The job with the device and the number of nodes that it asks SLURM for."""
    device = job.cluster.device if job.device == "auto" and job.cluster.device else job.device
    job = dataclasses.replace(job, device=device)
    if job.launch.nnodes is not None or device == "auto":
        return job
    world_size = resolve_topology(job).world_size if not job.topology.auto else 1
    per_node = world_size if device == "cpu" else _gpus_of_a_node(job)
    launch = dataclasses.replace(job.launch, nnodes=-(-world_size // per_node))
    return dataclasses.replace(job, launch=launch)


def _gpus_of_a_node(job: Job) -> int:
    named = job.cluster.name != AUTO
    return job.cluster.gpus_per_node or (cluster_of(job.cluster).gpus_per_node if named else 8)


def _refuse_twice(folder: RunFolder, job: Job) -> None:
    submitted = read_submitted(folder)
    if submitted is None or not job.launch.submit:
        return
    waiting = slurm.queued(submitted.jobs)
    if waiting:
        listed = ", ".join(f"{number} {state}" for number, state in waiting.items())
        raise UserError(
            f"this run is in the queue already: job {listed}",
            hint=f"wait for it, or take it out: scancel {' '.join(waiting)}",
        )


def script_of(resolved: Resolved, folder: RunFolder, command: CommandLine) -> str:
    """The batch script of a run.

    Raises:
        UserError: The run's folder or the working folder has a name that cannot stand in one.
    """
    job, place = resolved.job, folder.path.resolve()
    config, per_node = job.slurm, resolved.topology.world_size // (job.launch.nnodes or 1)
    for path in (place, Path.cwd()):
        if strange := [character for character in _NEVER_IN_A_PATH if character in str(path)]:
            raise UserError(f"a batch script cannot name {str(path)!r}: it has {strange[0]!r} in it")
    # The next of a chain goes on by itself.
    is_queued_again = config.requeue and config.chain == 1
    gres = config.gres or (f"gpu:{per_node}" if resolved.derived.device == "cuda" else None)
    revision = code_revision()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    title = f"{folder.name}: written by megaplug {megaplug.__version__} {revision[:12]}, {now}"
    ours = ("launch.submit", "launch.nnodes", "launch.master_addr", "launch.master_port")
    words = [word for word in command.overrides if word.startswith("launch.")]
    return rendered(
        template_file().read_text(),
        {
            "title": " ".join(title.split()),
            "file": shlex.quote(str(folder.batch_script.resolve())),
            "name": folder.name,
            "output": '"' + str(place).replace("%", "%%") + '/slurm-%j.log"',
            "nodes": str(job.launch.nnodes),
            "array": None,
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
            "again": '"$folder/requeue-$SLURM_JOB_ID"' if is_queued_again else None,
            "options": [
                f"--{name}={value}" if value else f"--{name}" for name, value in config.options.items()
            ],
            "folder": f"folder={shlex.quote(str(place))}",
            "cwd": shlex.quote(str(Path.cwd())),
            "modules": shlex.join(config.modules),
            "setup": None
            if config.setup is None
            else shlex.quote(str(Path(config.setup).expanduser().absolute())),
            "environment": [f"{name}={shlex.quote(value)}" for name, value in config.environment.items()],
            "master_addr": _FIRST_NODE
            if job.launch.master_addr is None
            else shlex.quote(job.launch.master_addr),
            "master_port": _PORT if job.launch.master_port is None else str(job.launch.master_port),
            "srun_options": _srun_options(job, place),
            "within": _within(job, place),
            "train": shlex.join([config.python or sys.executable, *_program()]),
            "words": shlex.join([word for word in words if word.partition("=")[0] not in ours]),
        },
    )


def _mounts(job: Job, place: Path) -> list[str]:
    """What a container has to see: the run, the working folder, this package, and what the user names."""
    root = Path(megaplug.__file__).resolve().parent.parent
    own = dict.fromkeys([str(place.parent), str(Path.cwd()), str(root)])
    return [*(f"{path}:{path}" for path in own), *job.slurm.mounts]


def _srun_options(job: Job, place: Path) -> str:
    if job.slurm.container != "pyxis":
        return ""
    mounts = ",".join(_mounts(job, place))
    return shlex.join([f"--container-image={job.slurm.image}", f"--container-mounts={mounts}"])


def _within(job: Job, place: Path) -> str:
    if job.slurm.container != "apptainer":
        return ""
    gpus = [] if job.device == "cpu" else ["--nv"]
    binds = [word for mount in _mounts(job, place) for word in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", *gpus, *binds, str(job.slurm.image)])


def _program() -> list[str]:
    """What was called, so that another machine can call it from another folder."""
    path = Path(sys.argv[0])
    found = path if path.suffix == ".py" else Path(shutil.which(path.name) or path)
    return [str(found.resolve())]


def _queue(job: Job, folder: RunFolder, command: CommandLine) -> list[str]:
    """Submit the script, as often as the chain is long; what is in the queue is kept at once."""
    jobs: list[str] = []
    for _ in range(job.slurm.chain):
        behind = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(slurm.submit(folder.batch_script, behind))
        write_submitted(
            folder,
            Submitted(
                jobs=tuple(jobs),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                program=command.program,
                overrides=tuple(command.overrides),
                config_dir=None
                if command.source.extra_dir is None
                else str(command.source.extra_dir.resolve()),
                config_name=command.source.name,
            ),
        )
    return jobs


def _say(resolved: Resolved, folder: RunFolder, jobs: list[str]) -> None:
    script = str(folder.batch_script)
    if resolved.job.launch.output == "json":
        said = {"event": "submitted" if jobs else "written", "folder": str(folder.path), "script": script}
        print(json.dumps({**said, "jobs": jobs}), flush=True)
        return
    nodes = resolved.job.launch.nnodes
    per_node = resolved.topology.world_size // (nodes or 1)
    print(f"  run      {folder.path}")
    print(f"  script   {script}: {nodes} x {per_node} rank{'s' if per_node != 1 else ''}")
    if jobs:
        print(f"  job      {', then '.join(jobs)}; squeue --jobs={','.join(jobs)}")
        print(f"  log      {folder.path}/slurm-{jobs[0]}.log")
    else:
        print(f"  next     sbatch {shlex.quote(script)}")
