"""The machines that a plan is made for: sizes and speeds that can be."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job

FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8", "nvfp4")

_POSITIVE = (
    "num_gpus", "gpus_per_node", "memory_gib", "memory_bandwidth_tbps", "link_gbps", "link_domain",
    "network_gbps",
)  # fmt: skip
_NOT_NEGATIVE = ("reserved_gib", "price_per_gpu_hour")
_DEAREST = 1e6
_MAY_BE_NULL = ("num_gpus", "link_domain", "price_per_gpu_hour", "constants")


def cluster_problems(job: Job) -> Iterator[Problem]:
    """What is wrong with the ``cluster`` section; null means something in ``cluster=auto`` only."""
    cluster = job.cluster
    for name, value in vars(cluster).items():
        key = f"cluster.{name}"
        if value is None:
            if cluster.name != "auto" and name not in _MAY_BE_NULL:
                yield Problem(key, "cannot be null", "only cluster=auto fills in what is null")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(key, f"must be a finite number, but is {value}")
        elif name == "price_per_gpu_hour" and value > _DEAREST:
            yield Problem(key, f"can be {_DEAREST:,.0f} US dollars at most, but is {value:.3g}")
        elif name in _POSITIVE and value <= 0:
            yield Problem(key, f"must be above 0, but is {value}")
        elif name in _NOT_NEGATIVE and value < 0:
            yield Problem(key, f"must not be negative, but is {value}")
    for number_format, peak in (cluster.peak_tflops or {}).items():
        key = f"cluster.peak_tflops.{number_format}"
        if number_format not in FORMATS:
            yield Problem(key, "is no number format", f"one of: {', '.join(FORMATS)}")
        elif not (math.isfinite(peak) and peak > 0):
            yield Problem(key, f"must be above 0, but is {peak}")
    if cluster.memory_gib and cluster.reserved_gib and cluster.reserved_gib >= cluster.memory_gib:
        yield Problem(
            "cluster.reserved_gib",
            f"{cluster.reserved_gib} GiB of {cluster.memory_gib} GiB leave nothing for a model",
            "use less than cluster.memory_gib",
        )
