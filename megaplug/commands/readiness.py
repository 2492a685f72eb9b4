"""A run's folder, made ready for its ranks: checkpoints looked at, metrics cut back, the job frozen."""

from __future__ import annotations

import os
from pathlib import Path

import megaplug
from megaplug.commands.resolved import Resolved
from megaplug.errors import UserError
from megaplug.job.freeze import FrozenJob, code_revision, write_frozen
from megaplug.job.load import Source
from megaplug.job.schema import Job
from megaplug.job.translate import megatron_arguments
from megaplug.launchers.heap import keeping_freed_memory
from megaplug.runs import checkpoints, metrics
from megaplug.runs.atomic import remove_unfinished
from megaplug.runs.checkpoints import RepairReport
from megaplug.runs.folder import RunFolder, create_next, find_latest, open_first


def open_folder(resolved: Resolved) -> RunFolder:
    """The newest folder of this run, or a new one where there is none or ``resume=false`` asks for one."""
    place = Path(resolved.job.runs_dir), resolved.job.name, resolved.digest
    if not resolved.job.resume:
        return create_next(*place)
    return find_latest(*place) or open_first(*place)


def make_ready(resolved: Resolved, folder: RunFolder, report: RepairReport | None = None) -> None:
    """Bring a run's folder into the state from which its ranks can start; its lock must be held.

    Args:
        resolved: The job.
        folder: Its folder.
        report: What was found of its checkpoints; they are looked at where it is not given.

    Raises:
        UserError: It would start from scratch, though it began with another run's checkpoint.
    """
    report = report or checkpoints.repair(folder.checkpoints)
    if report.newest is None and resolved.source is None and resolved.job.load is not None:
        message = (
            f"{folder.path} has no whole checkpoint any more, and began with that of load={resolved.job.load}"
        )
        raise UserError(message, hint="started again, it begins with that one", exit_code=1)
    iteration = report.newest.iteration if report.newest is not None else 0
    for place in (folder.path, folder.tensorboard, folder.index_cache):
        remove_unfinished(place)
    # What was measured beyond the checkpoint will be measured again.
    metrics.cut_metrics(folder.metrics_file, iteration)
    samples = iteration * resolved.job.train.global_batch_size
    metrics.cut_tensorboard(folder.tensorboard, iteration, samples, _validations_kept(resolved, iteration))
    _freeze(resolved, folder, resuming=report.newest is not None)


def _validations_kept(resolved: Resolved, iteration: int) -> int | None:
    """Validations of a run's last step that the interval has asked for; the one at its end comes again."""
    derived = resolved.derived
    if iteration < derived.iters:
        return None
    return int(derived.eval_iters > 0 and iteration % derived.eval_interval == 0)


def repair_notes(report: RepairReport, source: Source | None) -> list[str]:
    """What a person is told of checkpoints that are not whole.

    Args:
        report: What was found.
        source: What the run begins with where it has no checkpoint of its own.
    """
    notes = [
        f"checkpoint {aside.iteration} is not whole ({aside.faults[0]}): now at {aside.path}"
        for aside in report.set_aside
    ]
    if report.set_aside and report.newest is None:
        number = len(report.set_aside)
        none = (
            "the only checkpoint is not whole"
            if number == 1
            else f"none of the {number} checkpoints is whole"
        )
        begins = "THE BEGINNING" if source is None else f"{source.checkpoint.path}, as at its first start"
        place = report.set_aside[0].path.parent
        notes += [
            f"ATTENTION: {none}: the run STARTS FROM {begins}; damaged, but kept: {place}",
            "    to go on from a whole copy instead: end the run, and load=COPY load_state=all",
        ]
    notes += [f"deleted, set aside by an earlier start: {path}" for path in report.forgotten]
    return [*notes, *(f"the save of step {step} was never completed; removed" for step in report.unfinished)]


def first_iteration(resolved: Resolved, report: RepairReport) -> int:
    """Where the run begins: at its own newest checkpoint, or at the whole state that it takes over."""
    if report.newest is not None:
        return report.newest.iteration
    source = resolved.source
    return source.checkpoint.iteration if source is not None and not source.weights_only else 0


def rank_environment(job: Job, folder: RunFolder) -> dict[str, str]:
    """What the ranks of a job, whose device is resolved, need beyond this process's environment."""
    # The package as it is here, installed or not.
    root = str(Path(megaplug.__file__).resolve().parent.parent)
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        # A tokenizer is a local folder; a rank never asks a hub for it.
        "HF_HUB_OFFLINE": "1",
    }
    if job.logging.wandb_project is not None:
        # A run that is continued is continued there, too.
        environment |= {"WANDB_RUN_ID": folder.name, "WANDB_RESUME": "allow"}
    if job.device == "cpu":
        # On a machine with GPUs, a job for the CPU must not see them.
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment |= keeping_freed_memory(os.environ)
    return environment


def _freeze(resolved: Resolved, folder: RunFolder, *, resuming: bool) -> None:
    if resolved.source is not None and not resuming:
        resolved.source.stage(folder)
    arguments = megatron_arguments(
        resolved.job,
        resolved.topology,
        resolved.derived,
        resolved.facts,
        folder,
        source=resolved.source,
        resuming=resuming,
    )
    write_frozen(
        FrozenJob(
            job=resolved.job,
            topology=resolved.topology,
            derived=resolved.derived,
            facts=resolved.facts,
            megatron_args=arguments,
            digest=resolved.digest,
            model_fingerprint=resolved.fingerprint,
            revision=code_revision(),
            megaplug_version=megaplug.__version__,
            folder=folder,
        )
    )
