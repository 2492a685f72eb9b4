"""What an MLP keeps of one microbatch for its backward pass, and the steps of that pass: bytes, modelled.

With T tokens of a microbatch on a rank, e bytes a number, t = tp, and S = t under sequence parallelism or 1,
a dense layer keeps ``4 T h e / S`` (the inputs of two norms and what comes out of them, which the linear
layers keep), what attention keeps (``attention_memory.py``) and ``T f (g + 1) e / t`` (before and after the
activation function; g is 2 for SwiGLU). That is Korthikanti et al. 2022, section 4, with grouped queries,
SwiGLU and without dropout. All were counted in the modules themselves (``benchmarks/rehearse_random.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megaplug.plan.numbers import most
from megaplug.plan.workload import Workload


@dataclass(frozen=True)
class MlpMoments:
    """Bytes around the activation function of an MLP.

    Attributes:
        between: After it.
        before: Before it: ``g`` times as many.
        second: The gradient of the second projection's weight.
        first: Of the first one's.
        besides: What the activation function's own backward pass needs for a moment.
    """

    between: float
    before: float
    second: float
    first: float
    besides: float = 0.0


def mlp_kept(workload: Workload, ffn: float, tokens: float) -> float:
    """Before and after the activation function, of a dense MLP of that hidden size (already cut over tp)."""
    shape = workload.shape
    gates = 2 if shape.swiglu else 1
    parts = gates + 1
    if workload.code.device == "cpu" and shape.swiglu:
        # ``layers/swiglu.py`` keeps the SiLU of the gate; on CUDA Megatron's fused one is compiled.
        parts += 1
    return workload.precision.parameter * tokens * ffn * parts


def mlp_moments(workload: Workload, ffn: float, tokens: float, *, matrices: float = 1) -> MlpMoments:
    """Of an MLP of that hidden size, or of several whose weights are one tensor."""
    size, gates = workload.precision.parameter, 2 if workload.shape.swiglu else 1
    between, weight = size * tokens * ffn, matrices * size * ffn * workload.shape.hidden_size
    return MlpMoments(between, gates * between, weight, gates * weight)


def widest_step(mlp: MlpMoments, *, before: float, after: float) -> float:
    """The fullest of an MLP's three steps backward, beyond what it kept.

    Args:
        mlp: Its sizes.
        before: The output's gradient where it is gathered.
        after: The input's gradient, whole and as it is passed on.
    """
    second = before + mlp.between + mlp.second
    # Both gradients; what the second projection kept is gone.
    activation = mlp.before + mlp.besides
    first = after + mlp.first - mlp.between
    return most(second, most(activation, first))
