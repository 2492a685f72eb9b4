"""The legal meshes next to one that is not: what a user most likely meant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice

from megaplug.topology.mesh import Topology, TopologyRequest
from megaplug.topology.rules import expert_problems, tensor_problems, violations
from megaplug.topology.shape import Batch, ModelShape
from megaplug.topology.stages import layer_problems, uneven_layout

Mesh = tuple[int, int, int, int, int, int]
"""Sizes of tp, pp, cp, ep, etp, dp."""

NEIGHBOURS = 4
"""How many sizes to each side of the wanted one are tried where the world size is free."""


@dataclass(frozen=True)
class Stages:
    """A number of pipeline stages with a way to deal out the layers to them.

    Attributes:
        pp: How many stages.
        layout: A topology with that way; its sizes mean nothing.
        changes: 1 if what was asked for (interleaving, uneven stages) was given up.
        ratio: 1 if the stages are uneven and were not asked to be, as much as a size twice as large.
    """

    pp: int
    layout: Topology
    changes: int = 0
    ratio: float = 0.0


def nearest_legal(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    limit: int = 3,
    *,
    request: TopologyRequest | None = None,
) -> list[Topology]:
    """The legal meshes with the fewest changed dimensions, and among those the smallest changes.

    A change is counted for each of tp, pp, cp, ep, for etp and dp if they were asked for, and for giving up
    interleaving or uneven stages. Sizes are compared by their ratio. Layers that the stages cannot share
    evenly are dealt out as `uneven_layout` says, which is no change, but counts like a size twice as large.

    Args:
        topology: What was asked for, as `resolve` returns it.
        shape: The model's sizes.
        batch: The batch sizes, which limit dp.
        limit: How many to return at most.
        request: What ``topology`` was resolved from. It tells whether the world size was given, and so has to
            stay, and whether dp and etp were. Without it the world size stays, dp follows, and etp was asked
            for if it is not tp.

    Returns:
        Legal topologies, nearest first; nothing if the model or the batch fits no mesh at all.
    """
    return list(islice(by_distance(topology, shape, batch, request=request), limit))


def by_distance(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    *,
    request: TopologyRequest | None = None,
    possible: Callable[[Mesh], bool] = lambda mesh: True,
) -> Iterator[Topology]:
    """As `nearest_legal`, one after the other.

    Args:
        topology: As there.
        shape: As there.
        batch: As there.
        request: As there.
        possible: Asked of every mesh first, its rules only then: what need not be looked at.
    """
    plain = _plain(topology)
    if violations(with_mesh(plain, (1, 1, 1, 1, 1, 1), shape), shape, Batch(1, 1)):
        return
    keep_world_size = request is None or request.world_size is not None
    wanted_dp = 0 if request is None else request.dp or 0
    asked_etp = etp_asked(topology, request)
    if keep_world_size:
        meshes = _fixed_world(topology, shape)
    else:
        meshes = _free_world(topology, shape, batch, wanted_dp)
    found = []
    for number, (stages, mesh) in enumerate(meshes):
        if not possible(mesh):
            continue
        changes, ratio = distance(topology, mesh, wanted_dp, asked_etp)
        found.append((changes + stages.changes, ratio + stages.ratio, mesh, number, stages))
    for _, _, mesh, _, stages in sorted(found, key=lambda entry: entry[:4]):
        candidate = with_mesh(stages.layout, mesh, shape)
        if not violations(candidate, shape, batch):
            yield candidate


def etp_asked(topology: Topology, request: TopologyRequest | None) -> int | None:
    """The expert tensor parallelism that was asked for; None if it only follows tp."""
    if request is not None:
        return request.etp
    return None if topology.etp == topology.tp else topology.etp


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


def stage_options(topology: Topology, pps: Iterable[int], num_layers: int) -> list[Stages]:
    """The ways in which some numbers of stages can hold the layers."""
    plain, options = _plain(topology), []
    given_up = int(plain != topology)
    for pp in pps:
        if not layer_problems(replace(topology, pp=pp), num_layers):
            options.append(Stages(pp, topology))
        if not layer_problems(replace(plain, pp=pp), num_layers):
            if given_up:
                options.append(Stages(pp, plain, 1))
        elif uneven := uneven_layout(pp, num_layers):
            options.append(Stages(pp, replace(plain, **uneven), given_up, 1.0))  # type: ignore[arg-type]
    return options


def _plain(topology: Topology) -> Topology:
    """Without interleaving and uneven stages."""
    return replace(
        topology,
        vpp=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )


def _fixed_world(topology: Topology, shape: ModelShape) -> Iterator[tuple[Stages, Mesh]]:
    """Every mesh of the same number of ranks that passes the rules of a single dimension."""
    world_size = topology.world_size
    sizes = _divisors(world_size)
    options = stage_options(topology, [pp for pp in sizes if pp <= shape.num_layers + 2], shape.num_layers)
    cps = [cp for cp in sizes if cp == 1 or shape.seq_length % (2 * cp) == 0]
    eps, etps = expert_sizes(topology, shape, sizes)
    for tp in tp_sizes(topology, shape, sizes):
        for stages in options:
            pp = stages.pp
            for cp in cps:
                if world_size % (tp * pp * cp) == 0:
                    dp = world_size // (tp * pp * cp)
                    for ep in eps:
                        for etp in etps or [tp]:
                            if world_size % (ep * etp * pp) == 0:
                                yield stages, (tp, pp, cp, ep, etp, dp)


def _free_world(
    topology: Topology, shape: ModelShape, batch: Batch, wanted_dp: int
) -> Iterator[tuple[Stages, Mesh]]:
    """The meshes whose sizes are among the nearest legal ones, each dimension for itself.

    Without a wanted dp it is the smallest that the experts allow, as in `resolve`.
    """
    if (
        batch.micro_batch_size < 1
        or batch.global_batch_size < 1
        or batch.global_batch_size % batch.micro_batch_size
    ):
        return
    tps = _near(tp_sizes(topology, shape, _divisors(shape.num_attention_heads)), topology.tp)
    options = near_stages(topology, shape.num_layers)
    cps = _near([1, *_divisors(shape.seq_length // 2)] if shape.seq_length % 2 == 0 else [1], topology.cp)
    dps = _near(_divisors(batch.global_batch_size // batch.micro_batch_size), wanted_dp) if wanted_dp else []
    eps, etps = expert_sizes(topology, shape, _divisors(shape.num_experts or 1))
    for tp in tps:
        near_etps = sorted({tp, 1, *(etp for etp in etps if etp == topology.etp)}) if etps else [tp]
        for stages in options:
            for cp in cps:
                for ep in _near(eps, topology.ep):
                    for etp in near_etps:
                        for dp in dps or [math.lcm(tp * cp, etp * ep) // (tp * cp)]:
                            if (tp * cp * dp) % (ep * etp) == 0:
                                yield stages, (tp, stages.pp, cp, ep, etp, dp)


def near_stages(topology: Topology, num_layers: int) -> list[Stages]:
    """The numbers of stages nearest to the wanted one, that one itself with uneven stages if need be."""
    options = stage_options(topology, range(1, num_layers + 3), num_layers)
    near = {*_near([option.pp for option in options if not option.ratio], topology.pp), topology.pp}
    return [
        option for option in options if option.pp in near and (not option.ratio or option.pp == topology.pp)
    ]


def tp_sizes(layout: Topology, shape: ModelShape, sizes: Iterable[int]) -> list[int]:
    """Those tensor-parallel sizes that heads, groups and MLP allow."""
    return [tp for tp in sizes if not any(tensor_problems(replace(layout, tp=tp), shape))]


def expert_sizes(layout: Topology, shape: ModelShape, sizes: Iterable[int]) -> tuple[list[int], list[int]]:
    """Legal ep and etp; no etp where it has to follow tp, as it has no meaning without experts."""
    if not shape.is_moe:
        return [1], []
    single = replace(layout, tp=1, ep=1, etp=1)
    eps = [ep for ep in sizes if not any(expert_problems(replace(single, ep=ep), shape))]
    etps = [etp for etp in sizes if not any(expert_problems(replace(single, etp=etp), shape))]
    return eps, sorted({*etps, 1})


def with_mesh(layout: Topology, mesh: Mesh, shape: ModelShape) -> Topology:
    """A layout with the sizes of a mesh, and with the sequence parallelism that goes with them."""
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


def distance(topology: Topology, mesh: Mesh, wanted_dp: int, asked_etp: int | None) -> tuple[int, float]:
    """Changed dimensions, and how far they went in powers of two; dp and etp count if they were asked for.

    An etp that was not asked for and does not follow tp weighs a quarter: it has to be typed.
    """
    tp, pp, cp, ep, etp, dp = mesh
    pairs = [(topology.tp, tp), (topology.pp, pp), (topology.cp, cp), (topology.ep, ep)]
    if asked_etp is not None:
        pairs.append((asked_etp, etp))
    if wanted_dp:
        pairs.append((wanted_dp, dp))
    changed = [_powers(size, wanted) for wanted, size in pairs if size != wanted]
    typed = 0.25 if asked_etp is None and etp != tp else 0.0
    return len(changed), round(sum(changed), 6) + typed


@functools.cache
def _powers(size: int, wanted: int) -> float:
    return abs(math.log2(size / wanted))


def _near(sizes: Iterable[int], wanted: int) -> list[int]:
    ordered = sorted(set(sizes))
    below = [size for size in ordered if size <= wanted][-NEIGHBOURS:]
    return below + [size for size in ordered if size > wanted][:NEIGHBOURS]


def _divisors(number: int) -> list[int]:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})
