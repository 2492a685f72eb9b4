"""The most a GPU can compute, by its name: the denominator of MFU.

Dense matrix multiplication, without sparsity, at the boost clock, from NVIDIA's data sheets; TFLOP/s. Where
a sheet gives only the figure with 2:4 sparsity, half of it. fp32 is that of the plain units: torch does not
use TF32 unless it is told to.
"""

from __future__ import annotations

import re

# Matched in this order, as words, against the name that the driver gives: (pattern, bf16 and fp16, fp32).
PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"GB200", 2500.0, 80.0),
    (r"B200", 2250.0, 75.0),
    (r"GH200", 989.4, 66.9),
    (r"H200", 989.4, 66.9),
    (r"H100 NVL", 835.5, 60.0),
    (r"H100 PCIe", 756.4, 51.2),
    (r"H100", 989.4, 66.9),
    (r"H20", 148.0, 44.0),
    (r"A100", 312.0, 19.5),
    (r"A40", 149.7, 37.4),
    (r"A30", 165.0, 10.3),
    (r"A10", 125.0, 31.2),
    (r"L40S", 362.05, 91.6),
    (r"L40", 181.05, 90.5),
    (r"L4", 121.0, 30.3),
    (r"RTX 4090", 165.2, 82.6),
    (r"RTX 3090", 71.0, 35.6),
)


def peak_tflops(device_name: str, *, half: bool) -> float | None:
    """Peak TFLOP/s of a GPU, or None where the table does not know it: then ``logging.peak_tflops`` says it.

    Args:
        device_name: As the driver gives it, such as ``NVIDIA H100 80GB HBM3``.
        half: In bf16 or fp16 (fp8 is measured against these, too, since only a part of a step runs in it).
    """
    for pattern, in_half, in_fp32 in PEAKS:
        # "H100" also stands at the head of names such as "A100-SXM4-80GB" does for A100.
        if re.search(rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])", device_name):
            return in_half if half else in_fp32
    return None
