"""Which kernel computes a block: by name, or by what device, dtype and installed packages can do."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention import SDPBackend

from megaplug.errors import UserError
from megaplug.layers.attention.given import one_of
from megaplug.layers.attention.kernels.cpu import CpuFlash
from megaplug.layers.attention.kernels.cuda import CudaCudnn, CudaEfficient, CudaFlash
from megaplug.layers.attention.kernels.installed import (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    InstalledKernel,
)
from megaplug.layers.attention.kernels.interface import BlockKernel
from megaplug.layers.attention.kernels.reference import Reference
from megaplug.layers.attention.torch_kernel import kernel_of

_INSTALLED: dict[str, InstalledKernel] = {
    "flash_attn2": FlashAttention2(),
    "flash_attn3": FlashAttention3(),
    "flash_attn4": FlashAttention4(),
}
KERNELS: dict[str, BlockKernel] = {
    "reference": Reference(),
    "cpu_flash": CpuFlash(),
    "cuda_flash": CudaFlash(),
    "cudnn": CudaCudnn(),
    "efficient": CudaEfficient(),
    **_INSTALLED,
}
_BY_TORCHS_NAME = {
    "cudnn_attention": "cudnn",
    "flash_attention": "cuda_flash",
    "efficient_attention": "efficient",
}
# What runs on each type of device; the tensors of a rehearsal, which have no numbers, take any.
_BY_DEVICE = {
    "cpu": ("auto", "cpu_flash", "reference"),
    "cuda": ("auto", *(name for name in KERNELS if name != "cpu_flash")),
}
# The flash-attn package for each major number of a GPU's compute capability.
_BY_CAPABILITY = {8: "flash_attn2", 9: "flash_attn3", 10: "flash_attn4"}
# A length to ask with which kernel is taken: none of them asks for more than one token.
_ANY_LENGTH = 128


def choose_kernel(
    device: torch.device, dtype: torch.dtype, name: str = "auto", head_dim: int = 64
) -> BlockKernel:
    """The kernel for tensors of that kind, or the one that is named.

    On CUDA an installed flash-attn that is made for this GPU comes first; else torch is asked which of its
    own it takes.

    Raises:
        UserError: There is none of that name, it is not for that device, or it is not installed.
    """
    check_name(name)
    if name != "auto":
        fit = _BY_DEVICE.get(device.type)
        if fit is not None and name not in fit:
            raise UserError(f"kernel={name} does not run on {device.type}", hint=f"use {', '.join(fit)}")
        kernel = KERNELS[name]
        if isinstance(kernel, InstalledKernel):
            kernel.check()
        return kernel
    if device.type == "cpu":
        return KERNELS["cpu_flash"]
    return KERNELS[_on_cuda(device, dtype, head_dim, torch.are_deterministic_algorithms_enabled())]


def check_name(name: str) -> None:
    """Refuse the name of no kernel.

    Raises:
        UserError: There is none of that name.
    """
    one_of("block kernel", name, ("auto", *KERNELS))


@functools.lru_cache
def _on_cuda(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str:
    """Which kernel auto is; determinism counts where torch is asked."""
    if dtype == torch.float64:
        return "reference"
    if dtype in (torch.bfloat16, torch.float16):
        package = _BY_CAPABILITY.get(torch.cuda.get_device_capability(device)[0])
        if package is not None and _INSTALLED[package].is_installed():
            _INSTALLED[package].check()
            return package
    q = torch.empty(1, 1, _ANY_LENGTH, head_dim, dtype=dtype, device=device, requires_grad=True)
    allowed = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return _BY_TORCHS_NAME.get(kernel_of(allowed, q, q, q, causal=True, dropout_p=0.0), "reference")
