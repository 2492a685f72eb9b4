"""In which number format the products of experts are computed: by what was measured on processors."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def computing_dtype(x: Tensor) -> torch.dtype:
    """In what rows are multiplied fastest: on most CPUs those of bf16 and fp16 in fp32.

    64 rows of an expert of 256 x 1,024 on a Xeon with AVX-512 BF16: 10 % faster, conversions included, and a
    gradient of weights that goes into an fp32 buffer 1.7x. Processors with AMX multiply narrow ones faster;
    those of AMD with AVX-512 BF16 do bf16, in which both passes of 16 such experts take 0.6 of the time.
    """
    is_widened = x.device.type == "cpu" and x.dtype in NARROW and not _multiplies(x.dtype)
    return torch.float32 if is_widened else x.dtype


def _multiplies(dtype: torch.dtype) -> bool:
    return torch.cpu._is_amx_tile_supported() or (dtype == torch.bfloat16 and is_amd_with_bf16())


@functools.cache
def is_amd_with_bf16() -> bool:
    """Whether the kernel says that this is a processor of AMD with AVX-512 BF16."""
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "AuthenticAMD" in said and "avx512_bf16" in said
