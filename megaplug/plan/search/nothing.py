"""Why a search found nothing, and what would work."""

from __future__ import annotations

import dataclasses

from megaplug.errors import UserError
from megaplug.plan.cluster import Cluster
from megaplug.plan.search.answer import Answer, smallest_that_fits
from megaplug.plan.search.grids import legal
from megaplug.plan.search.space import Space
from megaplug.plan.search.text import layout, recompute
from megaplug.plan.workload import Workload

GIB = 1024**3


def error_of(answer: Answer, space: Space, asked: Space, template: Workload, cluster: Cluster) -> UserError:
    """What to say where no configuration is legal, or none fits.

    Args:
        answer: What was found.
        space: What was searched.
        asked: The same before the rest of the job limited it: what its person has chosen.
        template: The job.
        cluster: The machines.
    """
    kept = _kept(asked)
    if answer.num_legal == 0:
        return _none_legal(space, kept)
    return _none_fits(answer, space, kept, template, cluster)


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


def _none_fits(answer: Answer, space: Space, kept: str, template: Workload, cluster: Cluster) -> UserError:
    assert answer.least is not None
    row, usable = answer.least, cluster.usable_memory / GIB
    memory = row.memory
    unit = "GPUs" if cluster.device == "cuda" else "cores"
    with_kept = f" with {kept}" if kept else ""
    message = (
        f"none of {answer.num_legal:,} legal configurations fits {space.world_size:,} {unit} of "
        f"{cluster.name}{with_kept}: the smallest, {layout(row)} with microbatches of "
        f"{row.workload.batch.micro_batch_size} and {recompute(row.workload.recompute)} computed again, "
        f"needs {memory.total / GIB:,.1f} GiB on each rank of stage {memory.stage}, and {usable:.1f} GiB are "
        "there (modelled)"
    )
    wider = smallest_that_fits(space, template, cluster)
    if wider is None:
        batch = space.global_batch_size
        hint = (
            f"up to {64 * space.world_size:,} {unit} do not help with a global batch of {batch:,} sequences"
        )
        return UserError(message, hint=f"{hint}; cluster={cluster.name} has too little memory for this job")
    size, found = wider
    hint = (
        f"topology.world_size={size} is the first doubling that works: {layout(found)} needs "
        f"{found.memory.total / GIB:,.1f} GiB"
    )
    if kept:
        hint += f"; or leave out some of {kept}"
    return UserError(message, hint=hint)


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
