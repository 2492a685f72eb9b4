"""How long a step takes: an analytic model with few constants, fitted on published measurements."""

from __future__ import annotations

from megaplug.plan.step_time.breakdown import StepTime
from megaplug.plan.step_time.choice import constants_for, constants_of
from megaplug.plan.step_time.constants import Constants, load_constants
from megaplug.plan.step_time.layer import layer_seconds
from megaplug.plan.step_time.model import step_parts, step_time
from megaplug.plan.step_time.pipeline import pipeline_seconds
from megaplug.plan.step_time.rates import Rates, rates_of
from megaplug.plan.step_time.terms import Terms, stack, terms_of

__all__ = [
    "Constants",
    "Rates",
    "StepTime",
    "Terms",
    "constants_for",
    "constants_of",
    "layer_seconds",
    "load_constants",
    "pipeline_seconds",
    "rates_of",
    "stack",
    "step_parts",
    "step_time",
    "terms_of",
]
