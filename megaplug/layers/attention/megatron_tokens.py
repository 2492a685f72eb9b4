"""Makes Megatron spread tokens in a chosen layout: its rotary angles and our batches; for the whole process.

Megatron itself knows zigzag only. Contiguous tokens halve the bytes that dilated attention sends, since a
rank has longer segments whole; under a causal mask the last rank then has the most to compute of those that
are split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.attention.token_layout import LAYOUTS

_layout = "zigzag"


def spread_as(layout: str) -> None:
    """Cut rotary angles so from now on; call it before a model is built.

    Raises:
        UserError: There is no such layout.
    """
    global _layout
    if layout not in LAYOUTS:
        raise UserError(f"there is no token layout {layout!r}", hint=f"one of: {', '.join(LAYOUTS)}")
    _layout = layout
    cut = rope_utils.get_pos_emb_on_this_cp_rank if layout == "zigzag" else contiguous_angles
    for module in (rotary_pos_embedding, yarn_rotary_pos_embedding):
        module.get_pos_emb_on_this_cp_rank = cut


def current_layout() -> str:
    """What ``spread_as`` was last given; zigzag until then."""
    return _layout


def contiguous_angles(pos_emb: Tensor, seq_dim: int, cp_group: torch.distributed.ProcessGroup) -> Tensor:
    """A rank's part of the angles of a whole sequence; takes the place of Megatron's function of zigzag."""
    # Megatron keeps what it gets: a view would keep the angles of the whole sequence.
    return pos_emb.chunk(cp_group.size(), seq_dim)[cp_group.rank()].clone()


def batch_of_rank(batch: Mapping[str, Any], cp_group: torch.distributed.ProcessGroup) -> dict[str, Any]:
    """A rank's part of a batch of whole sequences.

    Args:
        batch: ``[micro_batch, tokens]`` each, or None; a mask ``[micro_batch, 1, tokens, tokens]``.
        cp_group: The ranks that share a sequence.
    """
    if _layout == "zigzag":
        return get_batch_on_this_cp_rank(dict(batch), is_hybrid_cp=False, cp_group=cp_group)
    size, rank = cp_group.size(), cp_group.rank()
    return {
        key: None if x is None else x.chunk(size, 2 if key == "attention_mask" else 1)[rank].contiguous()
        for key, x in batch.items()
    }
