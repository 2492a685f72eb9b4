"""What follows from a job once its topology and its data are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megaplug.job.checks import job_shape
from megaplug.job.overlap import decide
from megaplug.job.packages import resolve_backend, why_not_taken
from megaplug.job.saving import async_strategy
from megaplug.job.schema import Job

if TYPE_CHECKING:
    from megaplug.job.facts import DataFacts
    from megaplug.topology import Topology

# Steps between two checkpoints where nothing is said: a tenth of the run, within these.
_SAVE_INTERVALS = (50, 500)


@dataclass(frozen=True)
class Derived:
    """Figures that nobody needs to give.

    Attributes:
        iters: Optimizer steps of the whole run.
        tokens: Tokens that it trains on, ``iters * tokens_per_iter``.
        epochs: Passes over the training text that this makes.
        tokens_per_iter: Tokens of one step over all ranks.
        vocab_size: Vocabulary of the model before padding.
        padded_vocab_size: Rows of the embedding: padded, see ``ModelShape.padded_vocab_size``.
        save_interval: Steps between two checkpoints.
        eval_interval: Steps between two validations.
        eval_iters: Batches in one validation; 0 without a validation split.
        backend: ``native`` or ``te``.
        device: ``cpu`` or ``cuda``.
        apex: Whether Megatron takes Apex's kernels.
        te: Whether Megatron takes Transformer Engine's kernels; its layers are the backend ``te``.
        overlap: For each kind of overlap ``on``, or why it is off.
        async_strategy: Who saves while training goes on, ``mcore`` or ``nvrx``; empty: training waits.
    """

    iters: int
    tokens: int
    epochs: float
    tokens_per_iter: int
    vocab_size: int
    padded_vocab_size: int
    save_interval: int
    eval_interval: int
    eval_iters: int
    backend: str = "native"
    device: str = "cpu"
    apex: bool = False
    te: bool = False
    overlap: dict[str, str] = field(default_factory=dict)
    async_strategy: str = ""


def derive(
    job: Job, topology: Topology, facts: DataFacts, *, device: str = "cpu", backend: str | None = None
) -> Derived:
    """Work out lengths, vocabulary and intervals.

    Args:
        job: A job that passed its checks.
        topology: Its resolved rank grid.
        facts: What is known about its data.
        device: ``cpu`` or ``cuda``, as resolved for this machine.
        backend: ``native`` or ``te``; resolved from the job and the device when not given.
    """
    tokens_per_iter = job.train.global_batch_size * job.model.seq_length
    train_tokens = facts.num_tokens["train"]
    iters = num_iters(job, train_tokens)
    vocab_size = job.model.vocab_size or facts.vocab_size
    backend = backend or resolve_backend(job.backend, device, job.kernels.te)
    return Derived(
        iters=iters,
        tokens=iters * tokens_per_iter,
        epochs=iters * tokens_per_iter / train_tokens,
        tokens_per_iter=tokens_per_iter,
        vocab_size=vocab_size,
        padded_vocab_size=job_shape(job, vocab_size).padded_vocab_size(topology.tp),
        save_interval=save_interval_of(job, iters),
        eval_interval=job.train.eval_interval,
        eval_iters=job.train.eval_iters if facts.parts("valid") else 0,
        backend=backend,
        device=device,
        apex=not why_not_taken("apex", job.kernels.apex, device),
        te=not why_not_taken("te", job.kernels.te, device),
        overlap=decide(job, topology, backend=backend, device=device),
        async_strategy=async_strategy(job, device),
    )


def num_iters(job: Job, train_tokens: int) -> int:
    """Steps of the run from whichever of ``train.iters``, ``train.tokens`` and ``train.epochs`` is given.

    Args:
        job: Exactly one of the three is set.
        train_tokens: Tokens of the training text.
    """
    tokens_per_iter = job.train.global_batch_size * job.model.seq_length
    if job.train.iters is not None:
        return job.train.iters
    if job.train.tokens is not None:
        return math.ceil(job.train.tokens / tokens_per_iter)
    assert job.train.epochs is not None, "checks ask for exactly one of iters, tokens and epochs"
    return max(1, math.ceil(job.train.epochs * train_tokens / tokens_per_iter))


def save_interval_of(job: Job, iters: int) -> int:
    """Steps between two checkpoints of a run of so many steps."""
    return job.checkpoint.save_interval or _save_interval(iters)


def _save_interval(iters: int) -> int:
    smallest, largest = _SAVE_INTERVALS
    return min(largest, max(smallest, math.ceil(iters / 10)))


def resolve_device(requested: str, num_gpus: int) -> str:
    """``cpu`` or ``cuda``: ``auto`` means cuda where this machine has a GPU."""
    if requested != "auto":
        return requested
    return "cuda" if num_gpus > 0 else "cpu"
