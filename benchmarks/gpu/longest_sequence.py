"""The longest sequence whose attention of one layer, forward and backward, one GPU holds.

Dilated attention of 32 heads and 8 groups of 128 elements in bf16, causal; found by doubling, then by halving
the distance to what did not fit, until the time is up. The goal is 2,097,152 tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from setting import Setting, ended, read_setting

from megaplug.layers.attention import dilated_attention

GOAL = 2 << 20
SEGMENTS = (8192, 16384, 32768, 65536, 131072)
RATES = (1, 2, 4, 8, 16)
# Of the step's time, for the search of one kernel; a trial that has begun is finished.
SEARCH_S = 20.0
KERNELS = ("auto", "cuda_flash")


@dataclass
class Search:
    """How far a search came.

    Attributes:
        longest: The longest that fits; 0 if none.
        too_long: The shortest that does not; None if none was met.
        why: What was said of it.
        is_finished: Whether the two are as near as was asked, rather than the time up.
    """

    longest: int = 0
    too_long: int | None = None
    why: str = ""
    is_finished: bool = False
    trials: dict[int, dict[str, Any]] = field(default_factory=dict)


def search(attempt: Callable[[int], dict[str, Any]], unit: int, seconds: float) -> Search:
    """Double from one unit on until an attempt says ``failed``, then halve the distance, in whole units.

    Args:
        attempt: Tries a number of tokens and tells what came of it.
        unit: Tokens.
        seconds: After which no trial is begun.
    """
    found = Search()
    end = time.monotonic() + seconds
    tokens = unit
    while time.monotonic() < end:
        row = found.trials[tokens] = attempt(tokens)
        if "failed" in row:
            found.too_long, found.why = tokens, row["failed"]
        else:
            found.longest = tokens
        if found.too_long is None:
            tokens *= 2
            continue
        tokens = (found.longest + found.too_long) // 2 // unit * unit
        # An eighth of the answer is near enough.
        if tokens <= found.longest or found.too_long - found.longest <= found.longest // 8:
            found.is_finished = True
            break
    return found


def attempt_with(kernel: str, setting: Setting) -> Callable[[int], dict[str, Any]]:
    """Tries a length on the GPU; in a rehearsal on the CPU, which holds no more than four units."""
    heads, groups, dim = (4, 2, 16) if setting.rehearse else (32, 8, 128)
    lengths = [length // 1024 if setting.rehearse else length for length in SEGMENTS]
    dtype = torch.float32 if setting.rehearse else torch.bfloat16

    def tensor(tokens: int, count: int) -> torch.Tensor:
        return torch.empty(1, tokens, count, dim, device=setting.device, dtype=dtype).normal_()

    def compute(tokens: int) -> dict[str, Any]:
        if setting.rehearse and tokens > 4 * lengths[-1]:
            raise torch.OutOfMemoryError("a rehearsal holds no more")
        q, k, v, grad = (tensor(tokens, count) for count in (heads, groups, groups, heads))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        began = time.perf_counter()
        out = dilated_attention(*leaves, lengths, RATES, kernel="auto" if setting.rehearse else kernel)
        out.backward(grad)
        row: dict[str, Any] = {}
        if not setting.rehearse:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            row = {"peak_bytes": peak, "bytes_per_token": peak / tokens}
        return row | {"seconds": time.perf_counter() - began}

    def attempt(tokens: int) -> dict[str, Any]:
        if not setting.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = compute(tokens)
        except RuntimeError as error:  # out of memory, or more elements than the kernel counts
            row = {"failed": str(error).splitlines()[0]}
        print(f"{kernel} {tokens:,} tokens: {row}", flush=True)
        return row

    return attempt


def main() -> int:
    """Search with the kernel that is chosen and with torch's flash, print and store."""
    setting = read_setting(__doc__)
    unit = SEGMENTS[-1] // (1024 if setting.rehearse else 1)
    results = {}
    for kernel in KERNELS:
        found = search(attempt_with(kernel, setting), unit, SEARCH_S)
        results[kernel] = vars(found)
        state = "" if found.is_finished else ", and the time was up"
        print(f"{kernel}: {found.longest:,} tokens fit, {found.too_long} do not{state}", flush=True)
        setting.write("longest_sequence", {"what": __doc__, "goal": GOAL, "results": results})
    return ended([f"{name}: not even {unit} tokens" for name, row in results.items() if not row["longest"]])


if __name__ == "__main__":
    sys.exit(main())
