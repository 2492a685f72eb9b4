"""One published measurement: the job as our models see it, the machine, and what was measured."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaplug.job.flops import forward_flops_per_token, training_flops_per_token
from megaplug.plan.workload import Workload
from megaplug.topology import Batch, ModelShape, Topology

FOLDER = Path(__file__).parent

# How the authors counted FLOPs. `causal`: half of the square of scores (Megatron 0.12 and later). `full`: the
# whole square. `full+recompute`: the whole square, and each layer's forward pass a second time.
Convention = Literal["causal", "full", "full+recompute"]


@dataclass(frozen=True)
class Measured:
    """A row of a table, or one of its two measurements; exactly as published but for units.

    Attributes:
        table: File that it stands in, without its ending.
        row_id: Names it within the table: the line's number, counted from 2 as an editor does, and a word.
        model: As the authors call it.
        workload: The job.
        cluster: Preset of ``conf/cluster``.
        software: What ran it, such as ``megatron-2021`` or ``bridge-26.02``.
        precision: What matrix products ran in, as finely as it is told: ``fp8-cs`` (current scaling) and
            ``mxfp8`` are not one speed.
        convention: How its TFLOP/s were counted.
        published_seconds: Of a step, where that was published.
        tokens_per_gpu: Tokens/s of a GPU, where that was published.
        tflops_per_gpu: TFLOP/s of a GPU in ``convention``, where that was published.
        mtp_num_layers: Layers of multi-token prediction that were trained beside the workload's.
        assumed: What the source does not say and the workload needed.
    """

    table: str
    row_id: str
    model: str
    workload: Workload
    cluster: str
    software: str
    precision: str
    convention: Convention
    published_seconds: float | None = None
    tokens_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mtp_num_layers: int = 0
    assumed: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of a step: as published, or else from the tokens/s, or else from the TFLOP/s."""
        world, tokens = self.workload.topology.world_size, self.workload.tokens_per_step
        if self.published_seconds is not None:
            return self.published_seconds
        if self.tokens_per_gpu is not None:
            return tokens / (self.tokens_per_gpu * world)
        if self.tflops_per_gpu is None:
            raise ValueError(f"{self.table} {self.row_id}: nothing was measured")
        return tokens * self.flops_per_token / (self.tflops_per_gpu * 1e12 * world)

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward in the authors' convention."""
        return flops_per_token(self.workload, self.convention, self.mtp_num_layers)

    @property
    def beyond_workload(self) -> float:
        """What was trained over what the workload has, by FLOPs: above 1 with multi-token prediction."""
        if not self.mtp_num_layers:
            return 1.0
        return self.flops_per_token / flops_per_token(self.workload, self.convention)

    @property
    def family(self) -> str:
        """The software without its release: ``bridge`` for ``bridge-26.02``."""
        return re.sub(r"-[\d.]+$", "", self.software)


def flops_per_token(workload: Workload, convention: Convention, mtp_num_layers: int = 0) -> float:
    """FLOPs of a token's forward and backward in one of the published conventions.

    Recompute repeats the layers, not the output layer (Narayanan et al. 2021, equation 3: 96 B s L h^2 (1 +
    s/6h + V/16Lh), against 72 B s L h^2 (1 + s/6h + V/12Lh) without it).
    """
    shape = workload.shape
    vocabulary = shape.padded_vocab_size(workload.topology.tp)
    total = training_flops_per_token(
        shape,
        vocab_size=vocabulary,
        causal=convention == "causal",
        as_megatron=True,
        mtp_num_layers=mtp_num_layers,
    )
    if convention == "full+recompute":
        forward = forward_flops_per_token(shape, vocab_size=vocabulary, causal=False, as_megatron=True)
        total += forward - 2 * shape.hidden_size * vocabulary
    return total


def rows_of(name: str) -> list[tuple[str, dict[str, str]]]:
    """The lines of a CSV file under this folder, each with its number in the file."""
    with (FOLDER / name).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(line.lstrip("# ") for line in file)
        return [(f"line {number}", row) for number, row in enumerate(reader, start=2)]


def grid(
    *, gpus: int, tp: int, pp: int, cp: int = 1, ep: int = 1, vpp: int | None = None, **stages: int | bool
) -> Topology:
    """A topology as the tables give it: the rest is data-parallel, experts are not cut by tp.

    Args:
        gpus: World size.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        cp: Context-parallel size.
        ep: Expert-parallel size.
        vpp: Virtual stages of a rank; 1 or None: no interleaving.
        stages: ``sequence_parallel`` and what Megatron calls uneven pipeline stages.
    """
    return Topology(
        tp=tp,
        pp=pp,
        vpp=vpp if vpp and vpp > 1 else None,
        cp=cp,
        ep=ep,
        etp=1 if ep > 1 else tp,
        dp=gpus // (tp * pp * cp),
        world_size=gpus,
        **stages,  # type: ignore[arg-type]
    )


def gpt_shape(
    *, layers: int, hidden: int, heads: int, seq: int, vocab: int, ffn: int | None = None
) -> ModelShape:
    """A model like GPT-3: LayerNorm, GELU, biases, learned positions, tied embeddings."""
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn or 4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=None,
        seq_length=seq,
        vocab_size=vocab,
        swiglu=False,
        add_bias_linear=True,
        add_qkv_bias=True,
        normalization="LayerNorm",
        untie_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
        max_position_embeddings=seq,
    )


def batch(micro: int, total: int) -> Batch:
    """The batch sizes."""
    return Batch(micro_batch_size=micro, global_batch_size=total)


def find(measured: Sequence[Measured], row_id: str) -> Measured:
    """The measurement of a name.

    Raises:
        KeyError: If there is none, or more than one.
    """
    found = [one for one in measured if one.row_id == row_id]
    if len(found) != 1:
        raise KeyError(f"{row_id}: {len(found)} measurements")
    return found[0]
