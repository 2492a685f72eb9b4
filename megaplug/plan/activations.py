"""What one pipeline stage keeps for the backward pass, and the moment that needs most: modelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaplug.plan.in_flight import Chunk, chunks_of, held_microbatches
from megaplug.plan.numbers import least, most
from megaplug.plan.workload import Workload
from megaplug.plan.workspace import (
    LayerMemory,
    embedding_gradient,
    layer_memory,
    loss_memory,
    optimizer_step,
    standing_buffers,
)


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank as the first backward pass begins.

    Attributes:
        kept: Of all microbatches in flight.
        logits: Of one microbatch, on the last stage.
        workspace: What the fullest moment needs beyond both.
    """

    kept: float
    logits: float
    workspace: float


def stage_activations(workload: Workload, stage: int) -> Activations:
    """Of any rank of one pipeline stage.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    chunks = chunks_of(workload, stage)
    held = held_microbatches(workload, stage)
    kinds = {
        kind: layer_memory(workload, has_experts=kind)
        for kind in {kind for chunk in chunks for kind in chunk}
    }
    of_chunk = [_chunk_kept(workload, chunk, kinds) for chunk in chunks]
    kept = sum(count * size for count, size in zip(held, of_chunk, strict=True))
    is_first, is_last = stage == 0, stage == workload.topology.pp - 1
    stream = (
        workload.precision.parameter * workload.tokens / workload.sequence_cut * workload.shape.hidden_size
    )
    if is_first and workload.code.hidden_dropout:
        kept += held[0] * workload.tokens / workload.sequence_cut * workload.shape.hidden_size
    logits, needed = 0.0, _live(workload, chunks[-1], kinds)
    if is_last:
        kept += 2 * stream  # into and out of the last norm
        logits, loss = loss_memory(workload)
        needed = most(loss, needed - logits - 2 * stream)
    if is_first:
        needed = most(needed, embedding_gradient(workload) - of_chunk[0] - logits)
    needed = most(needed, optimizer_step(workload, is_end=is_first or is_last) - kept - logits)
    return Activations(kept, logits, most(needed, 0) + standing_buffers(workload))


def _chunk_kept(workload: Workload, chunk: Chunk, kinds: dict[bool, LayerMemory]) -> float:
    """Of one microbatch in the layers of one virtual stage."""
    recompute = workload.recompute
    if recompute.granularity != "full":
        return _sum_of_kinds(chunk, {kind: layer.kept for kind, layer in kinds.items()})
    span = recompute.num_layers or 1
    stream = next(iter(kinds.values())).input if kinds else 0.0
    if recompute.method == "block":
        rest = _sum_of_kinds(chunk[span:], {kind: layer.whole for kind, layer in kinds.items()})
        return min(span, len(chunk)) * stream + rest
    return -(-len(chunk) // span) * stream


def _live(workload: Workload, chunk: Chunk, kinds: dict[bool, LayerMemory]) -> float:
    """Beyond what is kept, at the peak of the backward pass of a stage's last layers."""
    if not chunk:
        return 0.0
    recompute, last = workload.recompute, kinds[chunk[-1]]
    whole = {kind: layer.whole for kind, layer in kinds.items()}
    if recompute.granularity == "full":
        span = min(recompute.num_layers or 1, len(chunk))
        if recompute.method != "block":
            # A layer's dispatcher holds its probabilities, and with them its input's gradient, until it runs
            # again (``MoEAlltoAllTokenDispatcher.probs``): all but one lie there in the end.
            left = max(0, sum(chunk) - 1) * last.input
            return _sum_of_kinds(chunk[-span:], whole) + most(last.backward, last.forward) + left
        rest = _sum_of_kinds(chunk[span:], whole)
        again = kinds[chunk[span - 1]]
        return most(last.backward if rest else 0.0, again.whole + again.backward - rest)
    needed = most(last.again + last.backward, last.forward)
    for kind, layer in kinds.items():
        if kind != chunk[-1]:
            needed = most(needed, layer.again + layer.backward - last.kept)
    return needed


def _sum_of_kinds(chunk: Sequence[bool], sizes: dict[bool, float]) -> float:
    with_experts = sum(chunk)
    total = with_experts * sizes[True] if with_experts else 0.0
    return total + ((len(chunk) - with_experts) * sizes[False] if with_experts < len(chunk) else 0.0)


def offloaded(workload: Workload, stage: int, kept: float) -> float:
    """Bytes of kept activations that lie on the CPU: those of the first layers, of all layers' mean size."""
    layers = sum(len(chunk) for chunk in chunks_of(workload, stage))
    return kept * least(1.0, workload.sharing.layers_on_cpu / layers) if layers else 0.0
