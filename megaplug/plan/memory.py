"""A lower estimate of a rank's memory: what must be there, without workspaces, buffers, fragmentation.

All of it is modelled, none of it measured. State: weights and gradients whole on every rank, optimizer state
cut over the data-parallel ranks by the distributed optimizer. Activations: what backward keeps, with flash
attention (no score matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.parameters import stage_parameters
from megaplug.topology import Batch, ModelShape, Topology

GIB = 1024**3


@dataclass(frozen=True)
class Precision:
    """Bytes of a number. The defaults are fp32; see `of`."""

    parameter: int = 4
    gradient: int = 4
    optimizer: int = 8

    @classmethod
    def of(cls, *, bf16: bool, gradients_in_fp32: bool = True, moments: int = 2) -> Precision:
        """Adam has two moments, SGD with momentum one, each fp32; bf16 adds an fp32 copy of the weights.

        That makes 18 bytes a parameter in bf16 and 16 in fp32 with Adam before anything is cut
        (Megatron's ``docs/user-guide/features/dist_optimizer.md``).
        """
        if bf16:
            return cls(2, 4 if gradients_in_fp32 else 2, 4 + 4 * moments)
        return cls(4, 4, 4 * moments)


@dataclass(frozen=True)
class Recompute:
    """Megatron's activation recompute. ``selective`` counts as none: flash attention keeps no scores."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Modelled bytes of the fullest rank, a lower estimate."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def __str__(self) -> str:
        return (
            f"at least {self.total / GIB:.2f} GiB a rank (modelled; weights {self.weights / GIB:.2f}, "
            f"gradients {self.gradients / GIB:.2f}, optimizer {self.optimizer / GIB:.2f}, activations "
            f"{self.activations / GIB:.2f}, logits {self.logits / GIB:.2f}; pipeline stage {self.stage})"
        )


def estimate(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    *,
    precision: Precision | None = None,
    recompute: Recompute | None = None,
) -> MemoryEstimate:
    """The modelled memory of the pipeline stage that needs most.

    Args:
        topology: A legal mesh.
        shape: The model's sizes.
        batch: The batch sizes.
        precision: Bytes of a parameter, its gradient and its optimizer state; fp32 with Adam by default.
        recompute: What is computed again in backward; nothing by default.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    stages = [
        _stage(topology, shape, batch, precision or Precision(), recompute or Recompute(), stage)
        for stage in range(topology.pp)
    ]
    return max(stages, key=lambda found: found.total)


def _stage(
    topology: Topology,
    shape: ModelShape,
    batch: Batch,
    precision: Precision,
    recompute: Recompute,
    stage: int,
) -> MemoryEstimate:
    held = stage_parameters(shape, topology, stage)
    optimizer = held.dense / (topology.dp * topology.cp) + held.expert / topology.expert_dp
    logits = 0
    if stage == topology.pp - 1:
        # bf16 logits and their fp32 copy; in fp32 the loss works in place
        vocab = shape.padded_vocab_size(topology.tp) // topology.tp
        logits = vocab * _tokens(topology, shape, batch) * (6 if precision.parameter == 2 else 4)
    return MemoryEstimate(
        stage=stage,
        weights=held.total * precision.parameter,
        gradients=held.total * precision.gradient,
        optimizer=round(optimizer * precision.optimizer),
        activations=round(
            _stage_activations(topology, shape, batch, recompute, stage) * precision.parameter / 2
        ),
        logits=logits,
    )


def _stage_activations(
    topology: Topology, shape: ModelShape, batch: Batch, recompute: Recompute, stage: int
) -> float:
    """Bytes in bf16 of all microbatches in flight (``get_pp_rank_microbatches`` in ``schedules.py``)."""
    num_layers = topology.layers_of_stage(shape.num_layers)[stage]
    behind, vpp = topology.pp - stage, topology.vpp or 1
    microbatches = batch.global_batch_size // (batch.micro_batch_size * topology.dp)
    if topology.vpp is None:
        chunks = min(microbatches, behind)
    else:
        chunks = min(2 * (behind - 1) + (vpp - 1) * topology.pp + 1, vpp * microbatches)
    whole = _layer_activations(topology, shape, batch)
    chunk_layers = num_layers / vpp
    if recompute.granularity != "full":
        return chunks * chunk_layers * whole
    kept = 2 * _tokens(topology, shape, batch) * shape.hidden_size / _sequence_cut(topology)
    span = recompute.num_layers or 1
    if recompute.method == "block":
        again = min(span, chunk_layers)
        return chunks * (again * kept + (chunk_layers - again) * whole) + whole
    return chunks * chunk_layers / span * kept + min(span, chunk_layers) * whole


def _layer_activations(topology: Topology, shape: ModelShape, batch: Batch) -> float:
    """Bytes in bf16 that one layer (the mean one, where only some have experts) keeps of one microbatch."""
    tokens, tp, cut = _tokens(topology, shape, batch), topology.tp, _sequence_cut(topology)
    hidden, gates = shape.hidden_size, 2 if shape.swiglu else 1
    attended = shape.query_size + shape.key_size + shape.value_size + shape.attended_size
    # A latent is kept before and after its norm.
    latents = 4 * tokens * sum(shape.latent_sizes) / cut
    attention = 8 * tokens * hidden / cut + 2 * tokens * attended / tp + latents
    dense = 2 * tokens * shape.ffn_hidden_size * (gates + 1) / tp
    share = sum(shape.moe_layers) / shape.num_layers
    if not share:
        return attention + dense
    routed = tokens / cut * shape.moe_router_topk
    # With balanced routing a rank computes as many token copies as it sends; etp gathers those of its group.
    gathered = routed * topology.etp
    ffn = shape.expert_ffn_size / topology.etp
    experts = gathered * (2 * hidden + 2 * ffn * (gates + 1)) + 2 * routed * hidden
    shared = 2 * tokens * (shape.moe_shared_expert_intermediate_size or 0) * (gates + 1) / tp
    return attention + share * (experts + shared) + (1 - share) * dense


def _tokens(topology: Topology, shape: ModelShape, batch: Batch) -> int:
    return shape.seq_length * batch.micro_batch_size // topology.cp


def _sequence_cut(topology: Topology) -> int:
    return topology.tp if topology.sequence_parallel else 1
