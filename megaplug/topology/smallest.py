"""The smallest world in which all sizes that a user asked for can be had at once."""

from __future__ import annotations

import math
from dataclasses import replace

from megaplug.topology.mesh import Topology, TopologyRequest
from megaplug.topology.nearest import (
    Mesh,
    distance,
    etp_asked,
    expert_sizes,
    near_stages,
    tp_sizes,
    with_mesh,
)
from megaplug.topology.rules import violations
from megaplug.topology.shape import Batch, ModelShape

# Context parallelism may grow this many times to make room for the experts of many ranks.
_CP_FACTORS = (1, 2, 3, 4, 6, 8)


def smallest_world(
    topology: Topology, shape: ModelShape, *, request: TopologyRequest | None = None
) -> Topology | None:
    """The mesh of fewest ranks with the tp, pp, ep, cp and, if asked for, dp and etp of a topology.

    A size that the model does not allow becomes the nearest that it allows. cp may grow, and an etp that was
    not asked for may shrink, where the expert mesh finds no place otherwise; layers are dealt out unevenly if
    need be. Batch sizes are not judged: whoever adds ranks can choose them.

    Args:
        topology: What was asked for, as `resolve` returns it.
        shape: The model's sizes.
        request: What it was resolved from.

    Returns:
        A legal topology, or None if the model itself breaks a rule.
    """
    wanted_dp = 0 if request is None else request.dp or 0
    asked_etp = etp_asked(topology, request)
    heads = range(1, shape.num_attention_heads + 1)
    tps = _nearest(tp_sizes(topology, shape, heads), topology.tp)
    eps, etps = expert_sizes(topology, shape, range(1, (shape.num_experts or 1) + 1))
    options = near_stages(topology, shape.num_layers)
    exact = [stages for stages in options if stages.pp == topology.pp]
    found = []
    for tp in tps:
        for stages in exact or options:
            for ep in _nearest(eps, topology.ep):
                for etp in [asked_etp] if asked_etp else sorted({tp, 1}) if etps else [tp]:
                    for factor in _CP_FACTORS:
                        cp = topology.cp * factor
                        dp = wanted_dp or math.lcm(tp * cp, etp * ep) // (tp * cp)
                        mesh: Mesh = (tp, stages.pp, cp, ep, etp, dp)
                        # A larger cp is no change here: it is the price of keeping the rest.
                        kept = (tp, stages.pp, topology.cp, ep, etp, dp)
                        changes, ratio = distance(topology, kept, wanted_dp, asked_etp or etp)
                        cost = (changes + stages.changes, ratio + stages.ratio)
                        found.append((cost, tp * stages.pp * cp * dp, factor, mesh, stages))
    for _, world_size, _, mesh, stages in sorted(found, key=lambda entry: entry[:4]):
        candidate = with_mesh(replace(stages.layout, world_size=world_size), mesh, shape)
        if not violations(candidate, shape, Batch(1, mesh[-1] * mesh[1])):
            return candidate
    return None


def _nearest(sizes: list[int], wanted: int) -> list[int]:
    """The wanted size alone if it is there, or else all of them, the nearest first."""
    if wanted in sizes:
        return [wanted]
    return sorted(sizes, key=lambda size: abs(math.log2(size / wanted)))
