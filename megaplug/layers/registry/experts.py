"""The experts that come with megaplug, and which ones a model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megaplug.layers.registry.plugin import EXPERTS, Limits, Parameter, Plugin

GROUPED = Plugin(
    name="grouped",
    kind=EXPERTS,
    target="megaplug.layers.experts.grouped:GroupedExperts",
    doc="all experts of a rank as two grouped linear layers, on CPU and CUDA without compiled extensions",
    parameters={
        "kernel": Parameter(
            str,
            "auto",
            "torch's grouped_mm, or a loop of matrix products; auto takes the faster one",
            ("auto", "grouped_mm", "loop"),
        )
    },
    limits=Limits(dtypes=dict.fromkeys(("cpu", "cuda"), ("fp64", "fp32", "bf16", "fp16"))),
)

SEQUENTIAL = Plugin(
    name="sequential",
    kind=EXPERTS,
    target="megatron.core.transformer.moe.experts:SequentialMLP",
    doc="Megatron's own, one expert after the other; to compare with",
)

BUILT_IN_EXPERTS = (GROUPED, SEQUENTIAL)


@dataclass(frozen=True)
class ExpertsChoice:
    """The experts of a model.

    Attributes:
        name: Of registered experts; None leaves them to the backend, which is Transformer Engine's way.
        params: The user's parameters.
    """

    name: str | None = GROUPED.name
    params: Mapping[str, Any] = field(default_factory=dict)
