"""The dispatch mode that a rehearsal runs under: it counts memory, FLOPs and bytes, and answers for numbers.

Tensors are on torch's ``meta`` device: sizes without numbers. Where Megatron asks for a number, nothing is
infinite and a norm is 1.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megaplug.runtime.rehearsal.book import ACTIVATIONS, TEMPORARY, Book
from megaplug.runtime.rehearsal.inside import made_inside
from megaplug.runtime.rehearsal.traffic import Traffic, answer

FORWARD, RECOMPUTED, BACKWARD, OPTIMIZER_STEP = PASSES = ("forward", "recomputed", "backward", "optimizer")
_aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Counts everything that runs under it.

    Args:
        does_communicate: Leave collectives to torch, and operators to their tensors: for a real run that is
            only watched.
        book: Of a kind of its own, or None for a plain one.

    Attributes:
        book: Memory.
        traffic: Communication.
        flops: Of matrix products and attention, by pass; a product of n numbers counts 2 n, and causal
            attention as if nothing were masked, as ``torch.utils.flop_counter`` counts.
        in_optimizer: Whether the optimizer is stepping.
        selected: How many elements the next ``masked_select`` finds; None for those of balanced routing.
        part_selected: Of a routing map that part is true: top-k over experts.
        copies: What is found when a tensor is next copied to the CPU.
    """

    def __init__(self, *, does_communicate: bool = False, book: Book | None = None) -> None:
        super().__init__()
        self.does_communicate = does_communicate
        self.book = book or Book()
        self.traffic = Traffic()
        self.flops: Counter[str] = Counter()
        self.in_optimizer = False
        self.selected: int | None = None
        self.part_selected = 1.0
        self.copies: list[torch.Tensor] = []
        # Storages that were made inside a compiled function; None outside of one.
        self._inside: list[Any] | None = None

    @contextlib.contextmanager
    def one_kernel(self) -> Iterator[None]:
        """What runs here is one kernel: of its storages only those that outlive it are entered."""
        if self._inside is not None:
            yield
            return
        self._inside = []
        try:
            yield
        finally:
            made, self._inside = self._inside, None
            for storage in (reference() for reference in made):
                if storage is not None:
                    self.book.see_storage(storage, self._category())

    def start(self) -> None:
        """Count from here; what lies in memory stays."""
        self.book.start_peak()
        self.traffic.clear()
        self.flops.clear()

    def now(self) -> str:
        """The pass that runs."""
        if torch._C._current_graph_task_id() != -1:
            return RECOMPUTED if torch.is_grad_enabled() else BACKWARD
        return OPTIMIZER_STEP if self.in_optimizer else FORWARD

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, or answer, one operator."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            self.traffic.count(name, args)
            return func(*args, **kwargs) if self.does_communicate else answer(name, args)
        inside = [] if self.does_communicate else made_inside(func, args)
        self._enter(inside)
        out = self._answer(func, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.now()] += formula(*args, **kwargs, out_val=out)
        self._enter(out)
        return out

    def _category(self) -> str:
        return ACTIVATIONS if self.now() in (FORWARD, RECOMPUTED) else TEMPORARY

    def _enter(self, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            if out.device.type != "meta":
                return
            if self._inside is None:
                self.book.see(out, self._category())
            else:
                self._inside.append(weakref.ref(out.untyped_storage()))
        elif isinstance(out, tuple | list):
            for item in out:
                self._enter(item)

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator gives; made up where it depends on numbers that do not exist."""
        if self.does_communicate or not args:
            return func(*args, **kwargs)
        first = args[0]
        if not isinstance(first, torch.Tensor) or first.device.type != "meta":
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            if (known := first.__dict__.get("known_number")) is not None:
                return known
            if first.dtype == torch.bool:
                return False
            return 1.0 if first.is_floating_point() else 1
        if func is _aten.masked_select.default:
            found = round(args[1].numel() * self.part_selected) if self.selected is None else self.selected
            return first.new_empty(found)
        if func is _aten._to_copy.default and _is_cpu(kwargs.get("device")):
            if self.copies:
                return self.copies.pop(0)
            return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        if func is _aten.equal.default:
            return True
        return func(*args, **kwargs)


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


@contextlib.contextmanager
def watching_resizes(book: Book) -> Iterator[None]:
    """Tell the book when a storage is emptied or filled; no operator of torch is called for it."""
    storage_class: Any = torch.UntypedStorage
    real = storage_class.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        answer = real(self, size)
        book.resized(self)
        return answer

    storage_class.resize_ = resize_
    try:
        yield
    finally:
        storage_class.resize_ = real
