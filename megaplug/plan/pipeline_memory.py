"""Tensors of the residual stream that the pipeline's schedule holds beside the layers: how many, modelled.

``schedules.py``: a name in a loop keeps what it names until it names the next one, and with overlapped
communication what comes next is received while a microbatch is computed. An input that something still names
once its backward pass is done keeps its gradient, too. That a stage holds less where microbatches are so few
that forward and backward passes never go together is said of the first and the last stage alone, so that of
like stages between the ends the earliest is the fullest (``telling_stages.py``).
"""

from __future__ import annotations

from megaplug.plan.in_flight import pairs_of_passes, warmup_passes
from megaplug.plan.numbers import where
from megaplug.plan.workload import Workload


def held_in_backward(workload: Workload, stage: int, backward: float) -> float:
    """Beside the gradient that comes in, as a backward pass runs.

    Args:
        workload: The job.
        stage: Which pipeline stage.
        backward: Which of its backward passes, from 1.
    """
    topology = workload.topology
    if topology.pp == 1:
        return 0
    before = _before(workload, stage, backward)
    if topology.vpp is None:
        return before
    # The next microbatch's input is there.
    is_end = stage in (0, topology.pp - 1)
    comes = where(pairs_of_passes(workload, stage) > backward, 1, 0) if is_end else 1
    return before + comes + _is_sent(workload, stage, backward) + _left(workload, stage, backward)


def held_in_forward(workload: Workload, stage: int, backward: int) -> float:
    """As the forward pass runs that goes before a backward pass of the steady state."""
    topology = workload.topology
    if topology.pp == 1:
        return 0
    # ``output_tensor_grad``: of the backward pass before, or with overlap of the next one already.
    is_last = stage == topology.pp - 1
    comes = 1 if not is_last and (backward > 1 or topology.vpp is not None) else 0
    held = (_before(workload, stage, backward) + comes) * _goes_together(workload, stage, backward)
    return held if topology.vpp is None else held + _left(workload, stage, backward)


def held_after(workload: Workload, stage: int) -> int:
    """As the optimizer steps: what each virtual stage took last (``TransformerBlock.input_tensor``).

    Its gradient, too; the first virtual stage of all takes nothing.
    """
    topology = workload.topology
    return 2 * ((topology.vpp or 1) - (stage == 0)) if topology.pp > 1 else 0


def _before(workload: Workload, stage: int, backward: float) -> int:
    """``input_tensor_grad``: what the backward pass before gave; nothing comes out of the first stage."""
    return 1 if backward > 1 and not (stage == 0 and workload.topology.vpp is None) else 0


def _is_sent(workload: Workload, stage: int, backward: float) -> float:
    """With overlap, what was computed last is still being sent; the end of the model sends nothing."""
    topology = workload.topology
    if not workload.overlaps.p2p:
        return 0
    is_sent = _goes_together(workload, stage, backward)
    if stage < topology.pp - 1:
        return is_sent
    vpp = topology.vpp or 1
    chunk = (warmup_passes(workload, stage) + backward - 1) // topology.pp % vpp
    return is_sent * where(chunk == vpp - 1, 0, 1)


def _left(workload: Workload, stage: int, backward: float) -> float:
    """Inputs whose backward pass is done, each with its gradient, in the virtual stages' first turns.

    A virtual stage names the one that it took last (``TransformerBlock.input_tensor``): that of the last
    virtual stage is done once its turn is over, and named until its next turn forward. With overlap the
    schedule goes on naming what came before the steady state (``input_tensor`` in
    ``forward_backward_pipelining_with_interleaving``): in the later half of the stages it is an input of the
    last virtual stage, and its backward pass comes in the first turn. Of each the gradient was counted
    already where the pass just before gave it.
    """
    topology = workload.topology
    turn, behind = topology.pp, topology.pp - stage - 1
    found: float = 0
    is_named: float = 0
    if backward > turn:
        is_named = 1
        if backward > (topology.vpp or 1) * turn - 2 * behind:
            is_named = where(workload.num_microbatches > turn, 0, 1)
        found += is_named * (2 - (backward - 1 == turn))
    first = first_in_steady_state(topology.pp, stage)
    if workload.overlaps.p2p and first <= turn and backward > first:
        # The last one of a turn is the one that the virtual stage names.
        found += (2 - (backward - 1 == first)) * (1 - is_named * (first == turn))
    return found


def first_in_steady_state(pp: int, stage: int) -> int:
    """Interleaved: which forward pass of the last virtual stage is the first one with a backward pass.

    Beyond ``pp``, the length of a turn, it is one of the first virtual stage's next turn.
    """
    return 2 * (pp - stage - 1) + 1


def _goes_together(workload: Workload, stage: int, backward: float) -> float:
    """1, or 0 where the first stage does that backward pass after all its forward passes."""
    return where(pairs_of_passes(workload, stage) >= backward, 1, 0) if stage == 0 else 1
