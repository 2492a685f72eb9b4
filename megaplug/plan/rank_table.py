"""What every rank holds and with whom it talks, as rows; counted, as Megatron's own groups are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from megaplug.topology import ModelShape, Topology, coordinates, groups_of, layer_ids, node_of

GROUPS = ("tp", "cp", "dp", "pp", "ep", "expert_dp")
"""The process groups that are shown, where they have more than one rank."""


@dataclass(frozen=True)
class RankRow:
    """One rank.

    Attributes:
        rank: Its number.
        node: The machine that it is on; ranks fill one machine after the other.
        stage: Its pipeline stage.
        layers: The transformer layers that it holds, counted from 0; with VPP several ranges.
        heads: Its query heads.
        kv_heads: Its key/value heads; several ranks may hold the same one.
        experts: The routed experts of every expert layer that it holds; None without experts.
        groups: By name, the ranks that it talks with, itself included; only groups of several ranks.
    """

    rank: int
    node: int
    stage: int
    layers: str
    heads: str
    kv_heads: str
    experts: str | None
    groups: dict[str, list[int]]

    def as_json(self) -> dict[str, object]:
        """The same as plain values."""
        return asdict(self)


def rank_rows(
    topology: Topology, shape: ModelShape, ranks: Sequence[int], gpus_per_node: int
) -> list[RankRow]:
    """The rows of some ranks.

    Args:
        topology: A legal mesh.
        shape: The model's sizes.
        ranks: Which.
        gpus_per_node: How many ranks a machine takes.

    Raises:
        ValueError: If the world has no such rank.
    """
    return [_row(topology, shape, rank, gpus_per_node) for rank in ranks]


def _row(topology: Topology, shape: ModelShape, rank: int, gpus_per_node: int) -> RankRow:
    place = coordinates(topology, rank)
    chunks = layer_ids(topology, shape.num_layers, place["pp"])
    kv = shape.num_attention_heads if shape.multi_latent_attention else shape.num_query_groups
    experts = None
    if shape.num_experts:
        experts = _part(shape.num_experts, topology.ep, place["ep"])
        if topology.etp > 1:
            experts += f", 1/{topology.etp} of each"
    groups = {name: group for name, group in groups_of(topology, rank).items() if name in GROUPS}
    return RankRow(
        rank,
        node_of(rank, gpus_per_node),
        place["pp"],
        " ".join(_range(chunk[0], chunk[-1]) for chunk in chunks if chunk),
        _part(shape.num_attention_heads, topology.tp, place["tp"]),
        _part(kv, topology.tp, place["tp"]),
        experts,
        {name: group for name, group in groups.items() if len(group) > 1},
    )


def _part(whole: int, ranks: int, index: int) -> str:
    """The part of a whole that one of several ranks holds; with more ranks than parts, some hold the same."""
    if whole < ranks:
        return str(index * whole // ranks)
    size = whole // ranks
    return _range(index * size, index * size + size - 1)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def table(rows: Sequence[RankRow]) -> str:
    """The rows for a person, with a line of names above."""
    cells = [_cells(row) for row in rows]
    names = [name for name in cells[0] if any(cell[name] for cell in cells)]
    widths = {name: max(len(name), *(len(cell[name]) for cell in cells)) for name in names}
    lines = ["  ".join(f"{name:>{widths[name]}}" for name in names)]
    lines += ["  ".join(f"{cell[name]:>{widths[name]}}" for name in names) for cell in cells]
    return "\n".join(lines)


def _cells(row: RankRow) -> dict[str, str]:
    cells = {
        "rank": str(row.rank),
        "node": str(row.node),
        "stage": str(row.stage),
        "layers": row.layers,
        "heads": row.heads,
        "KV heads": row.kv_heads,
        "experts": row.experts or "",
    }
    return cells | {f"{name} group": _group(row.groups.get(name, [])) for name in GROUPS}


def _group(ranks: Sequence[int]) -> str:
    """``0,1,2,3`` as ``0-3``, even steps as ``0-24:8`` (every eighth), anything else as its ends."""
    if not ranks:
        return ""
    steps = {after - before for before, after in pairwise(ranks)}
    if len(ranks) == 2:
        return f"{ranks[0]},{ranks[1]}"
    if steps == {1}:
        return f"{ranks[0]}-{ranks[-1]}"
    if len(steps) == 1:
        return f"{ranks[0]}-{ranks[-1]}:{steps.pop()}"
    return f"{ranks[0]},{ranks[1]}..{ranks[-1]}"
