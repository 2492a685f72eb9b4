"""The frozen job of a rehearsal: as it would be frozen for a GPU, without data and without a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megaplug import __version__
from megaplug.errors import UserError
from megaplug.job.checks import check, resolve_topology
from megaplug.job.derive import derive
from megaplug.job.facts import DataFacts
from megaplug.job.freeze import FrozenJob, write_frozen
from megaplug.job.schema import Job, KernelsConfig
from megaplug.job.translate import megatron_arguments
from megaplug.runs.folder import RunFolder

# A text long enough for any job: nothing of it is read.
_TOKENS = 10**13


def rehearsed_job(job: Job) -> Job:
    """The job as it is rehearsed: on CUDA, with what torch alone brings.

    Raises:
        UserError: The vocabulary is not known.
    """
    if job.model.vocab_size is None:
        raise UserError(
            "a rehearsal needs model.vocab_size, which is null: it would follow from the tokenizer",
            hint="give model.vocab_size=<number of token ids>, such as model.vocab_size=128256",
        )
    return dataclasses.replace(
        job, device="cuda", backend="native", kernels=KernelsConfig(apex="off", te="off")
    )


def freeze(job: Job, path: Path) -> FrozenJob:
    """Write ``job.yaml`` into a folder.

    Args:
        job: As ``rehearsed_job`` gives it.
        path: An empty folder.

    Raises:
        UserError: All that is wrong with the job.
    """
    if problems := check(job, device="cuda"):
        raise UserError.from_problems(problems)
    topology = resolve_topology(job)
    facts = _facts(job.model.vocab_size or 0)
    derived = derive(job, topology, facts, device="cuda", backend="native")
    folder = RunFolder(path)
    frozen = FrozenJob(
        job=job,
        topology=topology,
        derived=derived,
        facts=facts,
        megatron_args=megatron_arguments(job, topology, derived, facts, folder),
        digest="rehearsal",
        model_fingerprint={},
        revision="",
        megaplug_version=__version__,
        folder=folder,
    )
    write_frozen(frozen)
    return frozen


def _facts(vocab_size: int) -> DataFacts:
    return DataFacts(
        fingerprint="",
        prefixes={},
        num_tokens={"train": _TOKENS, "valid": 0, "test": 0},
        num_documents={"train": 1, "valid": 0, "test": 0},
        vocab_size=vocab_size,
        unigram_loss=None,
        source="nothing",
        eod=0,
        tokenizer_fingerprint="",
        tokenizer_arguments=["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)],
    )
