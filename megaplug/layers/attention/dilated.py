"""Dilated and ring attention as functions of tensors: no Megatron, one device or a process group.

Shape letters: B sequences, S tokens of a rank, H query heads, G key-value heads, D elements a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.attention.block_kernels import choose_kernel
from megaplug.layers.attention.exchange import Exchange
from megaplug.layers.attention.given import message_size, one_of
from megaplug.layers.attention.joint import DetachedAttention, JointAttention, Work
from megaplug.layers.attention.merging import choose_merge
from megaplug.layers.attention.pattern import Heads, branches
from megaplug.layers.attention.share_blocks import share_in_blocks
from megaplug.layers.attention.token_layout import TokenLayout

MIX_GRADS = ("exact", "detached")


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = True,
    offset: str = "kv_group",
    mix_grad: str = "exact",
    group: dist.ProcessGroup | None = None,
    layout: str = "contiguous",
    scale: float | None = None,
    heads: Heads | None = None,
    kernel: str = "auto",
    merge: str = "torch",
    block_size: int | None = None,
) -> Tensor:
    """Attention over dilated segments (LongNet, arXiv 2307.02486), mixed as one joint softmax.

    A key counts once for each branch in which a query reads it. A query that no branch has gets zeros.

    Args:
        q: ``[B, S, H, D]``, after any rotation by position. With a group, this rank's tokens.
        k: ``[B, S, G, D]``, G dividing H; query head h reads head ``h // (H / G)``.
        v: As k.
        segment_lengths: In tokens, one for each branch; need not divide the sequence, and may exceed it.
        dilation_rates: Of each segment every so many-th row; as many.
        causal: Whether a token sees only those before it and itself.
        offset: Which rows a head has: ``kv_group`` (its group modulo the rate), ``query_head`` (the head
            modulo the rate; sends ``min(H / G, rate)`` times the bytes) or ``torchscale_block`` (as
            torchscale does it).
        mix_grad: ``exact``; or ``detached``, in which no gradient goes through the mixing weights, as in
            torchscale, and every branch's output is kept.
        group: The ranks that share the sequence; None for one device. All of them call, in the same order.
        layout: With a group, how tokens are spread: ``contiguous``, or ``zigzag`` as Megatron's batches.
        scale: Factor on the scores; None takes ``1 / sqrt(D)``.
        heads: Which of a layer's heads these are, where tensor parallelism shards them; None where all are
            here.
        kernel: ``auto``, or one of ``block_kernels.KERNELS``.
        merge: By what blocks are put together: ``torch``, or ``triton`` on CUDA, in one pass over memory.
        block_size: The most tokens whose keys and values are in one message. A rank keeps a few messages at a
            time, so this bounds what it keeps of others, however long the sequence; more messages are sent.
            None sends all that a rank needs of another at once.

    Returns:
        ``[B, S, H, D]`` in the dtype of q.

    Raises:
        UserError: The sizes do not fit together, or an argument is unknown.
    """
    _check_tensors(q, k, v)
    # Kernels read the elements of a head as one piece; torch's on a CPU does so without a check.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    one_of("mix_grad", mix_grad, MIX_GRADS)
    block_size = message_size(block_size)
    check_group(group)
    pattern = branches(segment_lengths, dilation_rates)
    num_ranks = dist.get_world_size(group) if group is not None else 1
    rank = dist.get_rank(group) if group is not None else 0
    tokens = TokenLayout(layout, q.size(1) * num_ranks, num_ranks)
    if heads is None:
        heads = Heads(q.size(2), k.size(2))
    chosen = choose_kernel(q.device, q.dtype, kernel, q.size(3))
    merging = choose_merge(merge, q.device)
    exchange = Exchange(group) if group is not None else None
    factor = q.size(3) ** -0.5 if scale is None else scale
    most_weighed = chosen.most_weighed(q.dtype) if mix_grad == "exact" else 0
    parts = [pattern] if mix_grad == "exact" else [(branch,) for branch in pattern]
    works = tuple(
        Work(
            share_in_blocks(part, tokens, rank, heads, offset, causal, block_size, most_weighed),
            chosen,
            factor,
            exchange,
            merging,
        )
        for part in parts
    )
    if mix_grad == "exact":
        return JointAttention.apply(q, k, v, works[0])
    return DetachedAttention.apply(q, k, v, works)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    scale: float | None = None,
    kernel: str = "auto",
    merge: str = "torch",
    block_size: int | None = None,
) -> Tensor:
    """Every token with every other (or every one before it), the sequence spread over the ranks of a group.

    Arguments, shapes and errors are those of ``dilated_attention``: it is a single segment at rate 1.
    """
    num_ranks = dist.get_world_size(group) if group is not None else 1
    return dilated_attention(
        q, k, v, [q.size(1) * num_ranks], [1],
        causal=causal, group=group, layout=layout, scale=scale, kernel=kernel, merge=merge,
        block_size=block_size,
    )  # fmt: skip


def check_group(group: Any) -> None:
    """Refuse what is no process group.

    Raises:
        UserError: It is neither a group nor None.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise UserError(
            f"group is {group!r}",
            hint="give a group of torch.distributed that this rank is in, or None for one device",
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)}"
    fit = q.dim() == k.dim() == 4 and k.shape == v.shape and q.size(3) == k.size(3)
    if not fit or q.shape[:2] != k.shape[:2] or 0 in q.shape or 0 in k.shape or q.size(2) % k.size(2):
        raise UserError(
            f"dilated attention got {shapes}",
            hint="[batch, seq, heads, dim], with as many tokens and as long heads; "
            "the number of key-value heads divides that of query heads",
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
    ):  # fmt: skip
        raise UserError(f"dilated attention got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.is_cuda and q.size(3) % 8:
        raise UserError(
            f"dilated attention got heads of {q.size(3)} elements on CUDA",
            hint="its kernels take multiples of 8: fill up with zeros, and give the scale of the short heads",
        )
