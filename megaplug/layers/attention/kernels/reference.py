"""Attention of a block written out, every score in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from megaplug.layers.attention.kernels.interface import Block, BlockKernel
from megaplug.layers.attention.kernels.weighing import repeats_of_rows


class Reference(BlockKernel):
    """For fp64, to compare with, and where there is no other."""

    name = "reference"

    def most_weighed(self, dtype: torch.dtype) -> int:
        """As ``BlockKernel``."""
        return 1 << 24

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        scores = _scores(block)
        lse = scores.logsumexp(-1)
        p = (scores - lse[..., None]).exp()
        out = torch.einsum("bgnst,btgd->bsgnd", p, block.v.to(scores.dtype))
        return out.flatten(2, 3).to(block.q.dtype), lse.flatten(1, 2).transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        scores = _scores(block)
        split = (block.k.size(2), -1)
        q, d_wide, out_wide = (x.to(scores.dtype).unflatten(2, split) for x in (block.q, d_out, out))
        k, v = block.k.to(scores.dtype), block.v.to(scores.dtype)
        p = (scores - lse.transpose(1, 2).unflatten(1, split)[..., None]).exp()
        d_v = torch.einsum("bgnst,bsgnd->btgd", p, d_wide)
        delta = (d_wide * out_wide).sum(-1).permute(0, 2, 3, 1)
        d_scores = p * (torch.einsum("bsgnd,btgd->bgnst", d_wide, v) - delta[..., None]) * block.scale
        d_q = torch.einsum("bgnst,btgd->bsgnd", d_scores, k).flatten(2, 3)
        d_k = torch.einsum("bgnst,bsgnd->btgd", d_scores, q)
        return d_q.to(block.q.dtype), d_k.to(block.k.dtype), d_v.to(block.v.dtype)


def _scores(block: Block) -> Tensor:
    q, k = block.q, block.k
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).unflatten(2, (k.size(2), -1))
    scores = torch.einsum("bsgnd,btgd->bgnst", grouped, k.to(wide)) * block.scale
    if block.repeats:
        of_queries, of_keys = (repeats_of_rows(block.repeats, x, k.size(2)) for x in (q, k))
        fewest = torch.minimum(of_queries[:, :, None], of_keys[:, None, :])
        scores += fewest.to(scores).log1p().unsqueeze(1)
    if block.causal:
        size = (q.size(1), k.size(1))
        scores.masked_fill_(torch.ones(size, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return scores
