"""How many ways of cutting the ranks there are, and which rule forbids how many of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megaplug.plan.search.grids import Legal, Rules
from megaplug.plan.search.space import divisors

TENSORS = "tp does not divide the heads, the KV groups or the MLP"
LAYERS = "the layers cannot be dealt out to pp stages"
SEQUENCE = "tp and cp do not cut the sequence evenly"
EXPERTS = "the experts, or one of them, cannot be cut so by ep, etp and tp"
BATCH = "dp x microbatch does not divide the batch, or its microbatches do not fit the pipeline"


@dataclass(frozen=True)
class Tally:
    """What a search has considered: pairs of grids, (tp, pp, cp, dp) and (etp, ep, pp), that cover the ranks.

    Attributes:
        num_grids: All of them, whatever model, batch or person say.
        num_legal: Those of which at least one configuration is legal.
        broken: By rule the number that it forbids, the largest first. A pair counts once, for its number of
            stages, else for its other sizes; for what the job has fixed before any rule of Megatron.
    """

    num_grids: int
    num_legal: int
    broken: dict[str, int]


def tally_of(found: Legal) -> Tally:
    """Count what was enumerated, and why the rest was not."""
    rules, broken = found.rules, Counter[str]()
    world_size, is_moe = rules.world_size, rules.shape.is_moe
    num_grids = 0
    for pp in divisors(world_size):
        pairs = _pairs(world_size // pp)
        # Without experts etp follows tp, and there is no ep.
        each = len(pairs) if is_moe else 1
        num_grids += len(pairs) * each
        rule = _fixed(rules, pp=pp) or ("" if any(rules.pipelines(pp)) else LAYERS)
        if rule:
            broken[rule] += len(pairs) * each
            continue
        of_tp: dict[int, Counter[str]] = {}
        for tp, cp in pairs:
            rule = _of_grid(rules, tp, cp, world_size // pp // tp // cp)
            if rule:
                broken[rule] += each
                continue
            if tp not in of_tp:
                of_tp[tp] = Counter(
                    _of_experts(rules, tp, ep, etp) for ep, etp in (pairs if is_moe else [(1, tp)])
                )
            broken += of_tp[tp]
    left = broken.pop("", 0)
    if left > found.num_meshes:
        broken[BATCH] += left - found.num_meshes
    return Tally(num_grids, found.num_meshes, dict(broken.most_common()))


def _pairs(number: int) -> list[tuple[int, int]]:
    """Two sizes whose product divides a number."""
    return [(one, other) for one in divisors(number) for other in divisors(number // one)]


def _fixed(rules: Rules, **sizes: int) -> str:
    """Which size the job has fixed to another one, in words; empty if none."""
    space = rules.space
    for name, size in sizes.items():
        wanted = space.fixed.get(name, size)
        if wanted != size:
            by = space.fixed_by.get(name)
            return f"{name} > 1: {by}" if by else f"{name} is to be {wanted}"
    return ""


def _of_grid(rules: Rules, tp: int, cp: int, dp: int) -> str:
    if fixed := _fixed(rules, tp=tp, cp=cp, dp=dp):
        return fixed
    if tp not in rules.cuts:
        return TENSORS
    return "" if any(cp == size for size, _ in rules.cuts[tp]) else SEQUENCE


def _of_experts(rules: Rules, tp: int, ep: int, etp: int) -> str:
    return _fixed(rules, ep=ep, etp=etp) or ("" if (ep, etp) in rules.experts[tp] else EXPERTS)
