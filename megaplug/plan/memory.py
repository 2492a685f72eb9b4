"""A rank's memory at its fullest moment, by what it is for: modelled bytes that torch hands out.

What lies outside of it is `Cluster.reserved`: the CUDA context, NCCL, libraries' own workspaces, and what the
allocator holds without using it. State: below. Activations: ``activations.py``, of layers as
``layer_memory.py`` has them; loss, embedding and optimizer: ``step_ends.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.activations import offloaded, stage_activations
from megaplug.plan.in_flight import chunks_of
from megaplug.plan.numbers import most
from megaplug.plan.parameters import RankParameters, stage_parameters
from megaplug.plan.pipeline_memory import held_after
from megaplug.plan.step_ends import optimizer_step, standing_buffers
from megaplug.plan.workload import Precision, Workload

GIB = 1024**3


@dataclass(frozen=True)
class StageMemory:
    """Modelled bytes of a rank of one pipeline stage.

    Attributes:
        stage: Which.
        weights: As they are computed with.
        gradients: As they are summed up.
        optimizer: Its state, and fp32 weights beside narrower ones.
        activations: Kept for the backward pass, of all microbatches in flight.
        logits: Of one microbatch, on the last stage.
        workspace: Whatever else is there at the fullest moment: temporary gradients, the loss's copies, a
            layer that is computed again, buffers of tensor and expert parallelism, what ZeRO-3 gathers, or
            what the optimizer makes for its step.
        on_cpu: Of optimizer and activations, offloaded.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int = 0
    on_cpu: int = 0

    @property
    def state(self) -> int:
        """What lies there between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of them."""
        return self.state + self.activations + self.logits + self.workspace

    def __str__(self) -> str:
        on_cpu = f"; on the CPU {self.on_cpu / GIB:.2f}" if self.on_cpu else ""
        return (
            f"{self.total / GIB:.2f} GiB a rank (modelled; weights {self.weights / GIB:.2f}, "
            f"gradients {self.gradients / GIB:.2f}, optimizer {self.optimizer / GIB:.2f}, activations "
            f"{self.activations / GIB:.2f}, logits {self.logits / GIB:.2f}, workspace "
            f"{self.workspace / GIB:.2f}; pipeline stage {self.stage}{on_cpu})"
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

    State has the bytes of Megatron's ``docs/user-guide/features/dist_optimizer.md``, cut over the
    data-parallel ranks (``dp x cp``; an expert's over expert data parallelism) as ZeRO's level says
    (Rajbhandari et al. 2020).

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    topology, shape, sharing = workload.topology, workload.shape, workload.sharing
    precision = workload.precision
    held = stage_parameters(shape, topology, stage)
    cut = held.dense / (topology.dp * topology.cp) + held.expert / topology.expert_dp
    chunks = chunks_of(workload, stage)
    num_layers = sum(len(chunk) for chunk in chunks)
    stepped = cut if sharing.zero >= 1 else held.total
    optimizer = stepped * precision.optimizer
    found = stage_activations(workload, stage)
    moved = offloaded(workload, stage, found.kept)
    workspace = found.workspace + _gathered(held, cut, sharing.zero, num_layers, precision)
    # As the optimizer steps, activations are gone but for a few; what it makes then lies in their place.
    step = optimizer_step(workload, held, stage, chunks) + standing_buffers(workload, chunks)
    step += stepped * precision.for_step * (1 - sharing.optimizer_on_cpu)
    stream = precision.parameter * workload.tokens / workload.sequence_cut * shape.hidden_size
    step += held_after(workload, stage) * stream
    return StageMemory(
        stage=stage,
        weights=round((cut if sharing.zero == 3 else held.total) * precision.parameter),
        gradients=round((cut if sharing.zero >= 2 else held.total) * precision.gradient),
        optimizer=round(optimizer * (1 - sharing.optimizer_on_cpu)),
        activations=round(found.kept - moved),
        logits=round(found.logits),
        workspace=round(most(workspace, step - found.kept + moved - found.logits)),
        on_cpu=round(optimizer * sharing.optimizer_on_cpu + moved),
    )


def _gathered(held: RankParameters, cut: float, zero: int, num_layers: int, precision: Precision) -> float:
    """What lies whole on a rank for a while, of the mean layer.

    ZeRO-3: its weights, and those of the layer that comes next (Megatron-FSDP gathers one ahead). ZeRO-2 and
    3: its gradients, until they are summed up and cut.
    """
    if zero < 2:
        return 0.0
    mean = (held.total - cut) / max(1, num_layers)
    return mean * (precision.gradient + (2 * precision.parameter if zero == 3 else 0))
