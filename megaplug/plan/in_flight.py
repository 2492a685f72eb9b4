"""Which layers, of how many microbatches, a pipeline stage holds as its first backward pass begins."""

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


def held_microbatches(workload: Workload, stage: int) -> list[float]:
    """Microbatches that each virtual stage holds as the first backward pass begins.

    ``get_pp_rank_microbatches`` and ``get_schedule_table`` (``schedules.py``): p - r - 1 forward passes go
    before the first pair of a forward and a backward pass; interleaved 2 (p - r - 1) + (v - 1) p, which take
    the virtual stages by turns, p microbatches each.
    """
    topology, microbatches = workload.topology, workload.num_microbatches
    behind = topology.pp - stage - 1
    if topology.vpp is None:
        return [least(microbatches, behind + 1)]
    vpp, group = topology.vpp, topology.pp
    passes = least(2 * behind + (vpp - 1) * group + 1, vpp * microbatches)
    rounds, rest = passes // (vpp * group), passes % (vpp * group)
    return [rounds * group + most(0, least(rest - chunk * group, group)) for chunk in range(vpp)]
