"""The rank algebra of Megatron-core 0.19: which meshes exist, who sits where, what is nearest. No torch."""

from __future__ import annotations

from megaplug.topology.mesh import Topology, TopologyRequest, coordinates, rank_groups, resolve
from megaplug.topology.nearest import nearest_legal, overrides
from megaplug.topology.rules import violations
from megaplug.topology.shape import Batch, ModelShape
from megaplug.topology.stages import layer_ids

__all__ = [
    "Batch",
    "ModelShape",
    "Topology",
    "TopologyRequest",
    "coordinates",
    "layer_ids",
    "nearest_legal",
    "overrides",
    "rank_groups",
    "resolve",
    "violations",
]
