"""Rows and heads of a rank's tensors as a kernel takes them, and results put back where they belong.

Shape letters: B sequences, S tokens of a rank, H query heads, G key-value heads, D elements a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaplug.layers.attention.calls import Rows
from megaplug.layers.attention.pattern import HeadSet


def view_rows(x_BS: Tensor, rows: Rows) -> Tensor:
    """``[B, segments, count, ...]`` of ``[B, S, ...]``, a view."""
    last = rows.offset + (rows.count - 1) * rows.rate + 1
    if rows.segments == 1:
        begin = rows.base + rows.offset
        return x_BS[:, begin : rows.base + last : rows.rate].unsqueeze(1)
    whole = x_BS[:, rows.base : rows.base + rows.segments * rows.length]
    return whole.unflatten(1, (rows.segments, rows.length))[:, :, rows.offset : last : rows.rate]


def view_heads(x_BSH: Tensor, heads: HeadSet, num_groups: int) -> Tensor:
    """``[B, S, groups, heads, ...]`` of a tensor that has all query heads, a view."""
    return x_BSH.unflatten(2, (num_groups, -1))[:, :, heads.groups.slice, heads.heads.slice]


def view_groups(x_BSG: Tensor, heads: HeadSet) -> Tensor:
    """``[B, S, groups, ...]`` of a tensor that has all key-value heads, a view."""
    return x_BSG[:, :, heads.groups.slice]


def gather_queries(x_BSH: Tensor, parts: tuple[Rows, ...], heads: HeadSet, num_groups: int) -> Tensor:
    """``[B * segments, rows, heads, ...]``, copied only where no view is possible."""
    chosen = view_heads(x_BSH, heads, num_groups)
    return _as_sequences(chosen, parts).flatten(2, 3)


def gather_keys(x_BSG: Tensor, parts: tuple[Rows, ...], heads: HeadSet) -> Tensor:
    """``[B * segments, rows, groups, ...]``, copied only where no view is possible."""
    return _as_sequences(view_groups(x_BSG, heads), parts)


def places_of_queries(
    x_BSH: Tensor, parts: tuple[Rows, ...], heads: HeadSet, num_groups: int
) -> list[Tensor]:
    """For each part ``[B, segments, count, groups, heads, ...]``, views to write to."""
    chosen = view_heads(x_BSH, heads, num_groups)
    return [view_rows(chosen, part) for part in parts]


def places_of_keys(x_BSG: Tensor, parts: tuple[Rows, ...], heads: HeadSet) -> list[Tensor]:
    """For each part ``[B, segments, count, groups, ...]``, views to write to."""
    chosen = view_groups(x_BSG, heads)
    return [view_rows(chosen, part) for part in parts]


def shares_of(values: Tensor, places: list[Tensor]) -> list[Tensor]:
    """What a kernel gave, ``[B * segments, rows, ...]``, cut and shaped like the places it goes to."""
    parts = values.split([place.size(2) for place in places], dim=1)
    return [part.reshape(place.shape) for part, place in zip(parts, places, strict=True)]


def add(places: list[Tensor], values: Tensor) -> None:
    """Add what a kernel gave to where it belongs."""
    for place, part in zip(places, shares_of(values, places), strict=True):
        place.add_(part)


def put(places: list[Tensor], values: Tensor) -> None:
    """Write what a kernel gave to where it belongs."""
    for place, part in zip(places, shares_of(values, places), strict=True):
        place.copy_(part)


def merge(places: list[Tensor], lse_places: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """Make the softmax over what was there and the block's keys: of both outputs and log-sum-exps.

    ``L' = log(e^L + e^l)``, ``O' = O + (o - O) e^(l - L')``; the factor is a sigmoid,
    which neither overflows nor minds an L of minus infinity, where nothing was before.
    """
    outs, lses = shares_of(out, places), shares_of(lse, lse_places)
    for place, lse_place, o, new in zip(places, lse_places, outs, lses, strict=True):
        weight = torch.sigmoid(new - lse_place).unsqueeze(-1)
        place.lerp_(o.to(place.dtype), weight)
        torch.logaddexp(lse_place, new, out=lse_place)


def _as_sequences(x: Tensor, parts: tuple[Rows, ...]) -> Tensor:
    views = [view_rows(x, part) for part in parts]
    return (views[0] if len(views) == 1 else torch.cat(views, 2)).flatten(0, 1)
