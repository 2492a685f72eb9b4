"""What a search may choose, and what a person has chosen already."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megaplug.plan.workload import Recompute
from megaplug.topology import Batch, ModelShape

MICRO_BATCHES = range(1, 9)
"""Sizes of a microbatch that are tried, as far as they divide the batch."""


@dataclass(frozen=True)
class Layout:
    """How layers are dealt out to the stages; nothing set is an even share."""

    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False


EVEN = Layout()


@dataclass(frozen=True)
class Space:
    """All that a search is about.

    Attributes:
        shape: The model.
        world_size: Ranks.
        global_batch_size: Sequences of a step.
        micro_batches: Sizes that are tried.
        recomputes: Choices that are tried.
        fixed: Sizes that stay as they are, of ``tp pp vpp cp dp ep etp``; a ``vpp`` of 0 is no interleaving.
        layout: The share of first and last stage if it is to stay; None tries uneven ones where layers do not
            divide.
        sequence_parallel: True or False if it is to stay; None takes it wherever ``tp`` > 1 and the sequence
            can be cut.
        overlap_p2p_comm: Whether stages talk while they compute.
        fixed_by: Why a dimension is 1 where nobody chose it: what the rest of the job forbids, in words.
    """

    shape: ModelShape
    world_size: int
    global_batch_size: int
    micro_batches: tuple[int, ...] = ()
    recomputes: tuple[Recompute, ...] = (Recompute(),)
    fixed: dict[str, int] = field(default_factory=dict)
    layout: Layout | None = None
    sequence_parallel: bool | None = None
    overlap_p2p_comm: bool = True
    fixed_by: dict[str, str] = field(default_factory=dict)

    def sizes(self, name: str, choices: list[int]) -> list[int]:
        """The sizes of a dimension that are tried."""
        return [self.fixed[name]] if name in self.fixed else choices

    def batch(self, micro_batch_size: int) -> Batch:
        """The batch of a step."""
        return Batch(micro_batch_size, self.global_batch_size)


def micro_batches(global_batch_size: int) -> tuple[int, ...]:
    """The sizes of a microbatch that divide a batch, up to the largest of `MICRO_BATCHES`."""
    return tuple(size for size in MICRO_BATCHES if global_batch_size % size == 0)


def recomputes(shape: ModelShape, *, fused_attention: bool, grouped_experts: bool) -> tuple[Recompute, ...]:
    """What a model can compute again, from nothing to everything.

    Args:
        shape: The model's sizes.
        fused_attention: Without it scores are kept, and recomputing them is the first thing to try.
        grouped_experts: Whether experts run as one grouped product, whose activation can be recomputed.
    """
    scores = () if fused_attention else ("core_attn",)
    choices = [] if fused_attention else [("core_attn",)]
    choices.append((*scores, "layernorm"))
    if shape.is_moe:
        choices += [(*scores, "layernorm", "moe_act")] if grouped_experts else []
        choices.append((*scores, "layernorm", "moe"))
    else:
        choices.append((*scores, "layernorm", "mlp"))
    selective = [Recompute("selective", modules=modules) for modules in choices]
    return (Recompute(), *selective, Recompute("full", "uniform", 1))


def layouts(num_layers: int, pp: int) -> list[Layout]:
    """The even share where there is one, else the uneven ones that Megatron can be told, best balanced first.

    Embedding or loss may count as a layer, and the first stage, the last, or both by the same number, may
    hold other counts than the rest: of these the ones whose fullest stage has the fewest layers.
    """
    if num_layers % pp == 0:
        return [EVEN]
    found = []
    for layout in (Layout(embedding=True, loss=True), Layout(loss=True), Layout(embedding=True)):
        padded = num_layers + layout.embedding + layout.loss
        if padded % pp == 0 and padded // pp > 1:
            found.append(layout)
    return found + [
        layout
        for layout in (_named(num_layers, pp, True, True), _named(num_layers, pp, True, False),
                       _named(num_layers, pp, False, True))
        if layout is not None
    ]  # fmt: skip


def _named(num_layers: int, pp: int, first: bool, last: bool) -> Layout | None:
    """The counts of the named stages that leave the others a whole number, and the fullest stage least."""
    named = first + last
    if pp <= named:
        return None
    ends = range(1, (num_layers - (pp - named)) // named + 1)
    fits = [end for end in ends if (num_layers - named * end) % (pp - named) == 0]
    if not fits:
        return None
    end = min(fits, key=lambda end: (max(end, (num_layers - named * end) // (pp - named)), -end))
    return Layout(end if first else None, end if last else None)


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})
