"""Dilated attention over one or many ranks as one joint softmax, forward and backward.

Mixing dilated branches by their softmax denominators (LongNet, eq. 9-10) is one softmax over the union of the
branches' keys, a key counted once for each branch that has it. So the forward pass merges blocks by their
log-sum-exps, and the backward pass calls each block's own with the output and log-sum-exp of the whole:
exact, the way through the mixing weights included, with one output and one log-sum-exp kept however many
branches there are.

Shape letters: B sequences, S tokens of a rank, H query heads, G key-value heads, D elements a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaplug.layers.attention.calls import Call, split_call
from megaplug.layers.attention.exchange import (
    FORWARD,
    GRADIENTS,
    KEYS_AGAIN,
    Arriving,
    Exchange,
    num_elements,
    pack,
    unpack,
)
from megaplug.layers.attention.kernels.interface import Block, BlockKernel
from megaplug.layers.attention.merging import Merge
from megaplug.layers.attention.rows import (
    add,
    gather_keys,
    gather_queries,
    merge,
    places_of_keys,
    places_of_queries,
    put,
    view_groups,
    view_rows,
)
from megaplug.layers.attention.share import Share, Step


@dataclass(frozen=True)
class Work:
    """How a share is computed."""

    share: Share
    kernel: BlockKernel
    scale: float
    exchange: Exchange | None = None
    merge: Merge = merge


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what sums over blocks are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(work: Work, dtype: torch.dtype) -> torch.dtype:
    """In what gradients of keys and values go back to the rank that has these."""
    return wide(dtype) if work.kernel.wide_gradients else dtype


def attend_jointly(work: Work, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output ``[B, S, H, D]`` and log-sum-exp ``[B, S, H]`` of a share, fp32 (fp64 of fp64).

    Rows that no branch has get zeros, and minus infinity.
    """
    num_groups = k.size(2)
    message = _post(work, 0, k, v, FORWARD)
    # The output and the log-sum-exp; what a first call for all gives, as it is.
    totals: list[Tensor] = []
    if not work.share.takes_over:
        totals += [_total(work, x) for x in (q, q[..., 0])]
        if not work.share.num_covering:
            totals[1].fill_(-torch.inf)

    def compute(call: Call, keys: Tensor, values: Tensor, is_first: bool = False) -> None:
        rows = gather_queries(q, call.queries, call.heads, num_groups)
        block = Block(rows, keys, values, call.causal, work.scale, call.repeats)
        found, found_lse = work.kernel.forward(block)
        if not totals:
            totals[:] = found.reshape(q.shape).to(wide(q.dtype)), found_lse.reshape(q.shape[:3])
            return
        places, lse_places = (places_of_queries(x, call.queries, call.heads, num_groups) for x in totals)
        if is_first:
            put(places, found)
            put(lse_places, found_lse)
        else:
            work.merge(places, lse_places, found, found_lse)

    def compute_step(step: Step, arrived: Tensor) -> None:
        entries = unpack(arrived, step.received, q.size(0), q.size(3))
        for call in step.calls:
            compute(call, *_chosen(entries, call))

    for call, is_first in _own_calls(work, q):
        keys, values = (gather_keys(x, call.keys, call.heads) for x in (k, v))
        compute(call, keys, values, is_first)
        del keys, values
    for number, step in enumerate(work.share.steps):
        arrived = message.wait()
        message = _post(work, number + 1, k, v, FORWARD)
        compute_step(step, arrived)
        del arrived
    out, lse = totals
    return out, lse


def backward_jointly(
    work: Work, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the output and log-sum-exp of the whole softmax.

    They are fp32 (fp64 of fp64). Keys and values of other ranks come a second time, and what they get as a
    gradient goes back while the next step is computed.
    """
    num_groups = k.size(2)
    message = _post(work, 0, k, v, KEYS_AGAIN)

    def compute(call: Call, keys: Tensor, values: Tensor) -> list[Tensor]:
        d_rows, q_rows, out_rows, lse_rows = (
            gather_queries(x, call.queries, call.heads, num_groups) for x in (d_out, q, out, lse)
        )
        block = Block(q_rows, keys, values, call.causal, work.scale, call.repeats)
        return list(work.kernel.backward(block, d_rows, out_rows, lse_rows))

    # What is needed for one call or step lives in a function, and is gone before the next needs as much.
    # The totals are made one by one after the first call: kernels take memory of their own.
    totals: list[Tensor] = []

    def add_own(call: Call, is_first: bool) -> None:
        found = compute(call, *(gather_keys(x, call.keys, call.heads) for x in (k, v)))
        for number, x in enumerate((q, k, v)):
            if len(totals) == number:
                if work.share.takes_over:
                    totals.append(found.pop(0).reshape(x.shape).to(wide(x.dtype)))
                    continue
                totals.append(_total(work, x))
            places = (
                places_of_keys(totals[number], call.keys, call.heads)
                if number
                else places_of_queries(totals[number], call.queries, call.heads, num_groups)
            )
            (put if is_first else add)(places, found.pop(0))

    def answer(step: Step, arrived: Tensor) -> Tensor:
        # One call has all that this rank knows of an entry. What the kernel gives is sent: the owner adds
        # the parts of many ranks, and each that is rounded first would add its own error.
        back = torch.zeros_like(arrived, dtype=gradient_dtype(work, q.dtype))
        entries, grads = (unpack(x, step.received, q.size(0), q.size(3)) for x in (arrived, back))
        for call in step.calls:
            to_q, *to_keys = compute(call, *_chosen(entries, call))
            add(places_of_queries(d_q, call.queries, call.heads, num_groups), to_q)
            counts = [step.received[entry].rows.count for entry in call.entries]
            for which, grad in enumerate(to_keys):
                for entry, part in zip(call.entries, grad.split(counts, 1), strict=True):
                    grads[entry][which].copy_(part)
            del to_q, to_keys, grad, part
        return back

    for call, is_first in _own_calls(work, q):
        add_own(call, is_first)
    d_q, d_k, d_v = totals or [_total(work, x) for x in (q, k, v)]
    returning: tuple[Step, Arriving] | None = None
    for number, step in enumerate(work.share.steps):
        arrived = message.wait()
        message = _post(work, number + 1, k, v, KEYS_AGAIN)
        back = answer(step, arrived)
        del arrived
        if returning is not None:
            _add_returned(*returning, d_k, d_v)
        assert work.exchange is not None, "steps have other ranks"
        length = num_elements(step.sent, q.size(0), q.size(3))
        returning = step, work.exchange.post(back, step.from_rank, length, step.to_rank, GRADIENTS)
        del back
    if returning is not None:
        _add_returned(*returning, d_k, d_v)
    return d_q, d_k, d_v


class _Nothing:
    """Stands where no message is under way."""

    def wait(self) -> Tensor:
        raise AssertionError("there is no such step")


def _post(work: Work, number: int, k: Tensor, v: Tensor, kind: str) -> Arriving:
    """Send and await what a step is about; nothing after the last."""
    if number >= len(work.share.steps):
        return _Nothing()
    assert work.exchange is not None, "steps have other ranks"
    step = work.share.steps[number]
    length = num_elements(step.received, k.size(0), k.size(3))
    return work.exchange.post(pack(k, v, step.sent), step.to_rank, length, step.from_rank, kind)


def _own_calls(work: Work, q: Tensor) -> Iterator[tuple[Call, bool]]:
    """What needs no other rank, as large at once as the kernel likes; and whether nothing is there yet."""
    for number, call in enumerate(work.share.own):
        most = call.queries[0].segments
        takes_over = number == 0 and work.share.takes_over
        if work.kernel.most_elements is not None and not takes_over:
            heads = call.heads.groups.count * call.heads.heads.count
            a_segment = q.size(0) * call.queries[0].count * heads * q.size(3)
            most = max(1, work.kernel.most_elements // a_segment)
        for part in split_call(call, most):
            yield part, number < work.share.num_covering


def _total(work: Work, x: Tensor) -> Tensor:
    """For the sum of gradients; of which the first calls fill all, or else zeros."""
    make = torch.empty if work.share.num_covering else torch.zeros
    return make(x.shape, dtype=wide(x.dtype), device=x.device)


def _chosen(entries: list[tuple[Tensor, Tensor]], call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values of the entries of one call, one after another."""
    if len(call.entries) == 1:
        return entries[call.entries[0]]
    k, v = (torch.cat([entries[entry][which] for entry in call.entries], 1) for which in (0, 1))
    return k, v


def _add_returned(step: Step, message: Arriving, d_k: Tensor, d_v: Tensor) -> None:
    """What another rank computed of this one's keys and values."""
    for entry, grads in zip(
        step.sent, unpack(message.wait(), step.sent, d_k.size(0), d_k.size(3)), strict=True
    ):
        for total, grad in zip((d_k, d_v), grads, strict=True):
            view_rows(view_groups(total, entry.heads), entry.rows).add_(grad.unsqueeze(1))


class JointAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp, whatever the number of branches."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: Work) -> Tensor:
        """As ``attend_jointly``, in the dtype of q."""
        wide_out, lse = attend_jointly(work, q, k, v)
        out = wide_out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.work = work
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """As ``backward_jointly``, in the dtype of q."""
        q, k, v, out, lse = ctx.saved_tensors
        # Expanded gradients, as of a sum, have strides that kernels do not take.
        found = list(backward_jointly(ctx.work, grads[0].contiguous(), q, k, v, out, lse))
        # One after the other: long sequences leave no memory for all of them twice.
        d_q, d_k, d_v = (found.pop(0).to(x.dtype) for x in (q, k, v))
        return d_q, d_k, d_v, None


class DetachedAttention(torch.autograd.Function):
    """The same output; in the gradient the mixing weights are taken as constants, as torchscale does.

    Every branch's own output and log-sum-exp are kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, works: tuple[Work, ...]) -> Tensor:
        """The branches, weighed by their shares of the whole softmax."""
        parts = [attend_jointly(work, q, k, v) for work in works]
        lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
        weights = [_weight(part_lse, lse) for _, part_lse in parts]
        out = sum(part * weight for (part, _), weight in zip(parts, weights, strict=True))
        kept = [(part.to(q.dtype), part_lse) for part, part_lse in parts]
        ctx.save_for_backward(q, k, v, lse, *(x for pair in kept for x in pair))
        ctx.works = works
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Each branch for itself."""
        q, k, v, lse, *kept = ctx.saved_tensors
        totals = [torch.zeros(x.shape, dtype=wide(q.dtype), device=q.device) for x in (q, k, v)]
        for work, part, part_lse in zip(ctx.works, kept[::2], kept[1::2], strict=True):
            d_part = (grads[0] * _weight(part_lse, lse)).to(q.dtype)
            found = backward_jointly(work, d_part, q, k, v, part, part_lse)
            for total, grad in zip(totals, found, strict=True):
                total.add_(grad)
        d_q, d_k, d_v = (total.to(x.dtype) for total, x in zip(totals, (q, k, v), strict=True))
        return d_q, d_k, d_v, None


def _weight(part_lse: Tensor, lse: Tensor) -> Tensor:
    """A branch's share of the softmax; 0 for rows that no branch has."""
    return (part_lse - lse).exp().nan_to_num(0.0).unsqueeze(-1)
