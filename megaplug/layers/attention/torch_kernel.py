"""Which of torch's fused attention kernels takes given tensors; torch is asked, nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# How torch begins to say that none of the allowed kernels takes the tensors.
NO_KERNEL = ("No available kernel", "No viable backend")


def kernel_of(
    allowed: Sequence[SDPBackend],
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    causal: bool,
    dropout_p: float,
) -> str:
    """The kernel's name in small letters, such as ``flash_attention``; ``no kernel`` where none takes them.

    Args:
        allowed: Those that may be taken; torch's own order decides among them.
        q_BHSD: Queries; whether they require a gradient counts, too.
        k_BGSD: Keys of as many heads, or of fewer that are shared.
        v_BGSD: As the keys.
        causal: Whether a token sees only those before it.
        dropout_p: Probability of dropping a weight.
    """
    with sdpa_kernel(list(allowed)):
        try:
            shares = q_BHSD.size(1) != k_BGSD.size(1)
            choice = torch._fused_sdp_choice(
                q_BHSD, k_BGSD, v_BGSD, None, dropout_p, causal, scale=None, enable_gqa=shares
            )
        except RuntimeError as error:
            if not str(error).startswith(NO_KERNEL):
                raise
            return "no kernel"
    names = {int(kind): name.lower() for name, kind in SDPBackend.__members__.items()}
    return names[choice]
