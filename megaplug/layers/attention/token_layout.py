"""Which tokens of a sequence each rank of context parallelism holds, as integers."""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.errors import UserError
from megaplug.layers.attention.given import one_of

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class TokenLayout:
    """``contiguous``: rank p holds the p-th of P equal parts. ``zigzag``: parts p and 2P - 1 - p of 2P.

    Zigzag is what Megatron's batches and rotary angles are cut into (``get_batch_on_this_cp_rank`` and
    ``get_pos_emb_on_this_cp_rank`` of megatron-core 0.19): under a causal mask every rank has as much to
    compute.

    Raises:
        UserError: The name is unknown, or the tokens cannot be cut so.
    """

    name: str
    num_tokens: int
    num_ranks: int = 1

    def __post_init__(self) -> None:
        one_of("token layout", self.name, LAYOUTS)
        if self.num_ranks > 1 and self.num_tokens % self.num_parts:
            raise UserError(
                f"{self.num_tokens} tokens cannot be cut into {self.num_parts} equal parts, as the "
                f"{self.name} layout over {self.num_ranks} ranks needs",
                hint=f"use a multiple of {self.num_parts} tokens",
            )

    @property
    def num_parts(self) -> int:
        """Into how many equal parts the sequence is cut."""
        return self.num_ranks * (2 if self.name == "zigzag" else 1)

    @property
    def part_length(self) -> int:
        """Tokens of one part."""
        return self.num_tokens // self.num_parts if self.num_ranks > 1 else self.num_tokens

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of what a rank holds, in the order of its tensors; neighbours made one."""
        if self.num_ranks == 1:
            return ((0, self.num_tokens),)
        length = self.part_length
        if self.name == "contiguous":
            return ((rank * length, (rank + 1) * length),)
        other = self.num_parts - 1 - rank
        if other == rank + 1:
            return ((rank * length, (other + 1) * length),)
        return ((rank * length, (rank + 1) * length), (other * length, (other + 1) * length))

    def positions(self, rank: int) -> list[int]:
        """The token at each place of a rank's tensors."""
        return [token for start, stop in self.ranges(rank) for token in range(start, stop)]
