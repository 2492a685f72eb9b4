"""What a rehearsal counted on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """What one rank does with one kind of collective in one process group, in one step.

    Attributes:
        group: ``tp``, ``dp``, ``pp`` and so on; ``dp_cp`` for a group over both.
        size: Its ranks.
        collective: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``send``, ``recv``.
        calls: How many.
        bytes: Of the whole buffers: what is reduced, gathered, scattered, sent or received.
        sent_bytes: What the rank itself sends of them with ring algorithms.
    """

    group: str
    size: int
    collective: str
    calls: int
    bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class RankRehearsal:
    """One step of one rank, after the first: the optimizer has its state.

    Attributes:
        rank: In the world.
        stage: Of the pipeline.
        dense_parameters: Those replicated over data and context parallelism.
        expert_parameters: Those of its routed experts.
        peak_bytes: The most that lay on the device at a time, exactly.
        peak_bytes_in_blocks: The most that CUDA's allocator would call allocated, in blocks of 512 bytes.
        at_peak: Exact bytes at the peak by what they are for.
        at_rest: Likewise between two steps.
        flops: Of matrix products and attention by pass; attention without regard to its mask.
        traffic: Communication.
        seconds: The rehearsal took.
        origins: Who made what was there at the peak, where that was asked for
            (``megaplug/runtime/rehearsal/origins.py``).
    """

    rank: int
    stage: int
    dense_parameters: int
    expert_parameters: int
    peak_bytes: int
    peak_bytes_in_blocks: int
    at_peak: dict[str, int]
    at_rest: dict[str, int]
    flops: dict[str, int]
    traffic: list[Traffic]
    seconds: float
    origins: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """All of the rank."""
        return self.dense_parameters + self.expert_parameters

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankRehearsal:
        """From the plain values that the other process printed."""
        return cls(**{**values, "traffic": [Traffic(**item) for item in values["traffic"]]})
