"""The flash-attn packages where they are installed: FlashAttention-2 (from 2.7 on), 3 and 4, for blocks.

The functions below are what those packages' own autograd functions call, with the arguments that they have in
flash_attn/flash_attn_interface.py (2.7 to 2.8), hopper/flash_attn_interface.py and
flash_attn/cute/interface.py (August 2026) of Dao-AILab/flash-attention. All take ``[B, S, H, D]`` with groups
and the log-sum-exp ``[B, H, S]`` in fp32. None of them has been run by this project yet.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.attention.kernels.interface import Block, BlockKernel


class InstalledKernel(BlockKernel):
    """What the three have in common.

    Attributes:
        package: What to install, for a hint.
        modules: What has to be there; the functions are in the first.
        functions: Names of the forward and the backward function.
    """

    package: str
    modules: tuple[str, ...]
    functions: tuple[str, str]

    def is_installed(self) -> bool:
        """Whether all its modules can be found; none is imported, but for packages above them."""
        try:
            return all(find_spec(module) is not None for module in self.modules)
        except ModuleNotFoundError:  # the package above one is not there
            return False

    def check(self) -> None:
        """Refuse what is not there.

        Raises:
            UserError: It is not installed, or in a version with other functions.
        """
        hint = f"install {self.package}, or use kernel=auto"
        if not self.is_installed():
            raise UserError(
                f"{self.name} is not installed: there is no {' or no '.join(self.modules)}", hint=hint
            )
        for name in self.functions:
            function = getattr(importlib.import_module(self.modules[0]), name, None)
            # Both have this parameter since they are called as here.
            if function is None or "window_size_left" not in _parameters(function):
                raise UserError(f"{self.modules[0]} has no {name} with window_size_left", hint=hint)

    def _call(self, which: int, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(self.modules[0]), self.functions[which])(*args, **kwargs)


class FlashAttention2(InstalledKernel):
    """bf16 and fp16, from Ampere on."""

    name = "flash-attn 2"
    package = "flash-attn>=2.7"
    modules = ("flash_attn.flash_attn_interface",)
    functions = ("_flash_attn_forward", "_flash_attn_backward")

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = self._call(
            0, block.q, block.k, block.v, dropout_p=0.0, softmax_scale=block.scale, causal=block.causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return found[0], found[1].transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        grads = _places(block)
        self._call(
            1, d_out, block.q, block.k, block.v, out, lse.transpose(1, 2).contiguous(), *grads, dropout_p=0.0,
            softmax_scale=block.scale, causal=block.causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


class FlashAttention3(InstalledKernel):
    """bf16 and fp16, on Hopper."""

    name = "flash-attn 3"
    package = "flash-attn 3 from the folder hopper of Dao-AILab/flash-attention"
    modules = ("flash_attn_interface", "flash_attn_3")
    functions = ("_flash_attn_forward", "_flash_attn_backward")

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = self._call(0, block.q, block.k, block.v, softmax_scale=block.scale, causal=block.causal)
        return found[0], found[1].transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        d_q, d_k, d_v = _places(block)
        self._call(
            1, d_out, block.q, block.k, block.v, out, lse.transpose(1, 2).contiguous(),
            dq=d_q, dk=d_k, dv=d_v, softmax_scale=block.scale, is_causal=block.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return d_q, d_k, d_v


class FlashAttention4(InstalledKernel):
    """bf16 and fp16, from Hopper on; written in CuTe DSL and compiled at its first call."""

    name = "flash-attn 4"
    package = "flash-attn-4"
    modules = ("flash_attn.cute.interface",)
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """As ``BlockKernel``."""
        found = self._call(
            0, block.q, block.k, block.v, softmax_scale=block.scale, causal=block.causal, return_lse=True
        )
        return found[0], found[1].transpose(1, 2)

    def backward(
        self, block: Block, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BlockKernel``."""
        d_q, d_k, d_v, *_ = self._call(
            1, block.q, block.k, block.v, out, d_out, lse.transpose(1, 2).contiguous(),
            softmax_scale=block.scale, causal=block.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return d_q, d_k, d_v


def _places(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients; contiguous, which views of rows are not."""
    d_q, d_k, d_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (block.q, block.k, block.v)
    )
    return d_q, d_k, d_v


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters; torch hides them where it is a custom operator."""
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return {argument.name for argument in operator._schema.arguments}
    return set(inspect.signature(function).parameters)
