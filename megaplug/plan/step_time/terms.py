"""What of a workload the step-time model computes with: numbers, or arrays of them for many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megaplug.plan.in_flight import chunks_of
from megaplug.plan.parameters import stage_parameters
from megaplug.plan.workload import Workload

#: A number, or an array of one number a workload.
Number = Any
#: Of a matrix product's operand, its scales included, where that is not the parameter's own format.
OPERAND_BYTES = {"fp8": 1.0, "nvfp4": 0.5625}
#: To cast a number of bf16: read, and written as it stands and transposed. In nvfp4, counted, with kernels
#: that are not fused: read for its largest value, read and written, rotated (Hadamard), read and written
#: transposed: 2 + 2.6 + 4 + 2.6, and some more for rounding at random.
CAST_BYTES = {"fp8": 4.0, "nvfp4": 12.0}


@dataclass(frozen=True)
class Terms:
    """One workload's numbers, or many workloads' as arrays that broadcast. Sizes are of the whole model.

    Attributes:
        hidden, query, key, value, attended, heads, seq: Sizes as in ``ModelShape``.
        latent_query, latent_key: Sizes of the latents of multi-latent attention, the rotated key's channels
            included; 0 without.
        ffn, gates: Hidden size of a dense MLP and the matrices that go in (2 for SwiGLU).
        experts, topk, expert_ffn, shared_ffn: Of a layer with experts.
        vocab: Rows of the output layer, padded.
        micro_batch, microbatches: Sequences of a microbatch; microbatches of a rank and step.
        tp, pp, vpp, cp, ep, etp, dp, expert_dp: Sizes of the grid, ``vpp`` 1 without interleaving.
        cut: By how much sequence parallelism cuts the residual stream.
        dense_first, dense_middle, dense_last: Layers without experts of the first, the fullest middle and
            the last stage; ``moe_*`` those with experts. One stage is first and last: all is in ``*_last``.
        dense_layers, moe_layers: Of all stages.
        dense_parameters, expert_parameters: Of the fullest stage's rank.
        parameter_bytes, gradient_bytes, optimizer_bytes: As in ``Precision``.
        activation_bytes: Of an activation, in memory and on the wire.
        operand_bytes: Of a matrix product's operands: 1 in fp8.
        cast_bytes: Read and written to cast one of an operand's numbers from bf16; 0 where none is cast.
        again_layer, again_core, again_mlp, again_moe, again_elements: Parts (0 to 1) of the layers' whole
            forward pass, of core attention, of MLPs, of experts, of element-wise kernels computed again.
        again_latent, again_activation: Likewise of the projections up from multi-latent attention's latents,
            and of the experts' activation.
        expert_bias: 1 where experts have biases.
        once: 1 where a token goes once to a rank, however many of its experts are there.
        gathers: 1 where every rank of the experts' group gets all tokens.
        pairs: Pairs of queries and keys that attention computes, over those of dense causal attention.
        received: Keys and values that a rank receives in a layer's forward pass, over its own.
        loss_chunks: Chunks that a microbatch's loss is computed in; 0 for all its logits at once.
        zero, fused, overlap_reduce, overlap_gather, overlap_p2p, overlap_tp, overlap_tp_backward, overlap_ep:
            Switches of the workload.
    """

    hidden: Number
    query: Number
    key: Number
    value: Number
    attended: Number
    heads: Number
    seq: Number
    latent_query: Number
    latent_key: Number
    ffn: Number
    gates: Number
    experts: Number
    topk: Number
    expert_ffn: Number
    shared_ffn: Number
    vocab: Number
    micro_batch: Number
    microbatches: Number
    tp: Number
    pp: Number
    vpp: Number
    cp: Number
    ep: Number
    etp: Number
    dp: Number
    expert_dp: Number
    cut: Number
    dense_first: Number
    dense_middle: Number
    dense_last: Number
    moe_first: Number
    moe_middle: Number
    moe_last: Number
    dense_layers: Number
    moe_layers: Number
    dense_parameters: Number
    expert_parameters: Number
    parameter_bytes: Number
    gradient_bytes: Number
    optimizer_bytes: Number
    activation_bytes: Number
    operand_bytes: Number
    cast_bytes: Number
    again_layer: Number
    again_core: Number
    again_mlp: Number
    again_moe: Number
    again_elements: Number
    again_latent: Number
    again_activation: Number
    expert_bias: Number
    once: Number
    gathers: Number
    pairs: Number
    received: Number
    loss_chunks: Number
    zero: Number
    fused: Number
    overlap_reduce: Number
    overlap_gather: Number
    overlap_p2p: Number
    overlap_tp: Number
    overlap_tp_backward: Number
    overlap_ep: Number

    @property
    def tokens(self) -> Number:
        """Of one microbatch on a rank, before sequence parallelism cuts them."""
        return self.seq * self.micro_batch / self.cp


def terms_of(workload: Workload) -> Terms:
    """The numbers of one workload.

    Raises:
        UserError: If the layers cannot be dealt out to the stages.
    """
    topology, shape, precision = workload.topology, workload.shape, workload.precision
    dense, moe = _layers_of_stages(workload)
    last = topology.pp - 1
    middle = max(range(1, last), key=lambda stage: (dense[stage] + moe[stage], moe[stage]), default=None)
    held = [stage_parameters(shape, topology, stage) for stage in sorted({0, 1 if last > 1 else 0, last})]
    fullest = max(held, key=lambda found: found.total)
    latent_query, latent_key = shape.latent_sizes
    attention = workload.core_attention
    return Terms(
        hidden=shape.hidden_size,
        query=shape.query_size,
        key=shape.key_size,
        value=shape.value_size,
        attended=shape.attended_size,
        heads=shape.num_attention_heads,
        seq=shape.seq_length,
        latent_query=latent_query,
        latent_key=latent_key + shape.qk_pos_emb_head_dim if shape.multi_latent_attention else 0,
        ffn=shape.ffn_hidden_size,
        gates=2 if shape.swiglu else 1,
        experts=shape.num_experts or 0,
        topk=shape.moe_router_topk,
        expert_ffn=shape.expert_ffn_size,
        shared_ffn=shape.moe_shared_expert_intermediate_size or 0,
        vocab=shape.padded_vocab_size(topology.tp),
        micro_batch=workload.batch.micro_batch_size,
        microbatches=workload.num_microbatches,
        tp=topology.tp,
        pp=topology.pp,
        vpp=topology.vpp or 1,
        cp=topology.cp,
        ep=topology.ep,
        etp=topology.etp,
        dp=topology.dp,
        expert_dp=max(1, topology.expert_dp),
        cut=workload.sequence_cut,
        dense_first=dense[0] if last else 0,
        dense_middle=dense[middle] if middle else 0,
        dense_last=dense[last],
        moe_first=moe[0] if last else 0,
        moe_middle=moe[middle] if middle else 0,
        moe_last=moe[last],
        dense_layers=sum(dense),
        moe_layers=sum(moe),
        dense_parameters=fullest.dense,
        expert_parameters=fullest.expert,
        parameter_bytes=precision.parameter,
        gradient_bytes=precision.gradient,
        # fp16's copies of gradients are made and read in each step.
        optimizer_bytes=precision.optimizer + (precision.for_step if precision.compute == "fp16" else 0),
        activation_bytes=precision.parameter,
        operand_bytes=OPERAND_BYTES.get(precision.compute, precision.parameter),
        cast_bytes=CAST_BYTES.get(precision.compute, 0),
        pairs=attention.pairs_share(shape, topology) if attention else 1.0,
        received=attention.received_share(shape, topology) if attention else topology.cp - 1,
        loss_chunks=-(-workload.tokens // workload.code.loss_chunk) if workload.code.loss_chunk else 0,
        zero=workload.sharing.zero,
        fused=float(workload.fused_attention),
        overlap_reduce=float(workload.overlaps.grad_reduce),
        overlap_gather=float(workload.overlaps.param_gather),
        overlap_p2p=float(workload.overlaps.p2p),
        overlap_tp=float(workload.overlaps.tp),
        overlap_tp_backward=float(workload.overlaps.tp_backward),
        overlap_ep=float(workload.overlaps.ep),
        gathers=float(workload.routing.gathers),
        once=float(workload.code.tokens_sent_once),
        expert_bias=float(shape.is_moe and shape.add_bias_linear),
        **_computed_again(workload, max(dense[stage] + moe[stage] for stage in range(topology.pp))),
    )


def stack(many: Sequence[Terms]) -> Terms:
    """Many workloads' numbers as arrays, one entry each, to be evaluated at once."""
    import numpy as np

    return Terms(
        **{field.name: np.array([getattr(t, field.name) for t in many], float) for field in fields(Terms)}
    )


def _layers_of_stages(workload: Workload) -> tuple[list[int], list[int]]:
    """Layers without and with experts of every stage."""
    topology, shape = workload.topology, workload.shape
    counts = topology.layers_of_stage(shape.num_layers)
    if not shape.is_moe:
        return counts, [0] * len(counts)
    if all(shape.moe_layers):
        return [0] * len(counts), counts
    moe = [sum(map(sum, chunks_of(workload, stage))) for stage in range(topology.pp)]
    return [count - experts for count, experts in zip(counts, moe, strict=True)], moe


def _computed_again(workload: Workload, stage_layers: int) -> dict[str, float]:
    recompute = workload.recompute
    modules = set(recompute.modules) if recompute.granularity == "selective" else set()
    whole = 0.0
    if recompute.granularity == "full":
        whole = 1.0
        if recompute.method == "block":
            chunk = stage_layers / (workload.topology.vpp or 1)
            whole = min(1.0, (recompute.num_layers or 1) / chunk)
    return {
        "again_layer": whole,
        "again_core": float("core_attn" in modules),
        "again_mlp": float("mlp" in modules),
        "again_moe": float("moe" in modules),
        "again_elements": 0.5 * float("layernorm" in modules),
        "again_latent": float("mla_up_proj" in modules),
        "again_activation": float("moe_act" in modules),
    }
