"""Tensors of the residual stream that the pipeline's schedule holds beside the layers: how many, modelled.

``schedules.py``: a name in a loop keeps what it names until it names the next one, and with overlapped
communication what comes next is received while a microbatch is computed. Where microbatches are so few that
forward and backward passes never go together, a stage holds one or two less; that is said of the first stage
alone, so that of like stages between the ends the earliest is the fullest (``telling_stages.py``).
"""

from __future__ import annotations

from megaplug.plan.in_flight import pairs_of_passes
from megaplug.plan.numbers import where
from megaplug.plan.workload import Workload


def held_in_backward(workload: Workload, stage: int, backward: int) -> float:
    """Beside the gradient that comes in, as a backward pass runs.

    Args:
        workload: The job.
        stage: Which pipeline stage.
        backward: Which of its backward passes, from 1.
    """
    topology = workload.topology
    if topology.pp == 1:
        return 0
    # ``input_tensor_grad`` is what the backward pass before gave; nothing comes out of the first stage.
    before = 1 if backward > 1 and not (stage == 0 and topology.vpp is None) else 0
    if topology.vpp is None:
        return before
    # The next microbatch's input is there; with overlap what was computed last is still being sent.
    is_sent = workload.overlaps.p2p and stage < topology.pp - 1
    return before + (1 + is_sent) * _goes_together(workload, stage, backward)


def held_in_forward(workload: Workload, stage: int, backward: int) -> float:
    """As the forward pass runs that goes before a backward pass of the steady state."""
    topology = workload.topology
    if topology.pp == 1:
        return 0
    before = 1 if backward > 1 and not (stage == 0 and topology.vpp is None) else 0
    # ``output_tensor_grad``: of the backward pass before, or with overlap of the next one already.
    is_last = stage == topology.pp - 1
    comes = 1 if not is_last and (backward > 1 or topology.vpp is not None) else 0
    return (before + comes) * _goes_together(workload, stage, backward)


def _goes_together(workload: Workload, stage: int, backward: int) -> float:
    """1, or 0 where the first stage does that backward pass after all its forward passes."""
    return where(pairs_of_passes(workload, stage) >= backward, 1, 0) if stage == 0 else 1
