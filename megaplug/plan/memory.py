"""A lower estimate of a rank's memory: what must be there, without workspaces, buffers, fragmentation.

All of it is modelled, none of it measured. State: cut over the data-parallel ranks as ``topology.zero`` says.
Activations: see ``plan/activations.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.activations import Recompute, stage_activations, tokens_of
from megaplug.plan.parameters import RankParameters, stage_parameters
from megaplug.topology import Batch, ModelShape, Topology

GIB = 1024**3


@dataclass(frozen=True)
class Precision:
    """Bytes of a number. The defaults are fp32; see `of`."""

    parameter: int = 4
    gradient: int = 4
    optimizer: int = 8

    @classmethod
    def of(
        cls, *, bf16: bool = False, fp16: bool = False, gradients_in_fp32: bool = True, moments: int = 2
    ) -> Precision:
        """Adam has two moments, SGD with momentum one, each fp32; bf16 adds an fp32 copy of the weights.

        fp16 gradients are copied to fp32 beside it. That makes 18 bytes a parameter in bf16, 20 in fp16 and
        16 in fp32 with Adam before anything is cut (Megatron's
        ``docs/user-guide/features/dist_optimizer.md``).
        """
        if fp16:
            return cls(2, 2, 8 + 4 * moments)
        if bf16:
            return cls(2, 4 if gradients_in_fp32 else 2, 4 + 4 * moments)
        return cls(4, 4, 4 * moments)


@dataclass(frozen=True)
class Sharing:
    """What data-parallel ranks share out, and what is kept on the CPU.

    Attributes:
        zero: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights.
        optimizer_on_cpu: Part of the optimizer's state that is offloaded, 0 to 1.
        layers_on_cpu: Layers whose activations are offloaded.
    """

    zero: int = 1
    optimizer_on_cpu: float = 0.0
    layers_on_cpu: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Modelled bytes of the fullest rank, a lower estimate."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    on_cpu: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        on_cpu = f"; on the CPU {self.on_cpu / GIB:.2f}" if self.on_cpu else ""
        return (
            f"at least {self.total / GIB:.2f} GiB a rank (modelled; weights {self.weights / GIB:.2f}, "
            f"gradients {self.gradients / GIB:.2f}, optimizer {self.optimizer / GIB:.2f}, activations "
            f"{self.activations / GIB:.2f}, logits {self.logits / GIB:.2f}; pipeline stage "
            f"{self.stage}{on_cpu})"
        )


def estimate(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    *,
    precision: Precision | None = None,
    recompute: Recompute | None = None,
    sharing: Sharing | None = None,
) -> MemoryEstimate:
    """The modelled memory of the pipeline stage that needs most.

    Args:
        topology: A legal mesh.
        shape: The model's sizes.
        batch: The batch sizes.
        precision: Bytes of a parameter, its gradient and its optimizer state; fp32 with Adam by default.
        recompute: What is computed again in backward; nothing by default.
        sharing: What is cut over data-parallel ranks or offloaded; the optimizer's state by default.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    stages = [
        _stage(
            topology,
            shape,
            batch,
            precision or Precision(),
            recompute or Recompute(),
            sharing or Sharing(),
            stage,
        )
        for stage in range(topology.pp)
    ]
    return max(stages, key=lambda found: found.total)


def _stage(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    precision: Precision,
    recompute: Recompute,
    sharing: Sharing,
    stage: int,
) -> MemoryEstimate:
    held = stage_parameters(shape, topology, stage)
    cut = held.dense / (topology.dp * topology.cp) + held.expert / topology.expert_dp
    num_layers = topology.layers_of_stage(shape.num_layers)[stage]
    logits = 0
    if stage == topology.pp - 1:
        # bf16 logits and their fp32 copy; in fp32 the loss works in place
        vocab = shape.padded_vocab_size(topology.tp) // topology.tp
        logits = vocab * tokens_of(topology, shape, batch) * (6 if precision.parameter == 2 else 4)
    optimizer = (cut if sharing.zero >= 1 else held.total) * precision.optimizer
    kept = stage_activations(topology, shape, batch, recompute, stage) * precision.parameter / 2
    moved = kept * min(1.0, sharing.layers_on_cpu / num_layers)
    return MemoryEstimate(
        stage=stage,
        weights=round(_weights(held, cut, sharing.zero, num_layers) * precision.parameter),
        gradients=round((cut if sharing.zero >= 2 else held.total) * precision.gradient),
        optimizer=round(optimizer * (1 - sharing.optimizer_on_cpu)),
        activations=round(kept - moved),
        logits=logits,
        on_cpu=round(optimizer * sharing.optimizer_on_cpu + moved),
    )


def _weights(held: RankParameters, cut: float, zero: int, num_layers: int) -> float:
    """Weights that lie on a rank: under ZeRO-3 its part of all, and the whole of one layer (the mean one)."""
    return min(held.total, cut + held.total / num_layers) if zero == 3 else held.total
