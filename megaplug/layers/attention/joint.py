"""Dilated attention over one or many ranks as one joint softmax, forward and backward.

Mixing dilated branches by their softmax denominators (LongNet, eq. 9-10) is one softmax over the union of the
branches' keys, a key counted once for each branch that has it. So the forward pass merges blocks by their
log-sum-exps, and the backward pass calls each block's own with the output and log-sum-exp of the whole:
exact, the way through the mixing weights included, with one output and one log-sum-exp kept however many
branches there are.

Shape letters: B sequences, S tokens of a rank, H query heads, G key-value heads, D elements a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaplug.layers.attention.block_kernels import BlockKernel
from megaplug.layers.attention.exchange import (
    FORWARD,
    GRADIENTS,
    KEYS_AGAIN,
    Message,
    num_elements,
    pack,
    unpack,
)
from megaplug.layers.attention.rows import (
    add,
    gather_keys,
    gather_queries,
    merge,
    places_of_keys,
    places_of_queries,
    view_groups,
    view_rows,
)
from megaplug.layers.attention.share import Call, Share, Step


@dataclass(frozen=True)
class Work:
    """How a share is computed."""

    share: Share
    kernel: BlockKernel
    scale: float
    group: dist.ProcessGroup | None = None


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
    own = list(work.share.own)
    if work.share.covers_all:
        call = own.pop(0)
        found, lse = work.kernel.forward(*_own_inputs(call, q, k, v), call.causal, work.scale)
        out = found.reshape(q.shape).to(wide(q.dtype))
        lse = lse.reshape(q.shape[:3])
    else:
        out = torch.zeros(q.shape, dtype=wide(q.dtype), device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)

    def compute(call: Call, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        found, found_lse = work.kernel.forward(rows, keys, values, call.causal, work.scale)
        places, lse_places = (places_of_queries(x, call.queries, call.heads, num_groups) for x in (out, lse))
        merge(places, lse_places, found, found_lse)

    def compute_step(step: Step, arrived: Tensor) -> None:
        entries = unpack(arrived, step.received, q.size(0), q.size(3))
        for call in step.calls:
            keys, values = _chosen(entries, call)
            compute(call, gather_queries(q, call.queries, call.heads, num_groups), keys, values)

    for call in own:
        compute(call, *_own_inputs(call, q, k, v))
    for number, step in enumerate(work.share.steps):
        arrived = message.wait()
        message = _post(work, number + 1, k, v, FORWARD)
        compute_step(step, arrived)
        del arrived
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

    def compute(call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_rows, q_rows, out_rows, lse_rows = (
            gather_queries(x, call.queries, call.heads, num_groups) for x in (d_out, q, out, lse)
        )
        return work.kernel.backward(d_rows, q_rows, keys, values, out_rows, lse_rows, call.causal, work.scale)

    def compute_own(call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return compute(call, *(gather_keys(x, call.keys, call.heads) for x in (k, v)))

    own = list(work.share.own)
    if work.share.covers_all:
        found = compute_own(own.pop(0))
        d_q, d_k, d_v = (
            grad.reshape(x.shape).to(wide(q.dtype)) for grad, x in zip(found, (q, k, v), strict=True)
        )
    else:
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=wide(q.dtype), device=q.device) for x in (q, k, v))

    # What is needed for one call or step lives in a function, and is gone before the next needs as much.
    def add_own(call: Call) -> None:
        to_q, to_k, to_v = compute_own(call)
        add(places_of_queries(d_q, call.queries, call.heads, num_groups), to_q)
        add(places_of_keys(d_k, call.keys, call.heads), to_k)
        add(places_of_keys(d_v, call.keys, call.heads), to_v)

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

    for call in own:
        add_own(call)
    returning: tuple[Step, Message] | None = None
    for number, step in enumerate(work.share.steps):
        arrived = message.wait()
        message = _post(work, number + 1, k, v, KEYS_AGAIN)
        back = answer(step, arrived)
        del arrived
        if returning is not None:
            _add_returned(*returning, d_k, d_v)
        assert work.group is not None, "steps have other ranks"
        length = num_elements(step.sent, q.size(0), q.size(3))
        returning = step, Message(work.group, back, step.from_rank, length, step.to_rank, GRADIENTS)
        del back
    if returning is not None:
        _add_returned(*returning, d_k, d_v)
    return d_q, d_k, d_v


class _Nothing:
    """Stands where no message is under way."""

    def wait(self) -> Tensor:
        raise AssertionError("there is no such step")


def _post(work: Work, number: int, k: Tensor, v: Tensor, kind: str) -> Message | _Nothing:
    """Send and await what a step is about; nothing after the last."""
    if number >= len(work.share.steps):
        return _Nothing()
    assert work.group is not None, "steps have other ranks"
    step = work.share.steps[number]
    length = num_elements(step.received, k.size(0), k.size(3))
    return Message(work.group, pack(k, v, step.sent), step.to_rank, length, step.from_rank, kind)


def _own_inputs(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gather_queries(q, call.queries, call.heads, k.size(2)),
        gather_keys(k, call.keys, call.heads),
        gather_keys(v, call.keys, call.heads),
    )


def _chosen(entries: list[tuple[Tensor, Tensor]], call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values of the entries of one call, one after another."""
    if len(call.entries) == 1:
        return entries[call.entries[0]]
    k, v = (torch.cat([entries[entry][which] for entry in call.entries], 1) for which in (0, 1))
    return k, v


def _add_returned(step: Step, message: Message, d_k: Tensor, d_v: Tensor) -> None:
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
        d_q, d_k, d_v = backward_jointly(ctx.work, grads[0], q, k, v, out, lse)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None


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
