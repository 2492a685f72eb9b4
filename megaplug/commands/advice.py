"""After an out-of-memory: changes of the job that need less, each legal and estimated before it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megaplug.commands.resolved import Resolved, memory_of
from megaplug.errors import UserError
from megaplug.job.checks import check, job_shape, resolve_topology
from megaplug.job.schema import Job
from megaplug.plan.memory import GIB


@dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
        words: What to type.
        bytes_needed: Modelled: of the fullest rank on GPUs; of all ranks on CPUs, which share memory.
        fits: Whether it brings the need down as far as was asked.
        num_ranks: The ranks that ``bytes_needed`` is of.
    """

    words: str
    bytes_needed: int
    fits: bool = False
    num_ranks: int = 1

    def __str__(self) -> str:
        of = f", all {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"{self.words} ({size_text(self.bytes_needed)}{of})"


def size_text(num_bytes: float) -> str:
    """Bytes for a person: GiB, or MiB below a tenth of one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def advise(
    resolved: Resolved, at_most: float, limit: int = 3, *, max_ranks: int | None = None
) -> list[Advice]:
    """Changes that bring the modelled memory to a fraction of what it is, the mildest of each kind.

    Args:
        resolved: The job that ran out of memory.
        at_most: The fraction. Where fewer than ``limit`` changes reach it, those that come nearest follow.
        limit: How many.
        max_ranks: No change asks for more ranks than these and those that there were; None: any number.
    """
    most = None if max_ranks is None else max(max_ranks, resolved.topology.world_size)
    asked = _needed(resolved, resolved.job)
    assert asked is not None
    now, _ = asked
    enough: list[Advice] = []
    rest: list[Advice] = []
    for kind in _kinds(resolved):
        tried = [advice for changes in kind if (advice := _tried(resolved, changes, most)) is not None]
        smaller = [advice for advice in tried if advice.bytes_needed < 0.98 * now]
        fitting = [advice for advice in smaller if advice.bytes_needed <= at_most * now]
        enough += [dataclasses.replace(advice, fits=True) for advice in fitting[:1]]
        if not fitting and smaller:
            rest.append(min(smaller, key=lambda advice: advice.bytes_needed))
    return [*enough, *sorted(rest, key=lambda advice: advice.bytes_needed)][:limit]


def _kinds(resolved: Resolved) -> Iterator[list[dict[str, Any]]]:
    """Kinds of change, those that leave the result alone first; in each the mildest first."""
    job, topology = resolved.job, resolved.topology
    batch = job.train.micro_batch_size
    micro = [{"train.micro_batch_size": size} for size in range(batch - 1, 0, -1) if batch % size == 0]
    yield micro
    full = _full(job)
    if full:
        yield [full]
    if topology.dp * topology.cp > 1:
        yield [_shared(resolved, level) for level in range(job.topology.zero + 1, 4)]
    if resolved.derived.device == "cuda":
        for name in ("tp", "pp", "cp"):
            yield [changes for factor in (2, 4, 8) for changes in _finer(resolved, name, factor)]
        if not job.optimizer.optimizer_cpu_offload:
            yield [{"optimizer.optimizer_cpu_offload": True}]
    if micro and full:
        yield [one | full for one in micro]
    if job.precision.dtype == "fp32":
        yield [{"precision.bf16": True}]
    if resolved.derived.device == "cpu" and topology.dp > 1:
        fewer = [size for size in range(topology.dp - 1, 0, -1) if topology.dp % size == 0]
        yield [_sizes(resolved, dp=size) for size in fewer]


def _full(job: Job) -> dict[str, Any]:
    """Full recomputation; nothing where it is there already."""
    if job.train.recompute_granularity == "full":
        return {}
    changes: dict[str, Any] = {"train.recompute_granularity": "full"}
    return changes if job.train.recompute_modules is None else changes | {"train.recompute_modules": None}


def _shared(resolved: Resolved, level: int) -> dict[str, Any]:
    """More shared out among data-parallel ranks; torch's FSDP2 where there is no GPU for Megatron's."""
    changes: dict[str, Any] = {"topology.zero": level}
    by_torch = level >= 2 and resolved.derived.device == "cpu" and resolved.job.topology.fsdp != "torch"
    return changes | ({"topology.fsdp": "torch"} if by_torch else {})


def _finer(resolved: Resolved, name: str, factor: int) -> Iterator[dict[str, Any]]:
    """One dimension of the grid so many times as large: out of replicas, then with more ranks."""
    topology = resolved.topology
    size = factor * getattr(topology, name)
    if topology.dp % factor == 0:
        yield _sizes(resolved, **{name: size}, dp=topology.dp // factor)
    yield _sizes(resolved, **{name: size}, dp=topology.dp)


def _sizes(resolved: Resolved, **sizes: int) -> dict[str, Any]:
    """What sets sizes of the grid: the world follows from its parts; where it was given it has to."""
    asked = resolved.job.topology
    changes: dict[str, Any] = {
        f"topology.{name}": size for name, size in sizes.items() if size != getattr(asked, name)
    }
    if asked.dp is None and asked.world_size is None and sizes["dp"] == 1:
        del changes["topology.dp"]
    return changes | ({} if asked.world_size is None else {"topology.world_size": None})


def _tried(resolved: Resolved, changes: Mapping[str, Any], most: int | None) -> Advice | None:
    """A change with what it needs; None where it makes a job that cannot be, or asks for too many ranks."""
    job = resolved.job
    for key, value in changes.items():
        section, _, name = key.partition(".")
        job = dataclasses.replace(
            job, **{section: dataclasses.replace(getattr(job, section), **{name: value})}
        )
    if check(job, device=resolved.derived.device):
        return None
    if most is not None and resolve_topology(job).world_size > most:
        return None
    needed = _needed(resolved, job)
    if needed is None:
        return None
    num_bytes, num_ranks = needed
    return Advice(" ".join(map(_word, changes.items())), num_bytes, num_ranks=num_ranks)


def _word(change: tuple[str, Any]) -> str:
    key, value = change
    if key == "precision.bf16":
        return "precision=bf16"
    return f"{key}={'null' if value is None else str(value).lower()}"


def _needed(resolved: Resolved, job: Job) -> tuple[int, int] | None:
    """Modelled bytes, and of how many ranks they are."""
    try:
        topology = resolve_topology(job)
        memory = memory_of(job, topology, job_shape(job, resolved.derived.vocab_size))
    except UserError:
        return None  # the layers cannot be dealt out so
    num_ranks = topology.world_size if resolved.derived.device == "cpu" else 1
    return memory.total * num_ranks, num_ranks
