"""Which sets of step-time constants there are: the rows each is for, and what of it is fitted.

A set belongs to a GPU generation, a number format and a software generation. Megatron-Bridge's tables make
three of those: 25.09; 25.11 and 26.02; and 26.02.01 with 26.04, where Qwen3 30B became nearly twice as fast
on H100 with the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.published.record import Measured

# Of a fitted number: where the search begins, how far from there (in e-folds) costs something, and what it
# cannot exceed.
Prior = tuple[float, float, float]

VTRAIN: dict[str, Prior] = {
    "gemm_efficiency": (0.75, 0.3, 0.9),
    "memory_efficiency": (0.8, 0.2, 0.92),
    "element_passes": (20.0, 0.6, 200.0),
    "score_passes": (8.0, 0.4, 30.0),
    "head_efficiency": (0.6, 0.6, 0.9),
    "launch_seconds": (8e-4, 1.0, 1.0),
    "link_efficiency": (0.75, 0.3, 0.95),
    "collective_seconds": (2e-5, 1.0, 1.0),
    "microbatch_seconds": (1e-3, 1.0, 1.0),
    "step_seconds": (2e-3, 1.0, 1.0),
}
UNFUSED: dict[str, Prior] = {"gemm_efficiency": (0.8, 0.25, 0.9)}
# Of Hopper and Blackwell with Transformer Engine, where it is not A100's: one list for all GPUs, formats and
# releases, set by hand in round numbers. It was not fitted, and yet all of Bridge's rows were looked at: what
# a fit with three rows a set errs on the others is not what it would err on a table never seen.
NEWER = {
    "gemm_efficiency": 0.65,
    "attention_efficiency": 0.5,
    "memory_efficiency": 0.85,
    "head_efficiency": 0.6,
    "element_passes": 15.0,
    "launch_seconds": 6e-4,
    "moe_launch_seconds": 6.5e-4,
    "expert_seconds": 6.5e-5,
    "expert_passes": 8.5,
    "bias_passes": 60.0,
    "link_efficiency": 0.75,
    "network_efficiency": 0.8,
    "microbatch_seconds": 5e-4,
}
# Where the search for the efficiency of products begins: the peaks of B200 and GB200 are not held for as long
# as those of H100, B300 and GB300, whose sheets have the same bf16 peak as theirs and more power.
GEMM = {("b200", "fp8"): 0.55, ("gb200", "fp8"): 0.55, ("b200", "bf16"): 0.6, ("gb200", "bf16"): 0.6}
# FlashAttention-2 on H100, as software of 2024 had it: version 3 was written because 2 reaches 35 % of the
# peak there (Shah et al. 2024).
ATTENTION_OF_2024 = 0.35


def dense(gemm: float = 0.65, attention: float = NEWER["attention_efficiency"]) -> dict[str, Prior]:
    """What is fitted of dense models."""
    return {"gemm_efficiency": (gemm, 0.1, 0.85), "attention_efficiency": (attention, 0.15, 0.75)}


def with_experts(gemm: float) -> dict[str, Prior]:
    """What is fitted where there are models with experts: how long they wait for the CPU changes most."""
    return {
        "gemm_efficiency": (gemm, 0.05, 0.85),
        "expert_passes": (NEWER["expert_passes"], 0.15, 60.0),
        "moe_launch_seconds": (NEWER["moe_launch_seconds"], 0.5, 0.02),
    }


@dataclass(frozen=True)
class SetOfConstants:
    """One set.

    Attributes:
        name: File under ``megaplug/plan/step_time/constants``.
        covers: Attributes that a row must have, any one of the lists being enough.
        free: What is fitted.
        base: Values that are not fitted and not A100's.
        most: Rows that it may be fitted on.
        judged_only: Tables that it covers and is not fitted on.
    """

    name: str
    covers: tuple[dict[str, str], ...]
    free: dict[str, Prior]
    base: dict[str, float] = field(default_factory=lambda: dict(NEWER))
    most: int = 3
    judged_only: tuple[str, ...] = ()

    def has(self, measured: Measured) -> bool:
        """Whether a row belongs to it."""
        return any(
            all(getattr(measured, key) == value for key, value in wanted.items()) for wanted in self.covers
        )


def _bridge(gpu: str, format_: str, name: str, releases: tuple[str, ...]) -> SetOfConstants:
    precisions = {"fp8": ("fp8-cs", "mxfp8")}.get(format_, (format_,))
    covers = [
        {"cluster": gpu, "precision": precision, "software": f"bridge-{release}"}
        for release in releases
        for precision in precisions
    ]
    gemm = GEMM.get((gpu, format_), NEWER["gemm_efficiency"])
    free = dense(gemm) if format_ == "nvfp4" else with_experts(gemm)
    return SetOfConstants(f"{gpu}_{format_}_{name}", tuple(covers), free)


RELEASES = {
    "bridge-25.09": ("25.09",),
    "bridge-25.11": ("25.11", "26.02"),
    "bridge-26.04": ("26.02.01", "26.04"),
}
OF_2024 = dense(attention=ATTENTION_OF_2024)
VTRAIN_SET = SetOfConstants("a100_bf16", ({"table": "vtrain"},), VTRAIN, base={}, most=360)
SETS = (
    SetOfConstants(
        "a100_bf16_megatron-2021",
        ({"table": "sc21"}, {"table": "korthikanti"}),
        UNFUSED,
        base={},
        judged_only=("korthikanti",),
    ),
    SetOfConstants("h100_bf16_core-0.8", ({"table": "readme_h100"},), OF_2024),
    SetOfConstants("h100_fp8_nemo-24.07", ({"table": "nemo2407"},), OF_2024),
    SetOfConstants(
        "h100_fp8_nemo-long", ({"table": "nemo_long", "cluster": "h100"},), dense(attention=ATTENTION_OF_2024)
    ),
    SetOfConstants("b200_fp8_nemo-long", ({"table": "nemo_long", "cluster": "b200"},), dense()),
    *(
        _bridge(gpu, format_, name, releases)
        for gpu in ("h100", "b200", "b300", "gb200", "gb300")
        for format_ in ("bf16", "fp8", "nvfp4")
        for name, releases in RELEASES.items()
    ),
)
