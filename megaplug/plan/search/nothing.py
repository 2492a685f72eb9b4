"""Why a search found nothing, and what would work."""

from __future__ import annotations

import dataclasses

from megaplug.errors import UserError
from megaplug.plan.cluster import Cluster
from megaplug.plan.search.answer import Answer
from megaplug.plan.search.grids import legal
from megaplug.plan.search.space import Space
from megaplug.plan.search.text import layout, recompute, unit
from megaplug.plan.search.would_fit import longest_sequence, smallest_world
from megaplug.plan.units import gib, percent
from megaplug.plan.workload import Workload


def error_of(
    answer: Answer, asked: Space, template: Workload, cluster: Cluster, *, inherited: str = ""
) -> UserError:
    """What to say where no configuration is legal, or none fits.

    Args:
        answer: What was found.
        asked: What was searched, before the rest of the job limited it: what its person has chosen.
        template: The job.
        cluster: The machines.
        inherited: What sets the length of the sequences where nobody typed it, such as ``model=llama3_8b``.
    """
    kept, space = _kept(asked), answer.space
    if answer.num_legal == 0:
        return _none_legal(space, kept)
    return _none_fits(answer, space, kept, template, cluster, inherited)


def _none_legal(space: Space, kept: str) -> UserError:
    with_kept = f" with {kept}" if kept else ""
    message = (
        f"no topology of {space.world_size:,} ranks is legal for this model and a global batch of "
        f"{space.global_batch_size:,}{with_kept}"
    )
    hints = []
    near = [size for size in (_nearest(space, -1), _nearest(space, 1)) if size is not None]
    if near:
        hints.append(
            "numbers of ranks that work: " + ", ".join(f"topology.world_size={size}" for size in near)
        )
    if kept and legal(dataclasses.replace(space, fixed={}, layout=None, sequence_parallel=None)).families:
        hints.append(f"leave out some of {kept}")
    if not hints:
        hints.append("another train.global_batch_size, which microbatch x data-parallel ranks must divide")
    return UserError(message, hint="; or ".join(hints))


def _nearest(space: Space, step: int, tries: int = 64) -> int | None:
    """The next world size up or down that something is legal on."""
    plain = dataclasses.replace(space, micro_batches=space.micro_batches[:1])
    for size in range(space.world_size + step, space.world_size + step * (tries + 1), step):
        if size >= 1 and legal(dataclasses.replace(plain, world_size=size)).families:
            return size
    return None


def _none_fits(
    answer: Answer, space: Space, kept: str, template: Workload, cluster: Cluster, inherited: str
) -> UserError:
    assert answer.least is not None
    row, usable = answer.least, cluster.usable_memory
    memory, found = row.memory, row.workload
    with_kept = f" with {kept}" if kept else ""
    message = (
        f"none of {answer.num_legal:,} legal configurations fits {space.world_size:,} {unit(cluster)} of "
        f"{cluster.name}{with_kept}: the smallest, {layout(found)} with microbatches of "
        f"{found.batch.micro_batch_size} and {recompute(found.recompute)} computed again, needs "
        f"{gib(memory.total)} GiB on each rank of stage {memory.stage}, and {gib(usable)} GiB are there "
        "(modelled)"
    )
    hints = []
    wider = smallest_world(space, template, cluster)
    if wider is not None:
        size = wider[0].topology.world_size
        hints.append(f"topology.world_size={size} is the first doubling that works: {_needs(*wider)}")
    state = memory.weights + memory.gradients + memory.optimizer
    shorter = longest_sequence(space, template, cluster) if state <= usable else None
    if shorter is not None:
        length = space.shape.seq_length
        message += (
            f"; {percent(1 - state / memory.total)} of it come with the sequences of {length:,} tokens"
            f"{f', which {inherited} sets' if inherited else ''}"
        )
        hints.insert(0, f"model.seq_length={shorter[0].shape.seq_length} fits: {_needs(*shorter)}")
    if not hints:
        hints.append(
            f"up to {64 * space.world_size:,} {unit(cluster)} do not help with a global batch of "
            f"{space.global_batch_size:,} sequences; cluster={cluster.name} has too little memory"
        )
    elif kept:
        hints.append(f"leave out some of {kept}")
    return UserError(message, hint="; or ".join(hints))


def _needs(workload: Workload, memory: float) -> str:
    return f"{layout(workload)} needs {gib(memory)} GiB"


def _kept(space: Space) -> str:
    """What its person has chosen, as typed."""
    words = [
        f"topology.{key}={'null' if key == 'vpp' and not size else size}" for key, size in space.fixed.items()
    ]
    if space.layout is not None:
        words.append("the given layers of the first and last stage")
    if space.sequence_parallel is not None:
        words.append(f"topology.sequence_parallel={str(space.sequence_parallel).lower()}")
    return " ".join(words)
