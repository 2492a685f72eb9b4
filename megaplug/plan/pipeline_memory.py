"""Tensors of the residual stream that the pipeline's schedule holds beside the layers: how many, modelled.

``schedules.py``: a name in a loop keeps what it names until it names the next one, and with overlapped
communication what comes next is received while a microbatch is computed. An input that something still names
once its backward pass is done keeps its gradient, too. That, and that a stage holds less where microbatches
are so few that forward and backward passes never go together, is said of the first and the last stage alone,
so that of like stages between the ends the earliest is the fullest (``telling_stages.py``).
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
    """Inputs whose backward pass is done, each with its gradient; said of the last stage alone.

    A virtual stage names its last one (``TransformerBlock.input_tensor``): as the first one begins, that of
    the last one is done. With overlap the schedule names the one that came last before the steady state
    (``input_tensor`` in ``forward_backward_pipelining_with_interleaving``), whose backward pass is the first.
    Of each the gradient was counted already where the pass just before gave it.
    """
    topology = workload.topology
    if backward == 1 or stage < topology.pp - 1:
        return 0
    vpp, group = topology.vpp or 1, topology.pp
    found = 0
    if backward > (vpp - 1) * group:
        found += 2 - (backward - 1 == group)
    if workload.overlaps.p2p:
        found += 2 - (backward == 2)
    return found


def _goes_together(workload: Workload, stage: int, backward: float) -> float:
    """1, or 0 where the first stage does that backward pass after all its forward passes."""
    return where(pairs_of_passes(workload, stage) >= backward, 1, 0) if stage == 0 else 1
