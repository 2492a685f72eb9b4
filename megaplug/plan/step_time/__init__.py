"""How long a step takes: an analytic model with few constants, fitted on published measurements."""

from __future__ import annotations

from megaplug.plan.step_time.breakdown import StepTime

__all__ = ["StepTime"]
