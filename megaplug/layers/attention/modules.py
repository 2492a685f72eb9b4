"""Dilated attention as plain torch modules, for one device or a process group; no Megatron.

The constructors take what the billion-token guide's classes take, with the meaning that each name can have
here.

Shape letters: B sequences, S tokens of a rank, E embedding, H heads, D elements a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaplug.errors import UserError
from megaplug.layers.attention.block_kernels import check_name
from megaplug.layers.attention.describe import Sizes, describe
from megaplug.layers.attention.dilated import MIX_GRADS, check_group, dilated_attention
from megaplug.layers.attention.given import message_size, one_of, positive, whole
from megaplug.layers.attention.merging import MERGES
from megaplug.layers.attention.pattern import OFFSETS, branches
from megaplug.layers.attention.token_layout import LAYOUTS


class RingDilatedAttention(nn.Module):
    """Dilated attention of queries, keys and values; it has no parameters.

    Args:
        segment_lengths: In tokens of the whole sequence, one for each branch.
        dilation_rates: As many.
        dropout: Has to be 0: no kernel that gives log-sum-exps drops weights on a CPU, and LongNet was
            trained with 0.
        ring_size: How many ranks share a sequence; checked against the group. None takes the group's.
        block_size: The most tokens whose keys and values are in one message between ranks: bounds what a
            rank keeps of others. None is any number.
        use_checkpointing: Whether the backward pass computes the output again and does not keep it.
        offset: ``kv_group``, ``query_head`` or ``torchscale_block``; see ``dilated_attention``.
        mix_grad: ``exact`` or ``detached``.
        group: The ranks that share a sequence; None is one device.
        layout: How its tokens are spread: ``contiguous`` or ``zigzag``.
        kernel: What computes a block: ``auto``, or one of ``block_kernels.KERNELS``.
        merge: By what blocks are put together: ``torch``, or ``triton`` on CUDA.

    Raises:
        UserError: A dropout, a pattern or an option that cannot be, or another number of ranks than the group
            has.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        ring_size: int | None = None,
        block_size: int | None = None,
        use_checkpointing: bool = False,
        *,
        offset: str = "kv_group",
        mix_grad: str = "exact",
        group: dist.ProcessGroup | None = None,
        layout: str = "contiguous",
        kernel: str = "auto",
        merge: str = "torch",
    ) -> None:
        super().__init__()
        if dropout != 0:  # nor is NaN a dropout
            raise UserError(
                f"dilated attention has no dropout of its weights; {dropout} was asked",
                hint="use dropout=0, and torch.nn.Dropout on what comes out of the layer",
            )
        pattern = branches(segment_lengths, dilation_rates)
        block_size = message_size(block_size)
        one_of("offset", offset, OFFSETS)
        one_of("mix_grad", mix_grad, MIX_GRADS)
        one_of("token layout", layout, LAYOUTS)
        one_of("merge", merge, MERGES)
        check_name(kernel)
        check_group(group)
        num_ranks = dist.get_world_size(group) if group is not None else 1
        if ring_size is not None and ring_size != num_ranks:
            raise UserError(
                f"ring_size is {ring_size}, and {num_ranks} ranks share the sequence",
                hint="give a process group of that size, or leave ring_size out",
            )
        self.segment_lengths = [branch.segment_length for branch in pattern]
        self.dilation_rates = [branch.rate for branch in pattern]
        self.use_checkpointing = use_checkpointing
        self.num_ranks = num_ranks
        self.options: dict[str, Any] = {
            "offset": offset, "mix_grad": mix_grad, "group": group, "layout": layout,
            "block_size": block_size, "kernel": kernel, "merge": merge,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """Attend.

        Args:
            q: ``[B, S, H, D]``, this rank's tokens.
            k: ``[B, S, G, D]``, G dividing H.
            v: As k.
            is_causal: Whether a token sees only those before it and itself.

        Returns:
            ``[B, S, H, D]``.

        Raises:
            UserError: Sizes that do not fit.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pattern = (self.segment_lengths, self.dilation_rates)
            return dilated_attention(q, k, v, *pattern, causal=is_causal, **self.options)

        if self.use_checkpointing and torch.is_grad_enabled():
            return checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
        return attend(q, k, v)

    def get_memory_info(self, sizes: Sizes, is_causal: bool = True) -> dict[str, Any]:
        """What a layer of these sizes costs and reaches, all derived; see ``describe``.

        Args:
            sizes: ``Sizes(num_tokens, num_heads, num_kv_heads, head_dim)``, tokens of all ranks together.
            is_causal: As of ``forward``.

        Raises:
            UserError: They are no ``Sizes``, or the tokens cannot be spread over the ranks.
        """
        return describe(
            sizes,
            self.segment_lengths,
            self.dilation_rates,
            num_ranks=self.num_ranks,
            layout=self.options["layout"],
            offset=self.options["offset"],
            causal=is_causal,
        )


class RingMultiheadDilatedAttention(nn.Module):
    """The same with its projections, and MAGNETO's norm and initial weights.

    Wang et al. 2022, arXiv 2210.06423.

    Args:
        embed_dim: E, of what comes in and goes out.
        num_heads: H, dividing E.
        segment_lengths: In tokens of the whole sequence.
        dilation_rates: As many.
        dropout: Has to be 0.
        ring_size: As of ``RingDilatedAttention``; so are block_size and use_checkpointing.
        block_size: See there.
        use_checkpointing: See there.
        layer_norm: Whether what the heads give is normed before the last projection (MAGNETO's sub-LN).
        gamma_init: Xavier gain of the value's and the last projection; the others' is 1. MAGNETO's is
            ``sqrt(log(2 M))`` of a decoder of M layers.
        bias: Whether projections have one; they begin as zeros.
        **options: ``offset``, ``mix_grad``, ``group``, ``layout``, ``kernel`` and ``merge`` of
            ``RingDilatedAttention``.

    Raises:
        UserError: The heads do not divide the embedding, a size or the gain is not positive, or from
            ``RingDilatedAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        ring_size: int | None = None,
        block_size: int | None = None,
        use_checkpointing: bool = False,
        layer_norm: bool = True,
        gamma_init: float = 1.0,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        embed_dim, num_heads = whole("embed_dim", embed_dim), whole("num_heads", num_heads)
        if embed_dim % num_heads:
            fit = [heads for heads in range(1, embed_dim + 1) if embed_dim % heads == 0]
            raise UserError(
                f"{num_heads} heads do not divide an embedding of {embed_dim}",
                hint=f"use {min(fit, key=lambda heads: abs(heads - num_heads))} heads",
            )
        gain_hint = "give a number above 0: 1, or sqrt(log(2 M)) for a decoder of M layers"
        gamma_init = positive("gamma_init", gamma_init, gain_hint)
        self.num_heads = num_heads
        self.attention = RingDilatedAttention(
            segment_lengths, dilation_rates, dropout, ring_size, block_size, use_checkpointing, **options
        )
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4)
        )
        self.norm = nn.LayerNorm(embed_dim) if layer_norm else nn.Identity()
        gains = (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, gamma_init),
            (self.out_proj, gamma_init),
        )
        for projection, gain in gains:
            nn.init.xavier_normal_(projection.weight, gain)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, None]:
        """``[B, S, E]`` each, key and value being the query where they are left out; the output and None."""
        key = query if key is None else key
        value = key if value is None else value
        split = (self.num_heads, -1)
        q = self.q_proj(query).unflatten(-1, split)
        k = self.k_proj(key).unflatten(-1, split)
        v = self.v_proj(value).unflatten(-1, split)
        out = self.attention(q, k, v, is_causal=is_causal).flatten(2)
        return self.out_proj(self.norm(out)), None

    def get_memory_info(self, num_tokens: int, batch_size: int = 1, is_causal: bool = True) -> dict[str, Any]:
        """What the attention of so many tokens costs and reaches, all derived; see ``describe``.

        Args:
            num_tokens: Of all ranks together.
            batch_size: Sequences.
            is_causal: As of ``forward``.

        Raises:
            UserError: One is no integer of at least 1, or the tokens cannot be spread over the ranks.
        """
        weight = self.q_proj.weight
        sizes = Sizes(
            num_tokens, self.num_heads, self.num_heads, weight.size(0) // self.num_heads,
            weight.element_size(), batch_size,
        )  # fmt: skip
        return self.attention.get_memory_info(sizes, is_causal)
