"""NVIDIA NeMo: FP8 pre-training on H100 (24.07), and long sequences with context parallelism."""

from __future__ import annotations

from benchmarks.published.models import shape_of
from benchmarks.published.record import Measured, batch, grid, rows_of
from megaplug.plan.workload import Overlaps, Precision, Workload

# Gradients are reduced in bf16, as in NeMo's recipes for performance.
FP8 = Precision.of(fp8=True, gradients_in_fp32=False)


def nemo2407() -> list[Measured]:
    """Twelve runs of 8 to 512 H100 with Transformer Engine's FP8 and flash attention (NeMo 24.07)."""
    found = []
    for line, row in rows_of("nemo2407_h100_fp8.csv"):
        tp = int(row["TP"])
        workload = Workload(
            grid(
                gpus=int(row["gpus"]),
                tp=tp,
                pp=int(row["PP"]),
                cp=int(row["CP"]),
                vpp=int(row["VP"]),
                sequence_parallel=tp > 1,
            ),
            shape_of(row["model"], int(row["seq"])),
            batch(int(row["MBS"]), int(row["GBS"])),
            precision=FP8,
            overlaps=Overlaps(tp=tp > 1),
        )
        found.append(
            Measured(
                "nemo2407",
                f"{line}: {row['model']} on {row['gpus']}",
                row["model"],
                workload,
                cluster="h100",
                software="nemo-24.07",
                precision="fp8",
                convention="full",
                tokens_per_gpu=float(row["tok_s_gpu"]),
                tflops_per_gpu=float(row["tflops_gpu"]),
                assumed=("no recompute",),
            )
        )
    return found


def nemo_long() -> list[Measured]:
    """4,096 to 1,048,576 tokens a sequence (NeMo's page on long sequences), with context parallelism.

    The column without context parallelism has no topology of its own, and is left out. On B200 the sizes
    TP x PP x DP x CP make a quarter of the GPUs that stand beside them, and no data-parallel size that makes
    all of them divides the batch of the longest sequences: the sizes are taken, not the GPUs.
    """
    found = []
    for line, row in rows_of("nemo_long_seq.csv"):
        tp, pp, dp, cp = (int(row[key]) for key in ("TP", "PP", "DP", "CP"))
        world = tp * pp * dp * cp
        assumed = ["micro_batch_size 1", "no recompute", "FP8"]
        if world != int(row["gpus"]):
            assumed.append(f"{world} GPUs (TP x PP x DP x CP), not the {row['gpus']} of the table")
        workload = Workload(
            grid(gpus=world, tp=tp, pp=pp, cp=cp, sequence_parallel=tp > 1),
            shape_of(row["model"], int(row["seqK"]) * 1024),
            batch(1, int(row["GBS"])),
            precision=FP8,
            overlaps=Overlaps(tp=tp > 1),
        )
        found.append(
            Measured(
                "nemo_long",
                f"{line}: {row['model']} {row['seqK']}K",
                row["model"],
                workload,
                cluster=row["gpu"].lower(),
                software="nemo-long-sequences",
                precision="fp8",
                convention="full",
                tflops_per_gpu=float(row["tflops_CP"]),
                assumed=tuple(assumed),
            )
        )
    return found
