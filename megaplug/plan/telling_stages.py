"""The stages of a pipeline that tell which one is the fullest: a few, where there may be a hundred."""

from __future__ import annotations

from megaplug.plan.pipeline_memory import first_in_steady_state
from megaplug.topology import ModelShape, Topology, layer_ids


def stages_unlike(topology: Topology, shape: ModelShape) -> list[int]:
    """The first stage of each kind.

    Of stages that hold the same layers, with and without experts, in each of their chunks, and are alike in
    being the first or the last or neither, the earliest has the most microbatches in flight. Interleaved,
    stages of the later half may hold inputs on top of theirs (``pipeline_memory.py``), of an odd number of
    stages the middle one fewer than those behind it.

    Raises:
        UserError: The layers cannot be dealt out to the stages.
    """
    experts = shape.moe_layers
    kinds: dict[tuple[object, ...], int] = {}
    last = topology.pp - 1
    for stage in range(topology.pp):
        chunks = layer_ids(topology, shape.num_layers, stage)
        held = tuple(tuple(experts[layer] for layer in chunk) for chunk in chunks)
        first = first_in_steady_state(topology.pp, stage) if topology.vpp else 0
        half = (first > topology.pp) - (first < topology.pp)
        kinds.setdefault((held, stage == 0, stage == last, half), stage)
    return sorted(kinds.values())
