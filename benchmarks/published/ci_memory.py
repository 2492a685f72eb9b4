"""Memory of Megatron-LM's functional tests on A100: what its own log says of the last rank, as workloads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.published.record import rows_of
from megaplug.plan.workload import Implementation, Precision, Recompute, Sharing, Workload
from megaplug.topology import Batch, ModelShape, Topology

# Cases whose ``model_config.yaml`` sets both dropouts to 0; Megatron's default is 0.1.
_WITHOUT_DROPOUT = "nondeterministic"


@dataclass(frozen=True)
class MeasuredMemory:
    """One row of the table.

    Attributes:
        line: Of the file, as an editor counts.
        case: Name of the test.
        workload: Its job.
        says_attention: Whether the row says which attention ran. Where it does not, Transformer Engine chose,
            and rows of one case show that its choice has changed.
        has_grouped_experts: Whether the case sets ``moe-grouped-gemm``.
        allocated: Bytes between two steps.
        peak: Bytes at the fullest moment.
        parameters: Of the last pipeline stage's rank.
    """

    line: str
    case: str
    workload: Workload
    says_attention: bool
    has_grouped_experts: bool
    allocated: int
    peak: int
    parameters: int


def ci_memory() -> list[MeasuredMemory]:
    """All 236 rows; the rank is always the last, on the last pipeline stage."""
    return [_measured(str(line), row) for line, row in rows_of("megatron_ci_memory_a100.csv")]


def with_attention(measured: MeasuredMemory, *, fused: bool) -> Workload:
    """The job with flash attention, or with the unfused one."""
    return replace(measured.workload, fused_attention=fused)


def _measured(line: str, row: dict[str, str]) -> MeasuredMemory:
    tp, pp, cp, ep, etp = (int(row[name]) for name in ("tp", "pp", "cp", "ep", "etp"))
    case, layers, world = row["case"], int(row["L"]), int(row["world"])
    shape = ModelShape(
        layers,
        int(row["h"]),
        int(row["ffn"]),
        int(row["nh"]),
        int(row["kv"]),
        None,
        int(row["seq"]),
        int(row["V"]),
        make_vocab_size_divisible_by=1,  # V is padded already
        num_experts=int(row["E"]) if row["E"] else None,
        moe_ffn_hidden_size=int(row["moeffn"]) if row["moeffn"] else None,
        moe_router_topk=int(row["topk"] or 1),
        swiglu=row["swiglu"] == "True",
        add_bias_linear=row["bias"] == "True",
        normalization="LayerNorm",
        qk_layernorm="qk_layernorm" in case,
        untie_embeddings_and_output_weights="untie" in case,
        position_embedding_type="rope" if "rope" in case else "learned_absolute",
    )
    # The column gives layers of a virtual stage.
    vpp = layers // pp // int(row["vpp"]) if row["vpp"] else None
    mesh = Topology(
        tp,
        pp,
        vpp,
        cp,
        ep,
        etp,
        world // (tp * pp * cp),
        world,
        sequence_parallel=tp > 1 and row["sp"] == "True",
    )
    dropout = 0.0 if _WITHOUT_DROPOUT in case else 0.1
    grouped = "te_8experts" in case
    workload = Workload(
        mesh,
        shape,
        Batch(int(row["mbs"]), int(row["gbs"])),
        precision=Precision.of(bf16=row["prec"] == "bf16", fp16=row["prec"] == "fp16"),
        recompute=Recompute("full", "uniform", 1) if row["rec"] else Recompute(),
        sharing=Sharing(zero=int(row["do"] == "True")),
        fused_attention=row["attn_backend"] == "flash",
        code=Implementation(
            backend="native" if row["impl"] == "local" else "te",
            fused_loss=False,
            grouped_experts=grouped,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            # NVIDIA's containers have Apex; in this case its fusion is off (masked-softmax-fusion).
            fused_softmax="uninstall_te" not in case,
        ),
    )
    return MeasuredMemory(
        line=line,
        case=case,
        workload=workload,
        says_attention=bool(row["attn_backend"]) or row["impl"] == "local",
        has_grouped_experts=grouped,
        allocated=int(float(row["mem_alloc"])),
        peak=int(float(row["mem_max"])),
        parameters=int(float(row["params"])),
    )
