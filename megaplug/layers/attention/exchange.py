"""Messages between the ranks that share a sequence: packed, posted before they are needed, counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megaplug.layers.attention.rows import view_groups, view_rows
from megaplug.layers.attention.share import Entry

FORWARD, KEYS_AGAIN, GRADIENTS = "forward", "keys again", "gradients"


@dataclass
class Traffic:
    """Bytes that this rank received: ``forward``, ``keys again`` (backward) and ``gradients``."""

    received: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, buffer: Tensor) -> None:
        """Add one message."""
        self.received[kind] = self.received.get(kind, 0) + buffer.numel() * buffer.element_size()


_counters: list[Traffic] = []


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts what arrives on this rank while it is open."""
    counter = Traffic()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class Arriving(Protocol):
    """What is under way to this rank."""

    def wait(self) -> Tensor:
        """What has arrived, flat; what was sent may be changed from now on."""
        ...


class Exchange:
    """How the ranks that share a sequence send to each other.

    Args:
        group: These ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def post(self, out: Tensor, to_rank: int, length: int, from_rank: int, kind: str) -> Arriving:
        """Send and receive at once; arguments as of ``Message``."""
        return Message(self._group, out, to_rank, length, from_rank, kind)


class Message:
    """One message to another rank and one from another, under way since it was made.

    Args:
        group: The ranks that share the sequence.
        out: What is sent, flat; empty if nothing is.
        to_rank: Whom to, counted in the group.
        length: Elements that arrive.
        from_rank: Where from, counted in the group.
        kind: What it is counted as.
    """

    def __init__(
        self, group: dist.ProcessGroup, out: Tensor, to_rank: int, length: int, from_rank: int, kind: str
    ) -> None:
        self._out = out
        self._arriving = out.new_empty(length)
        # Two messages between a pair may be under way at once; gloo tells them by the tag, NCCL by their
        # order.
        tag = int(kind == GRADIENTS)
        operations = []
        if length:
            peer = dist.get_global_rank(group, from_rank)
            operations.append(dist.P2POp(dist.irecv, self._arriving, peer, group, tag))
            for counter in _counters:
                counter.count(kind, self._arriving)
        if out.numel():
            peer = dist.get_global_rank(group, to_rank)
            operations.append(dist.P2POp(dist.isend, out, peer, group, tag))
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """As ``Arriving``."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._arriving


def pack(k_BSGD: Tensor, v_BSGD: Tensor, entries: tuple[Entry, ...]) -> Tensor:
    """Keys and values of every entry one after another, flat and contiguous."""
    parts = [
        view_rows(view_groups(x, entry.heads), entry.rows).flatten()
        for entry in entries
        for x in (k_BSGD, v_BSGD)
    ]
    return torch.cat(parts) if parts else k_BSGD.new_empty(0)


def unpack(
    flat: Tensor, entries: tuple[Entry, ...], batch: int, head_dim: int
) -> list[tuple[Tensor, Tensor]]:
    """For each entry its keys and values ``[B, rows, groups, D]``, views of what arrived."""
    found = []
    begin = 0
    for entry in entries:
        shape = (2, batch, entry.rows.count, entry.heads.groups.count, head_dim)
        size = num_elements((entry,), batch, head_dim)
        k, v = flat[begin : begin + size].view(shape)
        found.append((k, v))
        begin += size
    return found


def num_elements(entries: tuple[Entry, ...], batch: int, head_dim: int) -> int:
    """Of the keys and values of entries."""
    return sum(2 * batch * e.rows.count * e.heads.groups.count * head_dim for e in entries)
