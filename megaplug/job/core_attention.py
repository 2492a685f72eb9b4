"""What the attentions of a job's layers compute and receive, as their declarations count it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from megaplug.job.attention import attention_layers
from megaplug.job.schema import Job
from megaplug.layers import registry
from megaplug.layers.registry import resolve_params
from megaplug.layers.registry.sequence_cost import SequenceCost, SequenceSizes, dense
from megaplug.topology import ModelShape, Topology


@dataclass(frozen=True)
class CoreAttention:
    """The attentions of a model.

    Attributes:
        layers: For each attention its name, how many layers have it, and its parameters.
    """

    layers: tuple[tuple[str, int, tuple[tuple[str, Any], ...]], ...]

    @classmethod
    def of(cls, job: Job) -> CoreAttention:
        """That of a job that has passed its checks."""
        chosen = attention_layers(job.attention)
        counts = chosen.counts(job.model.num_layers)
        return cls(
            tuple((name, count, _frozen(name, chosen.params_of(name))) for name, count in counts.items())
        )

    @property
    def is_dense(self) -> bool:
        """Whether every layer is dense, and over ranks Transformer Engine's: so most formulas say, too."""
        return not self.counted_apart

    @property
    def counted_apart(self) -> tuple[str, ...]:
        """Names of the attentions that are not counted as dense attention on one rank is."""
        return tuple(name for name, *_ in self.layers if _plugin(name).sequence_cost is not None)

    def costs(self, shape: ModelShape, num_ranks: int) -> list[tuple[int, SequenceCost]]:
        """Of each attention the number of layers and the cost of one of them and one sequence."""
        sizes = SequenceSizes(
            int(shape.seq_length),
            int(shape.num_attention_heads),
            int(shape.num_query_groups),
            int(num_ranks),
        )
        return [(count, _cost(name, params, sizes)) for name, count, params in self.layers]

    def pairs_share(self, shape: ModelShape, topology: Topology) -> float:
        """Pairs of queries and keys of the rank that has most, over its part of dense attention's.

        The mean of all layers.
        """
        return self._pairs(shape, topology.cp)

    def pairs_of_all(self, shape: ModelShape) -> float:
        """Pairs of queries and keys of all ranks together, over those of dense attention; mean of layers."""
        return self._pairs(shape, 1)

    def _pairs(self, shape: ModelShape, num_ranks: int) -> float:
        sequence = shape.num_attention_heads * shape.seq_length * (shape.seq_length + 1) / 2
        found = self.costs(shape, num_ranks)
        pairs = sum(count * cost.pairs for count, cost in found) / sum(count for count, _ in found)
        return float(pairs * num_ranks / sequence)

    def received_share(self, shape: ModelShape, topology: Topology) -> float:
        """Keys that a rank receives in a forward pass, over its own keys; mean of layers."""
        own = shape.num_query_groups * shape.seq_length / topology.cp
        found = self.costs(shape, topology.cp)
        received = sum(count * cost.received for count, cost in found) / sum(count for count, _ in found)
        return float(received / own)

    def joint(self, shape: ModelShape, topology: Topology) -> list[SequenceCost]:
        """Of those attentions that merge blocks and send what is needed (``layers/attention/joint.py``)."""
        return [cost for _, cost in self.costs(shape, topology.cp) if cost.is_joint]


def _plugin(name: str) -> registry.Plugin:
    return registry.lookup(registry.CORE_ATTENTION, name)


def _frozen(name: str, params: Any) -> tuple[tuple[str, Any], ...]:
    """All parameters of a plugin, as something that can be a dictionary's key."""
    resolved = resolve_params(_plugin(name), params)
    return tuple(
        sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in resolved.items())
    )


@functools.lru_cache(maxsize=4096)
def _cost(name: str, params: tuple[tuple[str, Any], ...], sizes: SequenceSizes) -> SequenceCost:
    counted = _plugin(name).sequence_cost or dense
    return counted(sizes, dict(params))
