"""Ring and dilated attention as Megatron's core attention, over the ranks that share a sequence.

Shape letters: S tokens of a rank, B micro-batch, H query heads of a rank, G its key-value heads, D elements a
head.

Queries and keys come rotated by their positions in the whole sequence, and spread as Megatron's batches and
rotary angles are: zigzag, or contiguous (``token_layout.TokenLayout``).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.attention.block_kernels import choose_kernel
from megaplug.layers.attention.dilated import dilated_attention
from megaplug.layers.attention.megatron_tokens import current_layout
from megaplug.layers.attention.pattern import Heads, branches
from megaplug.layers.attention.refusals import refuse_mask, refuse_unsupported


class RingAttention(MegatronModule):
    """Dense attention over any number of context-parallel ranks, without Transformer Engine.

    Args:
        config: Sizes of the whole model.
        layer_number: The layer's number, from 1; unused.
        attn_mask_type: ``causal`` or ``no_mask``.
        attention_type: ``self``; unused.
        attention_dropout: Has to be 0; None takes the config's.
        softmax_scale: Factor on the scores; None takes ``1 / sqrt(D)``.
        cp_comm_type: How Transformer Engine would communicate; unused: only what a rank needs is sent to it.
        pg_collection: The process groups; None takes Megatron's own.
        num_query_groups: Key-value heads of the whole layer: Megatron hands a changed config where there
            are fewer of them than tensor-parallel ranks. None takes the config's.
        token_layout: How the tokens are spread over the ranks; has to be that of Megatron's rotary angles
            and of the batches (``megatron_tokens.spread_as``).
        kernel: ``auto``, or one of ``block_kernels.KERNELS``.
        merge: By what blocks are put together: ``torch``, or ``triton`` on CUDA.
        block_size: The most tokens whose keys and values are in one message; None is any number.
        **foreign: Whatever other attentions take; refused by name unless None.

    Raises:
        UserError: The config asks for something that this attention does not have.
    """

    # Asked by the layer builder.
    takes_num_query_groups = True
    _what = "ring attention"

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        num_query_groups: int | None = None,
        token_layout: str = "zigzag",
        kernel: str = "auto",
        merge: str = "torch",
        block_size: int | None = None,
        **foreign: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        more = {f"attention_dropout={dropout}": dropout > 0}
        refuse_unsupported(self._what, config, foreign, more, "leave it out, or use attention=flash or te")
        refuse_mask(self._what, attn_mask_type)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.token_layout = token_layout
        self.kernel = kernel
        self.merge = merge
        self.block_size = block_size
        groups = pg_collection
        self.cp_group = groups.cp if groups is not None else parallel_state.get_context_parallel_group()
        if self.cp_group.size() > 1 and token_layout != current_layout():
            raise UserError(
                f"{self._what} is for {token_layout} tokens, and batches and angles are {current_layout()}",
                hint="launch/train.py spreads them so; Megatron's own scripts know zigzag only",
            )
        tp_group = groups.tp if groups is not None else parallel_state.get_tensor_model_parallel_group()
        self._tp_rank = tp_group.rank()
        self._total_groups = num_query_groups or config.num_query_groups or config.num_attention_heads

    def kernel_name(self) -> str:
        """Which kernel takes a block of rows in the dtype of this layer's parameters."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return choose_kernel(device, self.config.params_dtype, self.kernel).name

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; every rank of the sequence has to come here, in the same order.

        Args:
            query: ``[S, B, H, D]``, of this rank's tokens.
            key: ``[S, B, G, D]`` with G dividing H; query head ``h`` reads group ``h // (H / G)``.
            value: As the key.
            attention_mask: Not read: the mask type says all.
            attn_mask_type: ``causal`` or ``no_mask``; None takes the constructor's.
            attention_bias: Has to be None.
            packed_seq_params: Has to be None.

        Returns:
            ``[S, B, H * D]``.

        Raises:
            UserError: A bias, packed sequences, another mask, or unfit sizes.
        """
        if packed_seq_params is not None:
            raise UserError(f"{self._what} cannot keep packed sequences apart")
        if attention_bias is not None:
            raise UserError(f"{self._what} takes no attention bias", hint="use rope")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        refuse_mask(self._what, mask_type)
        size = self.cp_group.size()
        lengths, rates, options = self._pattern(query.size(0) * size)
        out_BSHD = dilated_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            lengths,
            rates,
            causal=mask_type == AttnMaskType.causal,
            group=self.cp_group if size > 1 else None,
            layout=self.token_layout,
            scale=self.softmax_scale,
            heads=self._heads(query.size(2), key.size(2)),
            kernel=self.kernel,
            merge=self.merge,
            block_size=self.block_size,
            **options,
        )
        return out_BSHD.transpose(0, 1).flatten(2)

    def _pattern(self, num_tokens: int) -> tuple[list[int], list[int], dict[str, Any]]:
        return [num_tokens], [1], {}

    def _heads(self, num_heads: int, num_groups: int) -> Heads:
        """Where this rank's heads stand among all."""
        total = self.config.num_attention_heads
        return Heads(num_heads, num_groups, self._tp_rank * num_heads, total, total // self._total_groups)


class RingDilatedAttention(RingAttention):
    """LongNet's dilated attention, exact, over any number of context-parallel ranks.

    Args:
        *args: As of ``RingAttention``.
        segment_lengths: In tokens of the whole sequence, one for each branch; empty takes a quarter, a half
            and the whole of the sequence, at the rates 1, 2 and 4.
        dilation_rates: Of each segment every so many-th row; as many.
        offset: How heads get their rows: ``kv_group``, ``query_head`` or ``torchscale_block``.
        mix_grad: ``exact``, or ``detached`` as in torchscale.
        **kwargs: As of ``RingAttention``.

    Raises:
        UserError: From ``RingAttention``, or segments and rates that do not fit together.
    """

    _what = "dilated attention"

    def __init__(
        self,
        *args: Any,
        segment_lengths: list[int] | tuple[int, ...] = (),
        dilation_rates: list[int] | tuple[int, ...] = (),
        offset: str = "kv_group",
        mix_grad: str = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if segment_lengths or dilation_rates:
            branches(segment_lengths, dilation_rates)
        self.segment_lengths = list(segment_lengths)
        self.dilation_rates = list(dilation_rates)
        self.options: dict[str, Any] = {"offset": offset, "mix_grad": mix_grad}

    def _pattern(self, num_tokens: int) -> tuple[list[int], list[int], dict[str, Any]]:
        if self.segment_lengths:
            return self.segment_lengths, self.dilation_rates, self.options
        return [max(1, num_tokens // part) for part in (4, 2, 1)], [1, 2, 4], self.options


class DilatedAttention(RingDilatedAttention):
    """The same for sequences that are whole on every rank."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size > 1:
            raise UserError(
                f"attention=dilated cannot split a sequence over {config.context_parallel_size} ranks",
                hint="attention=ring_dilated can",
            )
        super().__init__(config, *args, **kwargs)
