"""What one pipeline stage keeps for the backward pass, and the moment that needs most: modelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaplug.plan.in_flight import (
    Chunk,
    chunks_of,
    first_backward_of,
    held_microbatches,
    passes_in_flight,
)
from megaplug.plan.layer_memory import LayerMemory, layer_memory
from megaplug.plan.numbers import least, most
from megaplug.plan.pipeline_memory import held_in_backward, held_in_forward
from megaplug.plan.step_ends import embedding_gradient, loss_memory, standing_buffers, tied_gradient
from megaplug.plan.workload import Workload

Kinds = dict[bool, LayerMemory]
"""A layer's memory, without and with experts."""


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank while passes run.

    Attributes:
        kept: Of all microbatches in flight as the first backward pass begins.
        logits: Of one microbatch, on the last stage.
        workspace: What the fullest moment needs beyond both.
    """

    kept: float
    logits: float
    workspace: float


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond what is kept as a virtual stage runs, with what is passed on between its layers.

    Attributes:
        forward: At the peak of its forward pass.
        backward: At the peak of its backward pass.
    """

    forward: float
    backward: float


def stage_activations(workload: Workload, stage: int) -> Activations:
    """Of any rank of one pipeline stage.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    chunks = chunks_of(workload, stage)
    kinds = {
        kind: layer_memory(workload, has_experts=kind)
        for kind in {kind for chunk in chunks for kind in chunk}
    }
    is_first, is_last = stage == 0, stage == workload.topology.pp - 1
    local = workload.tokens / workload.sequence_cut * workload.shape.hidden_size
    stream = workload.precision.parameter * local
    of_kind = {chunk: _chunk_kept(workload, chunk, kinds) for chunk in set(chunks)}
    of_chunk = [of_kind[chunk] for chunk in chunks]
    if is_first and workload.code.hidden_dropout:
        of_chunk[0] = of_chunk[0] + local  # the mask of what comes out of the embedding

    are_alike = len(set(chunks)) == 1 and of_chunk[0] is of_chunk[-1]

    def held(backward: float) -> float:
        if are_alike:
            return passes_in_flight(workload, stage, backward) * of_chunk[0]
        counts = held_microbatches(workload, stage, backward)
        return sum((count * size for count, size in zip(counts, of_chunk, strict=True)), 0.0)

    kept = fullest = held(1)
    logits: float = 0.0
    # A tied embedding's first gradient waits until the embedding has its own.
    waiting = tied_gradient(workload)
    loss = 0.0
    if is_last:
        logits, loss = loss_memory(workload)
    peaks_of = {chunk: _peaks(workload, chunk, kinds) for chunk in of_kind}
    for at, backward in _told_apart(workload, chunks):
        peaks, now = peaks_of[chunks[at]], held(backward)
        passed = held_in_backward(workload, stage, backward) * stream
        needed = most(0.0, peaks.backward + waiting)
        if is_last and at == len(chunks) - 1:
            needed = most(needed, 2 * stream + logits + loss)
        forward = peaks.forward + held_in_forward(workload, stage, backward) * stream
        fullest = most(fullest, now + most(needed + passed, forward))
    if is_first:
        first = first_backward_of(workload, 0)
        passed = (held_in_backward(workload, stage, first) + (workload.topology.pp > 1)) * stream
        left = _left_by_experts(workload, chunks, kinds)
        emptied = held(first) - of_chunk[0] + left
        fullest = most(fullest, emptied + embedding_gradient(workload) + passed + waiting)
    if is_last:
        kept += 2 * stream  # into and out of the last norm
    standing = standing_buffers(workload, chunks)
    return Activations(kept, logits, most(0, fullest - kept - logits) + standing)


def _told_apart(workload: Workload, chunks: Sequence[Chunk]) -> Iterator[tuple[int, int]]:
    """Virtual stages and backward passes whose moments can differ: of each kind the first two.

    As the last but one begins backward, the last one's input is still there (``pipeline_memory.py``).
    """
    seen: set[Chunk] = set()
    for at in reversed(range(len(chunks))):
        if chunks[at] in seen and at not in (0, len(chunks) - 2):
            continue
        seen.add(chunks[at])
        first = int(first_backward_of(workload, at))
        yield at, first
        yield at, first + 1


def _chunk_kept(workload: Workload, chunk: Chunk, kinds: Kinds) -> float:
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


def _peaks(workload: Workload, chunk: Chunk, kinds: Kinds) -> Peaks:
    """Beyond what is kept."""
    if not chunk:
        return Peaks(0.0, 0.0)
    recompute, last = workload.recompute, kinds[chunk[-1]]
    whole = {kind: layer.whole for kind, layer in kinds.items()}
    if recompute.granularity != "full":
        backward = last.backward
        for kind, layer in kinds.items():
            if kind != chunk[-1]:
                backward = most(backward, layer.backward - last.kept)
        return Peaks(last.forward, backward)
    span = min(recompute.num_layers or 1, len(chunk))
    if recompute.method != "block":
        return Peaks(last.forward, _computed_again(chunk[-span:], kinds))
    rest = _sum_of_kinds(chunk[span:], whole)
    again = _computed_again(chunk[span - 1 : span], kinds) - rest
    return Peaks(last.forward, most(last.backward, again) if span < len(chunk) else again)


def _computed_again(chunk: Chunk, kinds: Kinds) -> float:
    """Layers that run forward and backward at once, beyond the first one's input, which is kept.

    What comes out of them is named until they are done.
    """
    last = kinds[chunk[-1]]
    whole = _sum_of_kinds(chunk, {kind: layer.whole for kind, layer in kinds.items()})
    # That input, which their sum has too, and what comes out are as large.
    return whole + most(last.backward, last.forward)


def _left_by_experts(workload: Workload, chunks: Sequence[Chunk], kinds: Kinds) -> float:
    """Gradients of the inputs of layers with experts that were computed again.

    A layer's dispatcher holds its probabilities, and with them its input's gradient, until it runs again
    (``MoEAlltoAllTokenDispatcher.probs``): in the end those of all layers but one lie there.
    """
    layers = sum(sum(chunk) for chunk in chunks)
    recompute = workload.recompute
    if not layers or (recompute.granularity != "full" and "moe" not in recompute.modules):
        return 0.0
    if recompute.method == "block":
        layers = sum(sum(chunk[: recompute.num_layers or 1]) for chunk in chunks)
    return max(0, layers - 1) * kinds[True].input


def _sum_of_kinds(chunk: Sequence[bool], sizes: dict[bool, float]) -> float:
    with_experts = sum(chunk)
    total = with_experts * sizes[True] if with_experts else 0.0
    return total + ((len(chunk) - with_experts) * sizes[False] if with_experts < len(chunk) else 0.0)


def offloaded(workload: Workload, stage: int, kept: float) -> float:
    """Bytes of kept activations that lie on the CPU: those of the first layers, of all layers' mean size."""
    layers = sum(len(chunk) for chunk in chunks_of(workload, stage))
    return kept * least(1.0, workload.sharing.layers_on_cpu / layers) if layers else 0.0
