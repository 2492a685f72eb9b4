"""A book of what lies on the device: every live storage with its bytes and what it is for, and the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARY, OTHER = CATEGORIES = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "temporary",
    "other",
)
# CUDA's caching allocator hands out multiples of this (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp).
_BLOCK = 512


@dataclass
class _Held:
    watch: Any
    nbytes: int
    category: str


def rounded(nbytes: int) -> int:
    """Bytes that CUDA's caching allocator counts as allocated for a request."""
    return -(-nbytes // _BLOCK) * _BLOCK


class Book:
    """Live storages of the ``meta`` device, as the allocator of a GPU would count them.

    Attributes:
        live: Exact bytes now, by category.
        total: Rounded bytes now.
        peak: The largest ``total`` since :meth:`start_peak`.
        exact_peak: Exact bytes at that moment.
        at_peak: Exact bytes by category at that moment.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.start_peak()

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.total
        self.exact_peak = sum(self.live.values())
        self.at_peak = dict(self.live)

    def see(self, tensor: torch.Tensor, category: str) -> None:
        """Enter a tensor's storage, unless it is known."""
        if tensor.device.type != "meta":
            return
        self.see_storage(tensor.untyped_storage(), category)

    def see_storage(self, storage: torch.UntypedStorage, category: str) -> None:
        """Enter a storage of the device, unless it is known."""
        key = storage._cdata
        if key in self._held:
            return
        nbytes = storage.nbytes()

        def gone(_: Any) -> None:
            held = self._held.pop(key)
            self._changed(key, -held.nbytes, -rounded(held.nbytes), held.category)

        self._held[key] = _Held(weakref.ref(storage, gone), nbytes, category)
        self._changed(key, nbytes, rounded(nbytes), category)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has other bytes than before; recomputation empties and fills storages so."""
        held = self._held.get(storage._cdata)
        if held is None:
            return
        before, held.nbytes = held.nbytes, storage.nbytes()
        by, in_blocks = held.nbytes - before, rounded(held.nbytes) - rounded(before)
        self._changed(storage._cdata, by, in_blocks, held.category)

    def belongs(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Say what tensors that are known are for."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                continue
            self.see(tensor, category)
            held = self._held[tensor.untyped_storage()._cdata]
            self.live[held.category] -= held.nbytes
            self.live[category] += held.nbytes
            held.category = category

    def rest_is(self, category: str, but: tuple[str, ...]) -> None:
        """Whatever is live now and of none of the categories in ``but`` is of this one."""
        for held in self._held.values():
            if held.category not in but:
                self.live[held.category] -= held.nbytes
                self.live[category] += held.nbytes
                held.category = category

    def origins(self) -> list[str]:
        """Who made what was there at the peak; this book does not know (``origins.py``)."""
        return []

    def _changed(self, key: int, exact: int, in_blocks: int, category: str) -> None:
        self.live[category] += exact
        self.total += in_blocks
        if self.total > self.peak:
            self.start_peak()
