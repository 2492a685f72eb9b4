"""The core attentions for long sequences: dense over many ranks, and dilated on one or many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megaplug.errors import Problem
from megaplug.layers.registry.cost import causal_flops, fused_bytes
from megaplug.layers.registry.pattern_notes import pattern_notes, reach
from megaplug.layers.registry.plugin import CORE_ATTENTION, Limits, Need, Parameter, Plugin
from megaplug.layers.registry.sequence_cost import dilated, ring

_MODULE = "megaplug.layers.attention.ring"
_CUDA, _HALF = ("cuda",), ("bf16", "fp16")
_KERNEL = Parameter(
    str,
    "auto",
    "which kernel computes a block: torch's for a CPU, three of torch's for CUDA, flash-attn's, or einsum",
    (
        "auto",
        "cpu_flash",
        "cuda_flash",
        "cudnn",
        "efficient",
        "flash_attn2",
        "flash_attn3",
        "flash_attn4",
        "reference",
    ),
    {
        "cpu_flash": Need(("cpu",)),
        "cuda_flash": Need(_CUDA, _HALF),
        "cudnn": Need(_CUDA, _HALF),
        "efficient": Need(_CUDA, ("fp32", *_HALF)),
        # As in layers/attention/kernels/installed.py.
        "flash_attn2": Need(_CUDA, _HALF, ("flash_attn.flash_attn_interface",), "flash-attn>=2.7"),
        "flash_attn3": Need(
            _CUDA,
            _HALF,
            ("flash_attn_interface", "flash_attn_3"),
            "flash-attn 3 from the folder hopper of Dao-AILab/flash-attention",
        ),
        "flash_attn4": Need(_CUDA, _HALF, ("flash_attn.cute.interface",), "flash-attn-4"),
    },
)
_MERGE = Parameter(
    str,
    "torch",
    "by what blocks are put together: torch's operations, or one kernel in Triton, on CUDA and not timed yet",
    ("torch", "triton"),
    {"triton": Need(_CUDA, modules=("triton",), package="triton")},
)
_LAYOUT = Parameter(
    str,
    "zigzag",
    "how tokens are spread over the ranks: as Megatron does, or in one piece each, which sends less",
    ("zigzag", "contiguous"),
)
_BLOCK = Parameter(
    int,
    None,
    "the most tokens whose keys and values are in one message between ranks, which bounds what is kept of "
    "others; null: all that a rank needs of another at once",
)
_PATTERN = {
    "segment_lengths": Parameter(
        list,
        (),
        "lengths of the branches' segments in tokens; empty: a quarter, a half and the whole of the sequence",
    ),
    "dilation_rates": Parameter(
        list, (), "of each segment every so many-th token, one rate for each length; empty: 1, 2 and 4"
    ),
    "offset": Parameter(
        str,
        "kv_group",
        "which tokens a head has: its group, or its own number, modulo the rate; or as torchscale does it",
        ("kv_group", "query_head", "torchscale_block"),
    ),
    "mix_grad": Parameter(
        str,
        "exact",
        "whether gradients go through the mixing of branches; detached is torchscale's way",
        ("exact", "detached"),
    ),
    "kernel": _KERNEL,
    "merge": _MERGE,
}


def _limits(context_parallel: bool) -> Limits:
    return Limits(
        dtypes={"cpu": ("fp64", "fp32", "bf16", "fp16"), "cuda": ("fp32", "bf16", "fp16")},
        context_parallel=context_parallel,
        masks=("causal", "no_mask"),
        max_head_dim={"cuda": 256},
        head_dim_multiple={"cuda": 8},
    )


def block_problems(params: Mapping[str, Any], key: str) -> Iterator[Problem]:
    """What is wrong with the size of a message."""
    size = params.get("block_size")
    if size is not None and size < 1:
        yield Problem(
            f"{key}.block_size", f"{size} is no number of tokens", "give a number such as 4096, or null"
        )


def pattern_problems(params: Mapping[str, Any], key: str) -> Iterator[Problem]:
    """What is wrong with segment lengths and rates whose types are right, and with the size of a message."""
    yield from block_problems(params, key)
    lengths, rates = params.get("segment_lengths", ()), params.get("dilation_rates", ())
    for name, values, what, such in (
        ("segment_lengths", lengths, "number of tokens", "[2048,4096,8192]"),
        ("dilation_rates", rates, "rate: each takes every so many-th token", "[1,2,4]"),
    ):
        if wrong := [value for value in values if type(value) is not int or value < 1]:
            message = f"{wrong[0]!r} is no {what}"
            yield Problem(f"{key}.{name}", message, f"give integers of at least 1, such as {such}")
    if len(lengths) != len(rates):
        message = f"{len(lengths)} segment_lengths and {len(rates)} dilation_rates"
        yield Problem(f"{key}.dilation_rates", message, "give one rate for each segment length")


RING = Plugin(
    name="ring",
    kind=CORE_ATTENTION,
    target=f"{_MODULE}:RingAttention",
    doc="dense attention over context-parallel ranks without Transformer Engine; only what is needed is sent",
    parameters={"token_layout": _LAYOUT, "kernel": _KERNEL, "merge": _MERGE, "block_size": _BLOCK},
    limits=_limits(context_parallel=True),
    forward_flops=causal_flops,
    saved_bytes_per_token=fused_bytes,
    sequence_cost=ring,
    check_params=block_problems,
)

DILATED = Plugin(
    name="dilated",
    kind=CORE_ATTENTION,
    target=f"{_MODULE}:DilatedAttention",
    doc="LongNet's dilated attention with exact gradients, for sequences that are whole on every rank",
    parameters=_PATTERN,
    limits=_limits(context_parallel=False),
    saved_bytes_per_token=fused_bytes,
    sequence_cost=dilated,
    check_params=pattern_problems,
    notes=pattern_notes,
    reach=reach,
)

RING_DILATED = Plugin(
    name="ring_dilated",
    kind=CORE_ATTENTION,
    target=f"{_MODULE}:RingDilatedAttention",
    doc="the same over context-parallel ranks: segments that a rank has whole cost no communication",
    parameters={**_PATTERN, "token_layout": _LAYOUT, "block_size": _BLOCK},
    limits=_limits(context_parallel=True),
    saved_bytes_per_token=fused_bytes,
    sequence_cost=dilated,
    check_params=pattern_problems,
    notes=pattern_notes,
    reach=reach,
)

LONG = (RING, DILATED, RING_DILATED)
