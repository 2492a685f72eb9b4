"""Grouped-query attention on torch's fused kernels.

Shape letters: S tokens, B micro-batch, H query heads, G key-value heads (groups), D elements a head.

The scores are never in memory and a key-value head is never repeated for the query heads that share it.
Scores and softmax are computed in fp32 (fp64 for fp64 inputs) whatever ``attention_softmax_in_fp32``
says; ``apply_query_key_layer_scaling`` divides and multiplies by the same number and changes nothing here.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaplug.errors import UserError
from megaplug.layers.attention.refusals import refuse_mask, refuse_unsupported
from megaplug.layers.attention.torch_kernel import NO_KERNEL, kernel_of

# Tokens times elements of a head, up to which a CPU is faster in fp32.
_SHORT_ON_CPU = 512 * 32
# MATH is missing on purpose: it keeps every score, and torch would fall back to it without a word.
# Under torch.use_deterministic_algorithms torch leaves cuDNN out, and the backward passes of the other two
# add up in a fixed order (aten/src/ATen/native/transformers/cuda/attention_backward.cu): fp32 keeps the
# efficient one.
_CUDA_KERNELS = {
    "auto": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
}
# A length to ask with which kernel is taken: none of them asks for more than one token.
_ANY_LENGTH = 128


class FlashAttention(MegatronModule):
    """A core attention for ``SelfAttentionSubmodules.core_attention``, called after RoPE.

    Args:
        config: Sizes of the whole model; heads are counted from the tensors, so tensor parallelism needs
            nothing from it.
        layer_number: The layer's number, from 1; unused.
        attn_mask_type: ``causal`` or ``no_mask``.
        attention_type: ``self`` or ``cross``; unused.
        attention_dropout: Probability of dropping a weight; None takes the config's. CUDA only.
        softmax_scale: Factor on the scores; None takes ``1 / sqrt(D)``.
        cp_comm_type: How a split sequence would communicate; unused, since it is refused.
        pg_collection: The process groups; unused.
        cuda_kernel: ``auto``, ``flash``, ``cudnn`` or ``efficient``.
        k_channels: Elements of a query or key head, as latent attention says; counted from the tensors.
        v_channels: Elements of a value head, likewise.
        **foreign: Whatever other backends' attentions take; refused by name unless None.

    Raises:
        UserError: The config asks for something that the kernels do not have.
    """

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
        cuda_kernel: str = "auto",
        k_channels: int | None = None,
        v_channels: int | None = None,
        **foreign: Any,
    ) -> None:
        super().__init__(config=config)
        more = {"context_parallel_size > 1": config.context_parallel_size > 1}
        hint = "leave it out, or use attention=te on CUDA"
        refuse_unsupported("flash attention", config, foreign, more, hint)
        refuse_mask("flash attention", attn_mask_type)
        if cuda_kernel not in _CUDA_KERNELS:
            raise UserError(
                f"flash attention has no cuda_kernel {cuda_kernel!r}", hint=f"one of {list(_CUDA_KERNELS)}"
            )
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout_p = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cuda_kernel = cuda_kernel

    def kernel_name(self) -> str:
        """Which of torch's kernels takes this layer's heads in the dtype of its parameters."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = self.config
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        shapes = ((1, count, _ANY_LENGTH, config.kv_channels) for count in (heads, groups, groups))
        q, k, v = (
            torch.empty(*s, dtype=config.params_dtype, device=device, requires_grad=True) for s in shapes
        )
        if not _knows_groups(q, self.cuda_kernel):
            k, v = q, q
        allowed = _CUDA_KERNELS[self.cuda_kernel] if device == "cuda" else [SDPBackend.FLASH_ATTENTION]
        causal = self.attn_mask_type == AttnMaskType.causal
        return f"torch's {kernel_of(allowed, q, k, v, causal=causal, dropout_p=self.dropout_p)}"

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
        """Attend.

        Args:
            query: ``[S, B, H, D]``, strided as it comes; the last dimension contiguous.
            key: ``[S, B, G, D]`` with G dividing H; query head ``h`` reads group ``h // (H / G)``.
            value: As the key; a head of latent attention may have another number of elements.
            attention_mask: Not read: the mask type says all, as in Transformer Engine.
            attn_mask_type: ``causal`` or ``no_mask``; None takes the constructor's.
            attention_bias: Has to be None.
            packed_seq_params: Has to be None.

        Returns:
            ``[S, B, H * D]``, D being that of the value.

        Raises:
            UserError: A bias, packed sequences, another mask, dropout on a CPU, or unfit sizes.
        """
        if packed_seq_params is not None:
            raise UserError(
                "flash attention cannot keep packed sequences apart", hint="attention=te can, on CUDA"
            )
        if attention_bias is not None:
            raise UserError(
                "flash attention takes no attention bias", hint="use rope, or attention=te on CUDA"
            )
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        refuse_mask("flash attention", mask_type)
        dropout_p = self.dropout_p if self.training else 0.0
        if dropout_p > 0 and query.device.type != "cuda":
            raise UserError(
                f"flash attention has no dropout on {query.device.type}; attention_dropout is {dropout_p}",
                hint="set model.attention_dropout=0",
            )
        # Heads are spread over the tensor-parallel ranks, so each rank has to draw its own pattern.
        rng: AbstractContextManager = get_cuda_rng_tracker().fork() if dropout_p > 0 else nullcontext()
        with rng:
            return fused_attention(
                query,
                key,
                value,
                causal=mask_type == AttnMaskType.causal,
                scale=self.softmax_scale,
                dropout_p=dropout_p,
                cuda_kernel=self.cuda_kernel,
            )


def fused_attention(
    q_SBHD: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    *,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    cuda_kernel: str = "auto",
) -> Tensor:
    """``softmax(scale * q k^T + mask) v`` in one of torch's fused kernels.

    torch's flash kernels take heads of one size only: shorter values, or queries and keys, are filled up with
    zeros, which changes no score, and the output is cut to the size of a value.

    Returns:
        ``[S, B, H * D]``, D being that of the value.

    Raises:
        UserError: The sizes do not fit together, or no fused kernel takes them.
    """
    v_size = v_SBGD.size(3)
    if v_size != q_SBHD.size(3):
        size = max(v_size, q_SBHD.size(3))
        q_SBHD, k_SBGD, v_SBGD = (
            # By nothing, it would still make a copy.
            x if x.size(3) == size else F.pad(x, (0, size - x.size(3)))
            for x in (q_SBHD, k_SBGD, v_SBGD)
        )
        out_SBX = fused_attention(
            q_SBHD, k_SBGD, v_SBGD, causal=causal, scale=scale, dropout_p=dropout_p, cuda_kernel=cuda_kernel
        )
        return out_SBX.unflatten(2, (-1, size))[..., :v_size].flatten(2)
    num_heads, num_groups = q_SBHD.size(2), k_SBGD.size(2)
    if causal and q_SBHD.size(0) != k_SBGD.size(0):
        raise UserError(
            f"causal flash attention got {q_SBHD.size(0)} queries and {k_SBGD.size(0)} keys",
            hint="give as many: kernels disagree on which corner another mask starts from",
        )
    if 0 in k_SBGD.shape or num_heads % num_groups:
        raise UserError(
            f"flash attention cannot share {tuple(k_SBGD.shape)} keys among {num_heads} query heads"
        )
    knows_groups = num_heads == num_groups or _knows_groups(q_SBHD, cuda_kernel)
    attend = _attend if knows_groups else attend_groups_as_batch
    return attend(q_SBHD, k_SBGD, v_SBGD, causal, scale, dropout_p, cuda_kernel).flatten(2)


def _knows_groups(query: Tensor, cuda_kernel: str) -> bool:
    """CUDA's efficient kernel, the only one with fp32, does not know groups."""
    return not query.is_cuda or (query.dtype != torch.float32 and cuda_kernel != "efficient")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, kernel: str
) -> Tensor:
    """One call of the kernel on ``[S, B, heads, D]``; all transpositions are views."""
    if _is_faster_in_fp32(k):
        wide = _attend(q.float(), k.float(), v.float(), causal, scale, dropout_p, kernel)
        return wide.to(q.dtype)
    backends = _CUDA_KERNELS[kernel] if q.is_cuda else [SDPBackend.FLASH_ATTENTION]
    q_BHSD, k_BGSD, v_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
    try:
        with sdpa_kernel(backends):
            out_BHSD = F.scaled_dot_product_attention(
                q_BHSD,
                k_BGSD,
                v_BGSD,
                dropout_p=dropout_p,
                is_causal=causal,
                scale=scale,
                enable_gqa=q.size(2) != k.size(2),
            )
    except RuntimeError as error:
        if not str(error).startswith(NO_KERNEL):
            raise
        tried = ", ".join(backend.name.lower() for backend in backends)
        raise UserError(
            f"no fused kernel ({tried}) takes {q.dtype} queries "
            f"{tuple(q.shape)} with keys {tuple(k.shape)} and values {tuple(v.shape)} on {q.device}",
            hint="torch's warnings above give each kernel's reason; attention=local takes anything",
            exit_code=1,
        ) from error
    return out_BHSD.permute(2, 0, 1, 3)


def _is_faster_in_fp32(k_SBGD: Tensor) -> bool:
    """Whether torch's CPU kernel takes longer for these in bf16 than in fp32, conversions included.

    It packs every bf16 block anew. Measured forward and backward on an EPYC with AVX-512: bf16 takes 2.5x as
    long at S = 128 and D = 32, 1.4x at 256 and 32, 1.05x at 512 and 32 or 256 and 64, and 0.9x beyond.
    """
    narrow = k_SBGD.dtype in (torch.bfloat16, torch.float16)
    return narrow and not k_SBGD.is_cuda and k_SBGD.size(0) * k_SBGD.size(3) <= _SHORT_ON_CPU


def attend_groups_as_batch(
    q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, causal: bool, scale: float, dropout_p: float, kernel: str
) -> Tensor:
    """Groups without a kernel that knows them, in one call and without repeating K and V.

    Every group becomes a sequence of its own, whose heads see the same K and V: those have a stride of 0 from
    head to head. All of it is views where the tensors come from one projection, as Megatron's do.
    """
    num_groups = k_SBGD.size(2)
    heads_of_group = q_SBHD.size(2) // num_groups
    q_SCND = q_SBHD.unflatten(2, (num_groups, heads_of_group)).flatten(1, 2)
    k_SCND, v_SCND = (
        tensor.flatten(1, 2).unsqueeze(2).expand(-1, -1, heads_of_group, -1) for tensor in (k_SBGD, v_SBGD)
    )
    out_SCND = _attend(q_SCND, k_SCND, v_SCND, causal, scale, dropout_p, kernel)
    return out_SCND.unflatten(1, (-1, num_groups)).flatten(2, 3)
