"""NVIDIA Megatron-Bridge, releases 25.09 to 26.04: Hopper and Blackwell, dense and MoE, BF16 to NVFP4."""

from __future__ import annotations

import dataclasses
import re

from benchmarks.published.bridge_recipes import recipe_of
from benchmarks.published.models import NOT_SHIPPED, shape_of
from benchmarks.published.record import Measured, batch, grid, rows_of
from megaplug.plan.workload import Implementation, Overlaps, Precision, Recompute, Sharing, Workload
from megaplug.topology import LaidOutTopology, ModelShape, Topology

# "FP8" alone is FP8 with current scaling; in the releases that put a second figure in parentheses, that
# one is MXFP8, as 25.11 says in its column and 25.09 with figures near the same.
PRECISIONS = {"BF16": "bf16", "FP8": "fp8-cs", "FP8-CS": "fp8-cs", "FP8-MX": "mxfp8", "MXFP8": "mxfp8"}
PRECISIONS["NVFP4"] = "nvfp4"
COMPUTE = {"bf16": "bf16", "fp8-cs": "fp8", "mxfp8": "fp8", "nvfp4": "nvfp4"}
# DeepSeek-V3 and Kimi K2 have 61 layers, and lie on the stages by a --pipeline-model-parallel-layout: by
# (virtual) stages in all, their layers (Bridge's recipes for the two models). What is missing in the last one
# is the prediction of a second token and the loss.
LAYOUTS = {8: (8, *[8] * 6, 5), 16: (4, *[4] * 14, 1), 32: (1, *[2] * 30, 0)}


def bridge() -> list[Measured]:
    """Every row whose model we ship; a row with second figures in parentheses makes two measurements."""
    found = []
    for line, row in rows_of("bridge_perf.csv"):
        if _model(row) in NOT_SHIPPED:
            continue
        found.append(_measured(line, row, second=False))
        if "(" in row["tok_s_gpu"]:
            found.append(_measured(line, row, second=True))
    return found


def left_out() -> dict[str, str]:
    """The rows that `bridge` leaves out, and why."""
    rows = rows_of("bridge_perf.csv")
    return {_row_id(line, row): NOT_SHIPPED[_model(row)] for line, row in rows if _model(row) in NOT_SHIPPED}


def _measured(line: str, row: dict[str, str], *, second: bool) -> Measured:
    """One measurement: what stands before the parentheses or, where there are some, what stands in them."""

    def number(key: str) -> int:
        return _number(row[key], second=second)

    model, assumed = (
        _model(row),
        ["recompute, dispatch and overlap as in Bridge's recipe for model and GPU"],
    )
    gpu = row["system"].removeprefix("DGX-").lower()
    recipe = recipe_of(model, gpu, row["release"])
    label = "mxfp8" if second else PRECISIONS[row["precision"].split(" ")[0]]
    shape = shape_of(model, number("seq"))
    tp, pp = number("TP"), number("PP")
    topology = grid(
        gpus=number("gpus"), tp=tp, pp=pp, cp=number("CP"), ep=number("EP"), vpp=number("VP"),
        sequence_parallel=tp > 1,
    )  # fmt: skip
    topology = _stages(topology, shape)
    mtp = int(model == "DeepSeekV3" and "w/o MTP" not in row["model"])
    if mtp:
        assumed.append("multi-token prediction is not in the workload: its part of the FLOPs is added")
    precision = Precision.of(
        bf16=label == "bf16", fp8=label != "bf16", gradients_in_fp32=False
    )  # as in Bridge's recipes for performance
    workload = Workload(
        topology,
        shape,
        batch(number("MBS"), number("GBS")),
        precision=dataclasses.replace(precision, compute=COMPUTE[label]),
        sharing=Sharing(zero=3 if number("FSDP") else 1),
        recompute=Recompute("selective", modules=recipe.recompute) if recipe.recompute else Recompute(),
        # In nvfp4 the recipes switch the overlap of tensor parallelism off.
        overlaps=Overlaps(tp=tp > 1 and not shape.is_moe and label != "nvfp4", ep=recipe.overlap_ep),
        code=Implementation(backend="te", grouped_experts=True, tokens_sent_once=recipe.sent_once),
    )
    return Measured(
        "bridge",
        _row_id(line, row) + (" (second)" if second else ""),
        row["model"],
        workload,
        cluster=gpu,
        software=f"bridge-{row['release']}",
        precision=label,
        convention="causal",
        tokens_per_gpu=_number(row["tok_s_gpu"], second=second),
        tflops_per_gpu=_number(row["tflops_gpu"], second=second),
        mtp_num_layers=mtp,
        assumed=tuple(assumed),
    )


def _stages(topology: Topology, shape: ModelShape) -> Topology:
    """Uneven pipeline stages as Bridge's recipes have them."""
    pp, vpp, layers = topology.pp, topology.vpp or 1, shape.num_layers
    if layers % (pp * vpp) == 0:
        return topology
    if layers == 61:
        return LaidOutTopology(**vars(topology), layout=LAYOUTS[pp * vpp])
    return dataclasses.replace(
        topology, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )


def _model(row: dict[str, str]) -> str:
    return row["model"].split(" (")[0]


def _row_id(line: str, row: dict[str, str]) -> str:
    return f"{line}: {row['model']} {row['precision']} {row['system']} x {row['gpus']} {row['release']}"


def _number(text: str, *, second: bool) -> int:
    """`3986 (3546)` is 3986, and 3546 as the second; `n/a` is 1, a size that cuts nothing."""
    if text == "n/a":
        return 1
    plain, _, in_parentheses = re.sub(r"[ )]", "", text).partition("(")
    return int(in_parentheses if second and in_parentheses else plain)
