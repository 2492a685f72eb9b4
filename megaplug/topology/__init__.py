"""The rank algebra of Megatron-core 0.19: which meshes exist, who sits where, what is nearest. No torch."""

from __future__ import annotations

from megaplug.topology.groups import (
    GROUPS,
    coordinates,
    group_of,
    group_size,
    groups_of,
    members_in_node,
    node_of,
    rank_groups,
    stays_in_node,
)
from megaplug.topology.mesh import LaidOutTopology, Topology, TopologyRequest, resolve
from megaplug.topology.nearest import nearest_legal, overrides
from megaplug.topology.rules import violations
from megaplug.topology.shape import Batch, ModelShape
from megaplug.topology.smallest import smallest_world
from megaplug.topology.stages import layer_ids

__all__ = [
    "GROUPS",
    "Batch",
    "LaidOutTopology",
    "ModelShape",
    "Topology",
    "TopologyRequest",
    "coordinates",
    "group_of",
    "group_size",
    "groups_of",
    "layer_ids",
    "members_in_node",
    "nearest_legal",
    "node_of",
    "overrides",
    "rank_groups",
    "resolve",
    "smallest_world",
    "stays_in_node",
    "violations",
]
