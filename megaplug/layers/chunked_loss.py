"""Output layer and cross-entropy in chunks of tokens: the logits of all tokens never exist at once.

Shape letters: S tokens of a rank, B micro-batch, H channels, V the words that this rank holds, T all tokens:
S * B, times the ranks that sequence parallelism cuts S over.

Kept for the backward pass are the hidden states, which are there anyway, and three numbers a token. The
logits of a chunk are computed again in the backward pass, become their own gradient, and are gone before the
next: one product with the vocabulary more, four for three. Gradients that the forward pass already computed
would save that product, but it would have to know what the losses are multiplied with afterwards (masks,
numbers of tokens, loss scale), and to keep a second gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.cross_entropy import become_gradient, over_ranks, summed_and_predicted, words_of_rank


@dataclass(frozen=True)
class Cut:
    """How the work is shared out.

    Attributes:
        chunk: Tokens whose logits exist at once.
        group: The tensor-parallel ranks; rank r holds the words from ``r * V``.
        sequence_parallel: Whether each of them holds a part of the hidden states.
        factor: On the logits.
    """

    chunk: int
    group: Any
    sequence_parallel: bool = False
    factor: float = 1.0


def chunked_cross_entropy(hidden_SBH: Tensor, weight_VH: Tensor, targets_SB: Tensor, cut: Cut) -> Tensor:
    """``log(sum(exp(logits))) - logits[target]`` with ``logits = factor * hidden @ weight.T``, in nats.

    The gradient of the weight is summed up over chunks in at least fp32, that of the hidden states over
    ranks.

    Args:
        hidden_SBH: What comes out of the last norm; this rank's part under sequence parallelism.
        weight_VH: This rank's part of the vocabulary.
        targets_SB: Words of the whole vocabulary, of all tokens.
        cut: How the work is shared out.

    Returns:
        As ``targets_SB``, in fp32 (fp64 for fp64 hidden states).
    """
    return _ChunkedCrossEntropy.apply(hidden_SBH, weight_VH, targets_SB, cut)


def output_layer_loss(
    output_layer: torch.nn.Module,
    hidden_SBH: Tensor,
    targets_SB: Tensor,
    chunk: int,
    *,
    weight_VH: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """The losses of Megatron's output layer without its logits; see ``chunked_cross_entropy``.

    Args:
        output_layer: Of ``GPTModel``.
        hidden_SBH: Its input.
        targets_SB: The words that come next.
        chunk: Tokens whose logits exist at once.
        weight_VH: The tied embedding's weight; None for the layer's own.
        factor: On the logits.

    Raises:
        UserError: The layer is not Megatron's own, or has a bias.
    """
    if type(output_layer) is not ColumnParallelLinear or output_layer.bias is not None:
        raise UserError(
            f"chunks know ColumnParallelLinear without a bias, not {type(output_layer).__name__}",
            hint="leave train.loss_chunk_tokens out",
        )
    # Its weight is read, and it is never called: Megatron waits before its forward pass until the weight has
    # come from the ranks that have updated it (``overlap_param_gather``).
    for before in output_layer._forward_pre_hooks.values():
        before(output_layer, (hidden_SBH,))
    cut = Cut(chunk, output_layer.tp_group, output_layer.sequence_parallel, factor)
    weight_VH = output_layer.weight if weight_VH is None else weight_VH
    return chunked_cross_entropy(hidden_SBH, weight_VH, targets_SB, cut)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, weight_VH: Tensor, targets_SB: Tensor, cut: Cut) -> Tensor:
        whole_TH = _whole(hidden_SBH, cut)
        target_T, elsewhere_T = words_of_rank(targets_SB, weight_VH.size(0), cut.group)
        parts = [
            summed_and_predicted(
                _logits(whole_TH[chunk], weight_VH, cut), target_T[chunk], elsewhere_T[chunk]
            )
            for chunk in _chunks(whole_TH.size(0), cut.chunk)
        ]
        log_sum_T, predicted_T = (torch.cat(each) for each in zip(*parts, strict=True))
        log_sum_T, predicted_T = over_ranks(log_sum_T, predicted_T, cut.group)
        ctx.save_for_backward(hidden_SBH, weight_VH, log_sum_T, target_T, elsewhere_T)
        ctx.cut = cut
        return (log_sum_T - predicted_T).view(targets_SB.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_SBH, weight_VH, log_sum_T, target_T, elsewhere_T = ctx.saved_tensors
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        cut, grad_T = ctx.cut, grads[0].reshape(-1)
        whole_TH = _whole(hidden_SBH, cut)
        d_whole_TH = torch.empty_like(whole_TH) if wants_hidden else None
        d_weight_VH: Tensor | None = None
        for chunk in _chunks(whole_TH.size(0), cut.chunk):
            rows = whole_TH[chunk]
            logits = _logits(rows, weight_VH, cut)
            become_gradient(logits, log_sum_T[chunk], target_T[chunk], elsewhere_T[chunk], grad_T[chunk])
            if cut.factor != 1.0:
                logits.mul_(cut.factor)
            if d_whole_TH is not None:
                torch.mm(logits, weight_VH, out=d_whole_TH[chunk])
            if wants_weight:
                d_weight_VH = _added(d_weight_VH, logits.t(), rows)
            del logits
        d_hidden = None if d_whole_TH is None else _part(d_whole_TH.view(-1, *hidden_SBH.shape[1:]), cut)
        del d_whole_TH
        d_weight = None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype)
        return d_hidden, d_weight, None, None


def _logits(rows_TH: Tensor, weight_VH: Tensor, cut: Cut) -> Tensor:
    logits_TV = rows_TH @ weight_VH.t()
    return logits_TV if cut.factor == 1.0 else logits_TV.mul_(cut.factor)


def _whole(hidden_SBH: Tensor, cut: Cut) -> Tensor:
    """All hidden states, token after token; gathered in the buffer that Megatron's linear layers use."""
    if cut.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=cut.group, use_global_buffer=True)
    return hidden_SBH.reshape(-1, hidden_SBH.size(-1))


def _part(d_hidden_SBH: Tensor, cut: Cut) -> Tensor:
    """What ranks have found of the gradient of all hidden states, added up; this rank's part of it."""
    if cut.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(d_hidden_SBH, group=cut.group)
    if cut.group.size() > 1:
        torch.distributed.all_reduce(d_hidden_SBH, group=cut.group)
    return d_hidden_SBH


def _added(total_VH: Tensor | None, d_logits_VT: Tensor, rows_TH: Tensor) -> Tensor:
    """The sum of the chunks' gradients, in fp32 from the product on: rounded once, as an unchunked one is."""
    wide = torch.promote_types(rows_TH.dtype, torch.float32)
    if wide == rows_TH.dtype:
        return d_logits_VT @ rows_TH if total_VH is None else total_VH.addmm_(d_logits_VT, rows_TH)
    if rows_TH.device.type == "cpu":  # it has no product of narrower numbers in fp32
        found_VH = d_logits_VT.to(wide) @ rows_TH.to(wide)
    else:
        found_VH = torch.mm(d_logits_VT, rows_TH, out_dtype=wide)
    return found_VH if total_VH is None else total_VH.add_(found_VH)


def _chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk):
        yield slice(start, start + chunk)
