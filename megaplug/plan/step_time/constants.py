"""Named sets of the step-time model's few fitted numbers, each stored with how it was made and its error.

``constants/<name>.json`` holds one set a GPU generation, precision and software generation. A set is fitted
by ``benchmarks/fit_step_time.py`` and its error is that on the published rows it was *not* fitted to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from megaplug.errors import UserError

FOLDER = Path(__file__).parent / "constants"


@dataclass(frozen=True)
class Constants:
    """What the model cannot know from data sheets. Efficiencies are parts of the cluster's peaks.

    Attributes:
        gemm_efficiency: Of the peak, of a large matrix product.
        attention_efficiency: Of the bf16 peak, of fused attention's products.
        memory_efficiency: Of the memory bandwidth.
        element_passes: Reads and writes of the residual stream by a layer's element-wise kernels in forward.
        score_passes: Reads and writes of the scores by unfused attention's softmax and dropout in forward.
        head_efficiency: Of the peak, of the product with the vocabulary.
        launch_seconds: Below which a layer's forward pass does not come: the CPU starting its kernels.
        moe_launch_seconds: What a layer with experts waits for the CPU in each pass, in seconds, whatever the
            GPU has to compute: for the counts of tokens, which shapes depend on.
        expert_seconds: The same for each expert of a rank, in seconds: some ten kernels (a cast and a product
            for each of two weights, and their splits) that the GPU is too fast for to be started in time.
        expert_passes: Reads and writes of a token's copies, one for each of its experts, in forward and in
            backward: putting them in order and back, weighing, adding.
        bias_passes: More of them where experts have biases, which Megatron-core adds expert by expert and in
            fp32 (``TEGroupedMLP._apply_bias``). Counting its tensors gives about 17. It is set by hand to
            what GPT-OSS takes, the one such model that was measured, and what is not known of it is in it.
        link_efficiency: Of the bandwidth inside a node, of collectives.
        network_efficiency: Of the bandwidth between nodes.
        collective_seconds: Latency of a collective.
        microbatch_seconds: Of a microbatch on a stage, beside its layers.
        step_seconds: Of a step, beside its microbatches.
        overlap: Part of overlapped communication's window that does hide it.
        error: Mean relative error on the rows the set was not fitted to; None where there are none.
        name: Of the set.
        note: What a reader of a figure made with this set must be told, such as another GPU's name.
    """

    gemm_efficiency: float = 0.7
    attention_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    element_passes: float = 14.0
    score_passes: float = 6.0
    head_efficiency: float = 0.6
    launch_seconds: float = 8e-4
    moe_launch_seconds: float = 6.5e-4
    expert_passes: float = 8.5
    bias_passes: float = 60.0
    expert_seconds: float = 6.5e-5
    link_efficiency: float = 0.7
    network_efficiency: float = 0.7
    collective_seconds: float = 2e-5
    microbatch_seconds: float = 1e-3
    step_seconds: float = 2e-3
    overlap: float = 0.8
    error: float | None = None
    name: str = "unfitted"
    note: str = ""


@cache
def load_constants(name: str) -> Constants:
    """The set of one name.

    Raises:
        UserError: If there is none.
    """
    stored = stored_constants(name)
    known = {field.name for field in fields(Constants)}
    unknown = sorted(set(stored["values"]) - known)
    if unknown:
        raise ValueError(f"constants {name!r} have values that the model has not: {', '.join(unknown)}")
    mean = stored.get("held_out", {}).get("mean")
    return replace(Constants(error=mean, name=name), **stored["values"])


def stored_constants(name: str) -> dict[str, Any]:
    """The stored record of a set: ``values``, ``fitted_on``, ``how``, ``held_out``.

    Raises:
        UserError: If there is none.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise UserError(
            f"there are no step-time constants {name!r}", hint="there are: " + ", ".join(constants_names())
        )
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@cache
def constants_names() -> tuple[str, ...]:
    """All sets there are."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
