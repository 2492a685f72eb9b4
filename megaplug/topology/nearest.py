"""The legal meshes next to one that is not: what a user most likely meant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace

from megaplug.topology.mesh import Topology, TopologyRequest
from megaplug.topology.rules import expert_problems, tensor_problems, violations
from megaplug.topology.shape import Batch, ModelShape
from megaplug.topology.stages import layer_problems

Mesh = tuple[int, int, int, int, int, int]
"""Sizes of tp, pp, cp, ep, etp, dp."""

NEIGHBOURS = 4
"""How many sizes to each side of the wanted one are tried where the world size is free."""


def nearest_legal(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    limit: int = 3,
    *,
    request: TopologyRequest | None = None,
) -> list[Topology]:
    """The legal meshes with the fewest changed dimensions, and among those the smallest changes.

    A change is counted for each of tp, pp, cp, ep, etp (unless it only follows tp) and dp (unless it follows
    from the world size); giving up interleaving and uneven stages counts as one too. Sizes are compared by
    their ratio.

    Args:
        topology: What was asked for, as `resolve` returns it.
        shape: The model's sizes.
        batch: The batch sizes, which limit dp.
        limit: How many to return at most.
        request: What ``topology`` was resolved from. It tells whether the world size was given, and so has to
            stay, and whether dp was. Without it the world size stays and dp follows.

    Returns:
        Legal topologies, nearest first; nothing if the model or the batch fits no mesh at all.
    """
    plain = replace(
        topology,
        vpp=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    if violations(_with_mesh(plain, (1, 1, 1, 1, 1, 1), shape), shape, Batch(1, 1)):
        return []
    keep_world_size = request is None or request.world_size is not None
    wanted_dp = 0 if request is None else request.dp or 0
    found = []
    for dropped, layout in enumerate([topology] if plain == topology else [topology, plain]):
        if keep_world_size:
            meshes = _fixed_world(layout, shape)
        else:
            meshes = _free_world(layout, shape, batch, wanted_dp)
        for mesh in meshes:
            changes, ratio = _distance(topology, mesh, wanted_dp)
            found.append((changes + dropped, ratio, mesh, dropped))
    legal: list[Topology] = []
    for _, _, mesh, dropped in sorted(found):
        candidate = _with_mesh(plain if dropped else topology, mesh, shape)
        if not violations(candidate, shape, batch):
            legal.append(candidate)
            if len(legal) == limit:
                break
    return legal


def overrides(topology: Topology, request: TopologyRequest) -> list[str]:
    """What to type so that a request becomes this topology, such as ``["topology.pp=2", "topology.ep=8"]``.

    Sizes that follow from the others (see `resolve`) are left out.
    """
    typed: dict[str, int | bool | None] = {}
    for key in (field.name for field in fields(Topology)):
        value, asked = getattr(topology, key), getattr(request, key)
        follows = asked is None and key in ("dp", "etp", "world_size", "sequence_parallel")
        if not follows and value != asked and (key, value, asked) != ("vpp", None, 1):
            typed[key] = value
    if request.etp is None and topology.etp != topology.tp:
        typed["etp"] = topology.etp
    if request.sequence_parallel is None and topology.sequence_parallel != (topology.tp > 1):
        typed["sequence_parallel"] = topology.sequence_parallel
    dense = topology.tp * topology.cp
    if request.dp is None and "world_size" not in typed and request.world_size is None:
        smallest = math.lcm(dense, topology.etp * topology.ep) // dense
        if topology.dp != smallest:
            typed["dp"] = topology.dp
    return [
        f"topology.{key}={'null' if value is None else str(value).lower()}" for key, value in typed.items()
    ]


def _fixed_world(layout: Topology, shape: ModelShape) -> Iterator[Mesh]:
    """Every mesh of the same number of ranks that passes the rules of a single dimension."""
    world_size = layout.world_size
    sizes = _divisors(world_size)
    pps = [pp for pp in sizes if not layer_problems(replace(layout, pp=pp), shape.num_layers)]
    cps = [cp for cp in sizes if cp == 1 or shape.seq_length % (2 * cp) == 0]
    eps, etps = _expert_sizes(layout, shape, sizes)
    for tp in _tp_sizes(layout, shape, sizes):
        for pp in pps:
            for cp in cps:
                if world_size % (tp * pp * cp) == 0:
                    dp = world_size // (tp * pp * cp)
                    for ep in eps:
                        for etp in etps or [tp]:
                            if world_size % (ep * etp * pp) == 0:
                                yield tp, pp, cp, ep, etp, dp


def _free_world(layout: Topology, shape: ModelShape, batch: Batch, wanted_dp: int) -> Iterator[Mesh]:
    """The meshes whose sizes are among the nearest legal ones, each dimension for itself.

    Without a wanted dp it is the smallest that the experts allow, as in `resolve`.
    """
    if (
        batch.micro_batch_size < 1
        or batch.global_batch_size < 1
        or batch.global_batch_size % batch.micro_batch_size
    ):
        return
    tps = _near(_tp_sizes(layout, shape, _divisors(shape.num_attention_heads)), layout.tp)
    stages = range(1, shape.num_layers + 3)
    pps = _near([p for p in stages if not layer_problems(replace(layout, pp=p), shape.num_layers)], layout.pp)
    cps = _near([1, *_divisors(shape.seq_length // 2)] if shape.seq_length % 2 == 0 else [1], layout.cp)
    dps = _near(_divisors(batch.global_batch_size // batch.micro_batch_size), wanted_dp) if wanted_dp else []
    eps, etps = _expert_sizes(layout, shape, _divisors(shape.num_experts or 1))
    for tp in tps:
        near_etps = sorted({tp, 1, *(etp for etp in etps if etp == layout.etp)}) if etps else [tp]
        for pp in pps:
            for cp in cps:
                for ep in _near(eps, layout.ep):
                    for etp in near_etps:
                        for dp in dps or [math.lcm(tp * cp, etp * ep) // (tp * cp)]:
                            if (tp * cp * dp) % (ep * etp) == 0:
                                yield tp, pp, cp, ep, etp, dp


def _tp_sizes(layout: Topology, shape: ModelShape, sizes: Iterable[int]) -> list[int]:
    return [tp for tp in sizes if not any(tensor_problems(replace(layout, tp=tp), shape))]


def _expert_sizes(layout: Topology, shape: ModelShape, sizes: Iterable[int]) -> tuple[list[int], list[int]]:
    """Legal ep and etp; no etp where it has to follow tp, as it has no meaning without experts."""
    if not shape.is_moe:
        return [1], []
    single = replace(layout, tp=1, ep=1, etp=1)
    eps = [ep for ep in sizes if not any(expert_problems(replace(single, ep=ep), shape))]
    etps = [etp for etp in sizes if not any(expert_problems(replace(single, etp=etp), shape))]
    return eps, sorted({*etps, 1})


def _with_mesh(layout: Topology, mesh: Mesh, shape: ModelShape) -> Topology:
    tp, pp, cp, ep, etp, dp = mesh
    wanted = layout.sequence_parallel or layout.tp == 1 or shape.is_moe
    return replace(
        layout,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        etp=etp,
        dp=dp,
        world_size=tp * pp * cp * dp,
        sequence_parallel=tp > 1 and wanted,
    )


def _distance(topology: Topology, mesh: Mesh, wanted_dp: int) -> tuple[int, float]:
    """Changed dimensions, and how far they went in powers of two; dp counts if one is wanted."""
    tp, pp, cp, ep, etp, dp = mesh
    etp_wanted = tp if topology.etp == topology.tp else topology.etp
    pairs = [(topology.tp, tp), (topology.pp, pp), (topology.cp, cp), (topology.ep, ep), (etp_wanted, etp)]
    if wanted_dp:
        pairs.append((wanted_dp, dp))
    changed = [abs(math.log2(size / wanted)) for wanted, size in pairs if size != wanted]
    return len(changed), round(sum(changed), 6)


def _near(sizes: Iterable[int], wanted: int) -> list[int]:
    ordered = sorted(set(sizes))
    below = [size for size in ordered if size <= wanted][-NEIGHBOURS:]
    return below + [size for size in ordered if size > wanted][:NEIGHBOURS]


def _divisors(number: int) -> list[int]:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})
