"""GPT models trained with Megatron itself, 2021 to 2024: vTrain, SC21, Korthikanti, Megatron's README."""

from __future__ import annotations

import dataclasses

from benchmarks.published.record import Measured, batch, gpt_shape, grid, rows_of
from megaplug.plan.workload import Overlaps, Precision, Recompute, Sharing, Workload

NOTHING_HIDDEN = Overlaps(grad_reduce=False, param_gather=False, p2p=False, tp=False, tp_backward=False)
EVERY_LAYER = Recompute("full", "uniform", 1)


def vtrain() -> list[Measured]:
    """1,440 step times of one A100 node, 2 to 8 GPUs, run with Megatron-DeepSpeed (vTrain, MICRO 2024).

    GPT-2's vocabulary of 50,257 and full recompute are vTrain's own settings for these rows; fp16, unfused
    attention and no ZeRO are what its model of the code does.
    """
    found = []
    for line, row in rows_of("vtrain/ground_truth_single.csv"):
        shape = gpt_shape(
            layers=int(row["# layers"]),
            hidden=int(row["hidden size"]),
            heads=int(row["attention heads"]),
            seq=int(row["sequence length"]),
            vocab=50257,
        )
        tp, pp = int(row["tensor parallelism"]), int(row["pipeline parallelism"])
        workload = Workload(
            grid(gpus=int(row["GPUs"]), tp=tp, pp=pp),
            shape,
            batch(int(row["micro batch"]), int(row["global batch"])),
            precision=Precision.of(fp16=True),
            recompute=EVERY_LAYER,
            sharing=Sharing(zero=0),
            overlaps=NOTHING_HIDDEN,
            fused_attention=False,
        )
        found.append(
            Measured(
                "vtrain",
                line,
                f"h{shape.hidden_size} L{shape.num_layers}",
                workload,
                cluster="a100_80gb",
                software="megatron-deepspeed",
                precision="fp16",
                convention="full",
                published_seconds=float(row["iteration time (ms)"]) / 1000,
                assumed=("80 GB of memory a GPU",),
            )
        )
    return found


def sc21() -> list[Measured]:
    """1.7 to 1,008 billion parameters on 32 to 3,072 A100 (Narayanan et al., SC21, Table 1).

    Unfused attention and all-reduced fp16 gradients after the last microbatch: Megatron had no other then.
    """
    found = []
    for line, row in rows_of("sc21_table1.csv"):
        layers, pp = int(row["layers"]), int(row["PP"])
        chunk = row["layers_per_VP_stage"]
        workload = Workload(
            grid(
                gpus=int(row["gpus"]),
                tp=int(row["TP"]),
                pp=pp,
                vpp=layers // pp // int(chunk) if chunk else None,
            ),
            gpt_shape(
                layers=layers,
                hidden=int(row["hidden"]),
                heads=int(row["heads"]),
                seq=int(row["seq"]),
                vocab=int(row["vocab"]),
            ),
            batch(int(row["MBS"]), int(row["GBS"])),
            precision=Precision.of(fp16=True),
            recompute=EVERY_LAYER,
            sharing=Sharing(zero=0),
            overlaps=NOTHING_HIDDEN,
            fused_attention=False,
        )
        found.append(
            Measured(
                "sc21",
                f"{line}: {row['model_B']}B",
                f"GPT {row['model_B']}B",
                workload,
                cluster="a100_80gb",
                software="megatron-2021",
                precision="fp16",
                convention="full+recompute",
                tflops_per_gpu=float(row["tflops_gpu"]),
            )
        )
    return found


def korthikanti() -> list[Measured]:
    """22 to 1,000 billion parameters on A100, each twice (Korthikanti et al. 2022, Table 5).

    ``full`` is tensor parallelism alone with full recompute, ``present`` adds sequence parallelism and
    recomputes the core attention only. There is no data parallelism in either.
    """
    found = []
    for line, row in rows_of("korthikanti_table5.csv"):
        shape = gpt_shape(
            layers=int(row["layers"]),
            hidden=int(row["hidden"]),
            heads=int(row["heads"]),
            seq=int(row["seq"]),
            vocab=int(row["vocab"]),
        )
        for present in (True, False):
            workload = Workload(
                grid(
                    gpus=int(row["gpus"]),
                    tp=int(row["TP"]),
                    pp=int(row["PP"]),
                    vpp=int(row["interleave"]),
                    sequence_parallel=present,
                ),
                shape,
                batch(int(row["MBS"]), int(row["GBS"])),
                precision=Precision.of(fp16=True),
                recompute=Recompute("selective", modules=("core_attn",)) if present else EVERY_LAYER,
                sharing=Sharing(zero=0),
                overlaps=dataclasses.replace(NOTHING_HIDDEN, tp_backward=True),
                fused_attention=False,
            )
            which = "present" if present else "full"
            found.append(
                Measured(
                    "korthikanti",
                    f"{line}: {row['model']} {which}",
                    f"GPT {row['model']}",
                    workload,
                    cluster="a100_80gb",
                    software="megatron-2022",
                    precision="fp16",
                    convention="full",
                    published_seconds=float(row[f"iter_{which}{'' if present else '_recompute'}_s"]),
                )
            )
    return found


def readme_h100() -> list[Measured]:
    """1.7 to 462 billion parameters on 48 to 6,144 H100, bf16 (README of Megatron-core 0.8).

    The README says that communication of all three kinds was overlapped, which in a pipeline needs
    interleaving. It says neither the size of a microbatch nor the layers of a virtual stage. Without a
    pipeline the four sequences of a rank are taken as one microbatch: of four, only the last's backward could
    hide the reduction of gradients, and steps of 16 and 32 billion would be longer than published.
    """
    found = []
    for line, row in rows_of("megatron_readme_h100.csv"):
        layers, tp, pp = int(row["layers"]), int(row["TP"]), int(row["PP"])
        workload = Workload(
            grid(
                gpus=int(row["gpus"]), tp=tp, pp=pp, vpp=layers // pp if pp > 1 else None,
                sequence_parallel=tp > 1,
            ),
            gpt_shape(
                layers=layers,
                hidden=int(row["hidden"]),
                heads=int(row["heads"]),
                seq=int(row["seq"]),
                vocab=int(row["vocab"]),
            ),
            batch(4 if pp == 1 else 1, int(row["GBS"])),
            precision=Precision.of(bf16=True),
            overlaps=Overlaps(tp=True),
        )  # fmt: skip
        found.append(
            Measured(
                "readme_h100",
                f"{line}: {row['model_B']}B",
                f"GPT {row['model_B']}B",
                workload,
                cluster="h100",
                software="megatron-core-0.8",
                precision="bf16",
                convention="full",
                tflops_per_gpu=float(row["tflops_gpu"]),
                assumed=(
                    f"micro_batch_size {4 if pp == 1 else 1}",
                    "one layer a virtual stage",
                    "no recompute",
                ),
            )
        )
    return found
