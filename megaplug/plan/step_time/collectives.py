"""What communication takes: alpha-beta times of rings and all-to-alls, and the bandwidth that a group gets.

A ring of n ranks moves (n - 1) / n of the whole for a gather or a scatter, twice that for an all-reduce.
A group whose ranks are ``stride`` apart stays inside the NVLink domain if ``n stride`` ranks do. Where it
leaves it, it shares the node's adapters with the node's other groups: it gets the adapters of the ranks it
has there, so node bandwidth x (its ranks in the node) / (GPUs of the node).
"""

from __future__ import annotations

from megaplug.plan.numbers import least, most, where
from megaplug.plan.step_time.rates import Rates
from megaplug.plan.step_time.terms import Number


def group_bandwidth(size: Number, stride: Number, rates: Rates) -> Number:
    """Bytes/s in one direction that a ring over a group gets.

    Args:
        size: Ranks of the group.
        stride: Distance of two neighbours in the numbering of ranks.
        rates: What the machines reach.
    """
    shared = least(rates.link, rates.network * ranks_in_domain(size, stride, rates))
    return where(size * stride <= rates.link_domain, rates.link, shared)


def ranks_in_domain(size: Number, stride: Number, rates: Rates) -> Number:
    """Ranks of a group that one NVLink domain holds."""
    return least(most(rates.link_domain // stride, 1), size)


def ring_seconds(whole: Number, size: Number, stride: Number, rates: Rates) -> Number:
    """A gather or a scatter over a ring of ``size`` ranks; ``whole`` is the bytes of all of them together."""
    moved = whole * (size - 1) / size / group_bandwidth(size, stride, rates)
    return where(size > 1, rates.constants.collective_seconds + moved, 0.0)


def exchange_seconds(
    tokens: Number, copies: Number, size: Number, stride: Number, rates: Rates, once: Number
) -> Number:
    """Every rank sends ``copies`` of ``tokens`` bytes to ranks of its group, balanced: to experts.

    The links inside and the network between work beside each other.

    Args:
        tokens: Bytes of a rank's tokens.
        copies: Experts of a token.
        size: Ranks of the group.
        stride: Distance of two neighbours in the numbering of ranks.
        rates: What the machines reach.
        once: 1 where a token goes once to a rank, and once to another NVLink domain, however many of its
            experts are there (DeepEP, HybridEP); 0 where every copy goes by itself (all-to-all).
    """
    near_ranks = ranks_in_domain(size, stride, rates)
    domains = size / near_ranks
    met = size * (1 - (1 - 1 / size) ** copies)
    # What goes to ranks of the own domain, and what comes into it from others and is spread there.
    near = where(once, met * (near_ranks - 1) / near_ranks, copies * (near_ranks - 1) / size)
    far = where(once, (domains - 1) * (1 - (1 - 1 / domains) ** copies), copies * (domains - 1) / domains)
    seconds = most(tokens * near / rates.link, tokens * far / rates.network)
    return where(size > 1, rates.constants.collective_seconds + seconds, 0.0)


def send_seconds(sent: Number, stages: Number, stride: Number, rates: Rates) -> Number:
    """A transfer of ``sent`` bytes to the next of ``stages`` pipeline stages, ``stride`` ranks away."""
    bandwidth = where(stages * stride <= rates.link_domain, rates.link, least(rates.link, rates.network))
    return where(stages > 1, rates.constants.collective_seconds + sent / bandwidth, 0.0)
