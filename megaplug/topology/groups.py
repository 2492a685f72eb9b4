"""Who sits where: the coordinates of a rank, its process groups, and the nodes that they lie on.

``rank_groups`` lists every group of the world. The others work with sizes and strides: they cost as much as
the one group that is asked for, or nothing that grows with the world.
"""

from __future__ import annotations

from megaplug.topology.mesh import Topology

GROUPS = ("tp", "cp", "dp", "pp", "tp_cp", "dp_cp", "tp_pp", "etp", "ep", "expert_dp", "etp_ep")
"""The process groups by name: seven of the attention mesh, then four of the expert mesh."""

_EXPERT_GROUPS = ("etp", "ep", "expert_dp", "etp_ep")


def coordinates(topology: Topology, rank: int) -> dict[str, int]:
    """Where a rank sits on both grids: ``tp cp dp pp`` and ``etp ep expert_dp``.

    Raises:
        ValueError: If the world has no such rank.
    """
    _require(topology, rank)
    found: dict[str, int] = {}
    for sizes in (topology.dense_sizes, topology.expert_sizes):
        rest = rank
        for name, size in sizes.items():
            rest, found[name] = divmod(rest, size)
    return found


def rank_groups(topology: Topology) -> dict[str, list[list[int]]]:
    """All process groups, in Megatron's order of groups and of ranks inside a group.

    Returns:
        For each of `GROUPS` the list of its groups.
    """
    return {name: _all_groups(topology, name) for name in GROUPS}


def group_size(topology: Topology, name: str) -> int:
    """How many ranks a group of this name (one of `GROUPS`) has."""
    size = 1
    for length, _ in _axes(topology, name):
        size *= length
    return size


def group_of(topology: Topology, name: str, rank: int) -> list[int]:
    """The ranks of the one group of this name that a rank is in, in Megatron's order.

    Raises:
        ValueError: If the world has no such rank.
    """
    _require(topology, rank)
    axes = _axes(topology, name)
    start = rank - sum(rank // stride % size * stride for size, stride in axes)
    return [start + offset for offset in _offsets(axes)]


def groups_of(topology: Topology, rank: int) -> dict[str, list[int]]:
    """The ranks of every group that a rank is in, under the names of `GROUPS`.

    Raises:
        ValueError: If the world has no such rank.
    """
    return {name: group_of(topology, name, rank) for name in GROUPS}


def node_of(rank: int, gpus_per_node: int) -> int:
    """The node of a rank: ranks fill one node after the other."""
    return rank // gpus_per_node


def stays_in_node(topology: Topology, name: str, gpus_per_node: int) -> bool:
    """Whether no group of this name leaves its node.

    A group of slowest stride s and size n there spans blocks of n x s ranks: none is cut exactly if a node
    holds whole blocks, or the whole world.
    """
    axes = _axes(topology, name)
    if not axes or topology.world_size <= gpus_per_node:
        return True
    size, stride = axes[-1]
    return gpus_per_node % (size * stride) == 0


def members_in_node(topology: Topology, name: str, gpus_per_node: int) -> int:
    """How many ranks of one group of this name share a node: those of rank 0's group on node 0."""
    return _below(_axes(topology, name), gpus_per_node)


def _require(topology: Topology, rank: int) -> None:
    if not 0 <= rank < topology.world_size:
        raise ValueError(f"rank {rank} is not in a world of {topology.world_size}")


def _axes(topology: Topology, name: str) -> list[tuple[int, int]]:
    """Size and stride of each dimension above 1 that a group varies in, fastest first."""
    if name not in GROUPS:
        raise KeyError(f"no process group {name!r}: {', '.join(GROUPS)}")
    is_expert = name in _EXPERT_GROUPS
    inside = ["expert_dp"] if name == "expert_dp" else name.split("_")
    axes, stride = [], 1
    for key, size in (topology.expert_sizes if is_expert else topology.dense_sizes).items():
        if key in inside and size > 1:
            axes.append((size, stride))
        stride *= size
    return axes


def _offsets(axes: list[tuple[int, int]]) -> list[int]:
    """Distances of a group's ranks from its first."""
    found = [0]
    for size, stride in axes:
        found = [step + offset for step in range(0, size * stride, stride) for offset in found]
    return found


def _below(axes: list[tuple[int, int]], limit: int) -> int:
    """How many of the distances are below a limit."""
    if not axes or limit <= 0:
        return int(limit > 0)
    *faster, (size, stride) = axes
    if not faster:
        return min(size, -(-limit // stride))
    steps = min(size, -(-limit // stride))
    return sum(_below(faster, limit - step * stride) for step in range(steps))


def _all_groups(topology: Topology, name: str) -> list[list[int]]:
    axes = _axes(topology, name)
    strides = {stride for _, stride in axes}
    outside, stride = [], 1
    sizes = topology.expert_sizes if name in _EXPERT_GROUPS else topology.dense_sizes
    for size in sizes.values():
        if stride not in strides or size == 1:
            outside.append((size, stride))
        stride *= size
    inner = _offsets(axes)
    return [[start + offset for offset in inner] for start in _offsets(outside)]
