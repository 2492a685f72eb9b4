"""Which layers, of how many microbatches, a pipeline stage holds as a backward pass begins."""

from __future__ import annotations

from functools import lru_cache

from megaplug.plan.numbers import least, most
from megaplug.plan.workload import Workload
from megaplug.topology import ModelShape, Topology, layer_ids

Chunk = tuple[bool, ...]
"""The layers of one virtual stage, the first one first: whether each has experts."""


def chunks_of(workload: Workload, stage: int) -> tuple[Chunk, ...]:
    """The layers that a stage holds, by virtual stage.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    topology = workload.topology
    if topology.pipeline_layout is not None:
        has_experts = workload.shape.moe_layers
        layers = layer_ids(topology, workload.shape.num_layers, stage)
        return tuple(tuple(has_experts[layer] for layer in chunk) for chunk in layers)
    return _chunks(
        workload.shape,
        topology.pp,
        topology.vpp,
        topology.decoder_first_pipeline_num_layers,
        topology.decoder_last_pipeline_num_layers,
        topology.account_for_embedding_in_pipeline_split,
        topology.account_for_loss_in_pipeline_split,
        stage,
    )


@lru_cache(maxsize=4096)
def _chunks(
    shape: ModelShape,
    pp: int,
    vpp: int | None,
    first: int | None,
    last: int | None,
    embedding: bool,
    loss: bool,
    stage: int,
) -> tuple[Chunk, ...]:
    grid = Topology(1, pp, vpp, 1, 1, 1, 1, pp, False, first, last, embedding, loss)
    has_experts = shape.moe_layers
    return tuple(
        tuple(has_experts[layer] for layer in chunk) for chunk in layer_ids(grid, shape.num_layers, stage)
    )


def held_microbatches(workload: Workload, stage: int, backward: float = 1) -> list[float]:
    """Microbatches that each virtual stage holds as a backward pass begins.

    ``get_pp_rank_microbatches`` and ``get_schedule_table`` (``schedules.py``): p - r - 1 forward passes go
    before the first pair of a forward and a backward pass; interleaved 2 (p - r - 1) + (v - 1) p, which take
    the virtual stages by turns, p microbatches each; backward passes take them from the last to the first.

    Args:
        workload: The job.
        stage: Which pipeline stage, r.
        backward: Which of its backward passes, from 1, of all its virtual stages.
    """
    vpp, group = workload.topology.vpp or 1, workload.topology.pp
    in_flight = passes_in_flight(workload, stage, backward)
    if vpp == 1:
        return [in_flight]
    begun = _by_turns(in_flight + (backward - 1), vpp, group)
    ended = _by_turns(backward - 1, vpp, group)
    return [most(0, each - done) for each, done in zip(begun, reversed(ended), strict=True)]


def passes_in_flight(workload: Workload, stage: int, backward: float = 1) -> float:
    """Microbatches that all virtual stages hold together; see `held_microbatches`."""
    forward = least(
        warmup_passes(workload, stage) + backward, (workload.topology.vpp or 1) * workload.num_microbatches
    )
    return forward - (backward - 1)


def warmup_passes(workload: Workload, stage: int) -> float:
    """Forward passes before the first pair of a forward and a backward pass."""
    topology = workload.topology
    behind = topology.pp - stage - 1
    if topology.vpp is None:
        return least(behind, workload.num_microbatches)
    return least(2 * behind + (topology.vpp - 1) * topology.pp, topology.vpp * workload.num_microbatches)


def pairs_of_passes(workload: Workload, stage: int) -> float:
    """How often a forward and a backward pass go together."""
    return (workload.topology.vpp or 1) * workload.num_microbatches - warmup_passes(workload, stage)


def first_backward_of(workload: Workload, chunk: int) -> float:
    """The number of the backward pass that is the first one of a virtual stage."""
    vpp = workload.topology.vpp or 1
    return (vpp - 1 - chunk) * workload.topology.pp + 1


def _by_turns(passes: float, vpp: int, group: int) -> list[float]:
    """Of that many passes, how many each virtual stage gets, in the order of their turns."""
    rounds, rest = passes // (vpp * group), passes % (vpp * group)
    return [rounds * group + most(0, least(rest - turn * group, group)) for turn in range(vpp)]
