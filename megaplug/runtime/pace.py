"""From tokens and seconds to TFLOP/s and MFU, by the convention of ``job/flops.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaplug.job.checks import job_shape
from megaplug.job.core_attention import CoreAttention
from megaplug.job.flops import training_flops_per_token
from megaplug.job.freeze import FrozenJob
from megaplug.job.gpus import peak_tflops


@dataclass(frozen=True)
class Pace:
    """What a step of a job computes, and what its devices could.

    Attributes:
        flops_per_token: Model FLOPs of forward and backward.
        num_devices: Ranks, each with a device of its own.
        peak_tflops: Of one device; None where it is not known.
    """

    flops_per_token: float
    num_devices: int
    peak_tflops: float | None

    @classmethod
    def of(cls, frozen: FrozenJob) -> Pace:
        """The pace of a frozen job on the device that this rank sees."""
        job, derived = frozen.job, frozen.derived
        shape = job_shape(job, derived.vocab_size)
        peak = job.logging.peak_tflops
        if peak is None and derived.device == "cuda":
            name = torch.cuda.get_device_name()
            peak = peak_tflops(name, half=job.precision.dtype != "fp32")
            if peak is None:
                print(f"megaplug: no MFU: the peak of {name!r} is not known; logging.peak_tflops gives it")
        pairs = CoreAttention.of(job).pairs_of_all(shape)
        per_token = training_flops_per_token(shape, vocab_size=derived.padded_vocab_size, pairs=pairs)
        return cls(per_token, frozen.topology.world_size, peak)

    def of_step(self, tokens: int, seconds: float) -> dict[str, float]:
        """``tflops`` (per second and device) and, where the peak is known, ``mfu`` (a fraction of it)."""
        tflops = self.flops_per_token * tokens / seconds / self.num_devices / 1e12
        return {"tflops": tflops} | ({} if self.peak_tflops is None else {"mfu": tflops / self.peak_tflops})
