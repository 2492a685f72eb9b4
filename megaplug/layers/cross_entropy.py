"""Cross-entropy of logits whose vocabulary may be split over tensor-parallel ranks, without a copy of them.

Shape letters: S tokens, B micro-batch, V the words that this rank holds, T = S * B.

Megatron's own writes the logits to memory about eight times, and keeps an fp32 softmax of bf16 logits. Here
they are read once going forward, and going backward they become their own gradient, in pieces that fit the
cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements that are worked on at a time: 2 MiB of fp32 on a CPU, on CUDA enough to fill it.
_ELEMENTS_ON_CPU = 1 << 19
_ELEMENTS_ON_CUDA = 1 << 26


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor, targets_SB: Tensor, group: torch.distributed.ProcessGroup
) -> Tensor:
    """``log(sum(exp(logits))) - logits[target]`` of every token, in nats.

    With ``p = exp(logits - log_sum)`` the gradient of the logits is ``(p - one_hot(target)) * g``. It takes
    the logits' own memory: the backward pass spoils them, and a second one over the same graph raises.

    Args:
        logits_SBV: This rank's part of the vocabulary, contiguous; any type, computed in at least fp32.
        targets_SB: Words of the whole vocabulary.
        group: The tensor-parallel ranks; rank r holds the words from ``r * V``.

    Returns:
        ``[S, B]``, in fp32 (fp64 for fp64 logits).
    """
    return _CrossEntropy.apply(logits_SBV, targets_SB, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, targets_SB: Tensor, group: Any) -> Tensor:
        logits_TV = logits_SBV.view(-1, logits_SBV.size(-1))
        target_T, elsewhere_T = words_of_rank(targets_SB, logits_TV.size(1), group)
        parts = summed_and_predicted(logits_TV, target_T, elsewhere_T)
        log_sum_T, predicted_T = over_ranks(*parts, group)
        ctx.save_for_backward(logits_SBV, log_sum_T, target_T, elsewhere_T)
        return (log_sum_T - predicted_T).view(targets_SB.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_SBV, log_sum_T, target_T, elsewhere_T = ctx.saved_tensors
        logits_TV = logits_SBV.view(-1, logits_SBV.size(-1))
        become_gradient(logits_TV, log_sum_T, target_T, elsewhere_T, grads[0].reshape(-1))
        return logits_SBV, None, None


def words_of_rank(targets_SB: Tensor, num_words: int, group: Any) -> tuple[Tensor, Tensor]:
    """``[T]`` each: targets as this rank counts its words, 0 where another has them, and whether one has."""
    target_T = targets_SB.reshape(-1) - group.rank() * num_words
    elsewhere_T = (target_T < 0) | (target_T >= num_words)
    return target_T.masked_fill_(elsewhere_T, 0), elsewhere_T


def summed_and_predicted(logits_TV: Tensor, target_T: Tensor, elsewhere_T: Tensor) -> tuple[Tensor, Tensor]:
    """``log(sum(exp(logits)))`` over this rank's words, and the target's logit, 0 where another has it."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    log_sum_T = torch.empty(logits_TV.size(0), dtype=wide, device=logits_TV.device)
    for piece in _pieces(logits_TV):
        torch.logsumexp(logits_TV[piece].to(wide), -1, out=log_sum_T[piece])
    predicted_T = logits_TV.gather(1, target_T[:, None]).squeeze(1).to(wide)
    return log_sum_T, predicted_T.masked_fill_(elsewhere_T, 0.0)


def become_gradient(
    logits_TV: Tensor, log_sum_T: Tensor, target_T: Tensor, elsewhere_T: Tensor, grad_T: Tensor
) -> None:
    """Overwrite logits with their gradient, given that of the losses."""
    minus_one_hot_T1 = elsewhere_T.to(log_sum_T.dtype).sub_(1.0)[:, None]
    for piece in _pieces(logits_TV):
        logits = logits_TV[piece]
        # Their own memory where it is wide enough.
        p = logits.to(log_sum_T.dtype)
        p = p.sub_(log_sum_T[piece, None]).exp_()
        p.scatter_add_(1, target_T[piece, None], minus_one_hot_T1[piece]).mul_(grad_T[piece, None])
        if p.dtype != logits.dtype:
            logits.copy_(p)


def over_ranks(log_sum_T: Tensor, predicted_T: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Both over the whole vocabulary, from each rank's part."""
    if group.size() == 1:
        return log_sum_T, predicted_T
    largest_T = log_sum_T.clone()
    torch.distributed.all_reduce(largest_T, torch.distributed.ReduceOp.MAX, group)
    sums_2T = torch.stack([(log_sum_T - largest_T).exp_(), predicted_T])
    torch.distributed.all_reduce(sums_2T, torch.distributed.ReduceOp.SUM, group)
    return sums_2T[0].log_().add_(largest_T), sums_2T[1]


def _pieces(logits_TV: Tensor) -> Iterator[slice]:
    elements = _ELEMENTS_ON_CUDA if logits_TV.is_cuda else _ELEMENTS_ON_CPU
    rows = max(1, elements // logits_TV.size(1))
    for start in range(0, logits_TV.size(0), rows):
        yield slice(start, start + rows)
