"""The seconds of one step by what they are spent on: modelled."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepTime:
    """Seconds on the critical path of one step, none counted twice: their sum is the step.

    Attributes:
        compute: Forward and backward of the busiest stage, with what is computed again.
        tp: Tensor-parallel communication that nothing hides.
        cp: Context-parallel communication that nothing hides.
        ep: Dispatch and combine of tokens to experts that nothing hides.
        pp: Point-to-point transfers between stages that nothing hides.
        bubble: Waiting for the pipeline to fill and to empty, and for slower stages.
        dp: Reduction of gradients and gathering of weights that nothing hides.
        optimizer: The optimizer's step.
        error: Mean relative error of the constants on the measurements they were not fitted to, such as 0.07;
            None where there are none.
    """

    compute: float
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    pp: float = 0.0
    bubble: float = 0.0
    dp: float = 0.0
    optimizer: float = 0.0
    error: float | None = None

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "error")
