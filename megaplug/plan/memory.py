"""A lower estimate of a rank's memory: what must be there, without workspaces, buffers, fragmentation.

All of it is modelled, none of it measured. State: cut over the data-parallel ranks as ``topology.zero`` says.
Activations: see ``plan/activations.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.activations import stage_activations
from megaplug.plan.parameters import RankParameters, stage_parameters
from megaplug.plan.workload import Workload

GIB = 1024**3


@dataclass(frozen=True)
class StageMemory:
    """Modelled bytes of a rank of one pipeline stage, a lower estimate."""

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


def estimate(workload: Workload) -> StageMemory:
    """The modelled memory of the pipeline stage that needs most.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    stages = (stage_memory(workload, stage) for stage in range(workload.topology.pp))
    return max(stages, key=lambda found: found.total)


def stage_memory(workload: Workload, stage: int) -> StageMemory:
    """The modelled memory of any rank of one pipeline stage.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    topology, shape, sharing = workload.topology, workload.shape, workload.sharing
    precision = workload.precision
    held = stage_parameters(shape, topology, stage)
    cut = held.dense / (topology.dp * topology.cp) + held.expert / topology.expert_dp
    num_layers = topology.layers_of_stage(shape.num_layers)[stage]
    logits = 0
    if stage == topology.pp - 1:
        # bf16 logits and their fp32 copy; in fp32 the loss works in place
        vocab = shape.padded_vocab_size(topology.tp) // topology.tp
        logits = vocab * workload.tokens * (6 if precision.parameter == 2 else 4)
    optimizer = (cut if sharing.zero >= 1 else held.total) * precision.optimizer
    kept = stage_activations(workload, stage) * precision.parameter / 2
    moved = kept * min(1.0, sharing.layers_on_cpu / num_layers)
    return StageMemory(
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
