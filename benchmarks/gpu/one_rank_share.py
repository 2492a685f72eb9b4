"""What one rank's share of a sequence over many ranks costs, the other ranks' keys and values made up.

The rank is the last, which is sent most; tokens lie contiguously. Every message that it would send or receive
is counted and replaced by numbers that are there already, so the times are those of computing alone, and
``bytes / seconds`` is the rate of a link that would hide the messages behind it. The bytes have to be those
of the formula. 32 heads, 8 groups, 128 elements, bf16, causal.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from setting import Setting, ended, read_setting, skipped

from megaplug.layers.attention.block_kernels import choose_kernel
from megaplug.layers.attention.describe import rows_awaited
from megaplug.layers.attention.exchange import Arriving, Exchange
from megaplug.layers.attention.joint import JointAttention, Work
from megaplug.layers.attention.pattern import Heads, branches
from megaplug.layers.attention.share import share_of_rank
from megaplug.layers.attention.token_layout import TokenLayout

# No case is begun after so many seconds.
LIMIT_S = 45.0


@dataclass(frozen=True)
class Case:
    """A sequence over ranks; lengths are in tokens."""

    name: str
    num_tokens: int
    num_ranks: int
    lengths: tuple[int, ...]
    rates: tuple[int, ...]


_K, _M, _G = 1 << 10, 1 << 20, 1 << 30
CASES = (
    Case("1M over 8, blocks of 256K", _M, 8, (64 * _K, 128 * _K, 256 * _K), (1, 2, 4)),
    Case("1M over 8, up to all tokens", _M, 8, (8 * _K, 32 * _K, 128 * _K, _M), (1, 2, 4, 8)),
    Case("1B over 4096, blocks of 256K", _G, 4096, (64 * _K, 128 * _K, 256 * _K), (1, 2, 4)),
    Case("1B over 1024, up to all tokens", _G, 1024, (64 * _K, 256 * _K, _G), (1, 4, 16 * _K)),
    Case("1M over 8, dense ring", _M, 8, (_M,), (1,)),
)
# In a rehearsal all lengths, and rates above 8, are so much shorter, and there are no more than 8 ranks.
_SHORTER = 2048


class MadeUp(Exchange):
    """Counts messages by kind, and has the same numbers arrive in the place of each."""

    def __init__(self, longest: int, like: torch.Tensor) -> None:
        self.received: dict[str, int] = {}
        self._numbers = torch.randn(longest, device=like.device).to(like.dtype)

    def post(self, out: torch.Tensor, to_rank: int, length: int, from_rank: int, kind: str) -> Arriving:
        """As ``Exchange``; nobody is there."""
        self.received[kind] = self.received.get(kind, 0) + length * out.element_size()
        return _Arrived(self._numbers[:length].to(out.dtype))


class _Arrived:
    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers

    def wait(self) -> torch.Tensor:
        return self._numbers


def shortened(case: Case) -> Case:
    """As a rehearsal takes it."""
    ranks = min(8, case.num_ranks)
    tokens = case.num_tokens // case.num_ranks * ranks // _SHORTER
    lengths = tuple(min(tokens, max(8, length // _SHORTER)) for length in case.lengths)
    return Case(case.name, tokens, ranks, lengths, tuple(min(8, rate) for rate in case.rates))


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """Times, bytes and memory of the last rank; the second run of two."""
    heads, dim = (Heads(8, 4), 16) if setting.rehearse else (Heads(32, 8), 128)
    dtype = torch.float32 if setting.rehearse else torch.bfloat16
    layout, pattern = (
        TokenLayout("contiguous", case.num_tokens, case.num_ranks),
        branches(case.lengths, case.rates),
    )
    rank, tokens = case.num_ranks - 1, case.num_tokens // case.num_ranks
    share = share_of_rank(pattern, layout, rank, heads, "kv_group", True)
    formula = sum(
        rows_awaited(branch, heads, layout, rank, rule="kv_group", causal=True) * 2 * dim * dtype.itemsize
        for branch in pattern
    )
    counts = (heads.num_heads, heads.num_groups, heads.num_groups, heads.num_heads)
    q, k, v, grad = (
        torch.empty(1, tokens, count, dim, device=setting.device, dtype=dtype).normal_() for count in counts
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    made_up = MadeUp(2 * tokens * heads.num_groups * dim, q)
    kernel = choose_kernel(q.device, dtype)
    work = Work(share, kernel, dim**-0.5, made_up)
    row: dict[str, Any] = {"kernel": kernel.name, "rank": rank, "tokens_of_the_rank": tokens, **vars(case)}
    for _ in range(2):
        made_up.received.clear()
        times = [_now(setting)]
        out = JointAttention.apply(*leaves, work)
        times.append(_now(setting))
        torch.autograd.grad(out, leaves, grad)
        times.append(_now(setting))
        row["forward_s"], row["backward_s"] = times[1] - times[0], times[2] - times[1]
    row["received_bytes"] = dict(made_up.received)
    row["formula_bytes_forward"] = formula
    row["link_bytes_per_s_that_hides_forward"] = formula / row["forward_s"]
    if not setting.rehearse:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def _now(setting: Setting) -> float:
    if not setting.rehearse:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> int:
    """Measure every case for which there is time, print and store."""
    setting = read_setting(__doc__)
    began = time.monotonic()
    rows: dict[str, Any] = {}
    failures = []
    for case in CASES:
        if time.monotonic() - began > LIMIT_S and not setting.rehearse:
            skipped(case.name, "no time was left")
            continue
        if not setting.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = rows[case.name] = measure(shortened(case) if setting.rehearse else case, setting)
        arrived = row["received_bytes"].get("forward", 0)
        print(
            f"{case.name}: forward {row['forward_s']:.3f} s, backward {row['backward_s']:.3f} s, "
            f"{arrived:,} bytes received forward",
            flush=True,
        )
        if arrived != row["formula_bytes_forward"]:
            failures.append(
                f"{case.name}: {arrived} bytes, and {row['formula_bytes_forward']} by the formula"
            )
        setting.write("one_rank_share", {"what": __doc__, "results": rows})
    return ended(failures)


if __name__ == "__main__":
    sys.exit(main())
