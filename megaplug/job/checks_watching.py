"""Whether what is to watch a run can be had: packages that receive its figures, and profilers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from megaplug import topology as meshes
from megaplug.errors import Problem
from megaplug.job.checks_alerts import alert_problems
from megaplug.job.schema import Job

# Top-level packages that a key needs, with what installs them.
_PACKAGES = {
    "logging.wandb_project": ("wandb", "pip install 'megaplug[wandb]'"),
    "logging.mlflow_tracking_uri": ("mlflow", "pip install 'megaplug[mlflow]'"),
}


def watching_problems(job: Job, device: str | None = None) -> list[Problem]:
    """Everything that would keep a run from being watched as asked.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda`` where it is known.
    """
    return [*_packages(job), *_profile(job, device), *alert_problems(job)]


def _packages(job: Job) -> Iterator[Problem]:
    asked = {
        "logging.wandb_project": job.logging.wandb_project,
        "logging.mlflow_tracking_uri": job.logging.mlflow_tracking_uri,
    }
    for key, value in asked.items():
        package, install = _PACKAGES[key]
        if value is not None and importlib.util.find_spec(package) is None:
            message = f"needs the package {package}, which is not installed"
            yield Problem(key, message, install, lacks=package)


def _profile(job: Job, device: str | None) -> Iterator[Problem]:
    profile = job.profile
    if profile.kind == "none":
        return
    if profile.kind == "nsys" and device == "cpu":
        yield Problem("profile", "nsys records a GPU, and the device is cpu", "use profile=true")
    if profile.kind == "nsys" and profile.repeat != 1:
        yield Problem("profile.repeat", "nsys writes one report", "leave it at 1, or use profile=true")
    if not profile.ranks:
        yield Problem("profile.ranks", "names no rank", "for example profile.ranks=[0]")
    left_out = profile.wait + (profile.warmup if profile.kind == "torch" else 0)
    if job.train.iters is not None and left_out >= job.train.iters:
        message = f"{left_out} steps are left out of a run of {job.train.iters}: nothing would be recorded"
        yield Problem("profile.wait", message, "make profile.wait smaller or train.iters larger")
    topology, _ = meshes.resolve(job.topology)
    if topology is None:
        return
    beyond = [rank for rank in profile.ranks if not 0 <= rank < topology.world_size]
    if beyond:
        last = topology.world_size - 1
        yield Problem("profile.ranks", f"{beyond} are no ranks of this job", f"its ranks are 0 to {last}")
