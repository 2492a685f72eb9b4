"""Whether SLURM can be told what a job wants of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job

# What stands in a line that begins with #SBATCH: sbatch reads it, no shell does.
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/@+=%*()\[\]&|!-]+")
_TIME = re.compile(r"[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED|INFINITE")
_OPTION = re.compile(r"[a-z][a-z-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the script says itself, by other keys.
_OURS = {
    "job-name": "name", "output": "", "open-mode": "", "nodes": "launch.nnodes", "ntasks-per-node": "",
    "ntasks": "", "array": "", "partition": "slurm.partition", "account": "slurm.account", "qos": "slurm.qos",
    "time": "slurm.time", "gres": "slurm.gres", "cpus-per-task": "slurm.cpus_per_task", "mem": "slurm.mem",
    "exclusive": "slurm.exclusive", "signal": "slurm.signal_s", "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue", "dependency": "slurm.chain", "parsable": "", "wrap": "",
}  # fmt: skip


def slurm_problems(job: Job) -> Iterator[Problem]:
    """What is wrong with ``slurm``; asked of every job that is submitted."""
    if job.launch.kind != "slurm":
        return
    slurm = job.slurm
    for key in ("partition", "account", "qos", "gres", "mem"):
        value = getattr(slurm, key)
        if value is not None and not _PLAIN.fullmatch(value):
            yield Problem(f"slurm.{key}", f"cannot be {value!r}: an #SBATCH line has no room for it")
    if slurm.time is not None and not _TIME.fullmatch(slurm.time):
        yield Problem("slurm.time", f"is no time limit: {slurm.time!r}", "such as 30, 24:00:00 or 2-12:00:00")
    yield from _options(slurm.options)
    for name, value in slurm.environment.items():
        if not _VARIABLE.fullmatch(name):
            yield Problem("slurm.environment", f"{name!r} cannot be the name of a variable")
        elif "\0" in value:
            yield Problem(f"slurm.environment.{name}", "cannot hold a zero byte")
    if slurm.container == "none" and (slurm.image or slurm.mounts):
        key = "image" if slurm.image else "mounts"
        message = "means nothing without a container"
        yield Problem(f"slurm.{key}", message, "choose slurm.container=pyxis or apptainer")
    if slurm.container in ("pyxis", "apptainer") and not slurm.image:
        yield Problem("slurm.image", f"is needed for slurm.container={slurm.container}")
    if job.device == "auto" and job.cluster.device is None:
        message = "what the nodes compute on is not known here"
        yield Problem(
            "device", message, "say device=cuda or device=cpu, or name the cluster, as cluster=h100"
        )
    if job.device == "cuda" and job.launch.nnodes is None and job.cluster.gpus_per_node is None:
        message = "is not given, and how many GPUs a node has is not known"
        yield Problem(
            "launch.nnodes", message, "say one of them, as cluster.gpus_per_node=8, or name the cluster"
        )
    if job.launch.node_rank is not None:
        yield Problem("launch.node_rank", "is given by SLURM to each node", "leave it out")


def _options(options: dict[str, str]) -> Iterator[Problem]:
    for name, value in options.items():
        key = f"slurm.options.{name}"
        if not _OPTION.fullmatch(name):
            yield Problem(
                key, "is no option of sbatch", "by its long name, such as slurm.options.constraint=h100"
            )
        elif value and not _PLAIN.fullmatch(value):
            yield Problem(key, f"cannot be {value!r}: an #SBATCH line has no room for it")
        elif name in _OURS:
            hint = f"use {_OURS[name]}" if _OURS[name] else "change the script itself, and submit that"
            yield Problem(key, "stands in the script already", hint)
