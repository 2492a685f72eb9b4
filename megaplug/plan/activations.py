"""What the backward pass keeps of the forward pass, in bytes: modelled, with flash attention (no scores)."""

from __future__ import annotations

from megaplug.plan.workload import Recompute, Workload


def stage_activations(workload: Workload, stage: int) -> float:
    """Bytes in bf16 of all microbatches in flight (``get_pp_rank_microbatches`` in ``schedules.py``)."""
    topology, shape, recompute = workload.topology, workload.shape, workload.recompute
    num_layers = topology.layers_of_stage(shape.num_layers)[stage]
    behind, vpp = topology.pp - stage, topology.vpp or 1
    microbatches = workload.num_microbatches
    if topology.vpp is None:
        chunks = min(microbatches, behind)
    else:
        chunks = min(2 * (behind - 1) + (vpp - 1) * topology.pp + 1, vpp * microbatches)
    parts = _layer_parts(workload)
    whole = sum(parts.values())
    chunk_layers = num_layers / vpp
    if recompute.granularity != "full":
        again = _computed_again(parts, recompute)
        # What one layer computes again is there while its gradients are computed.
        return chunks * chunk_layers * (whole - again) + again
    kept = 2 * workload.tokens * shape.hidden_size / workload.sequence_cut
    span = recompute.num_layers or 1
    if recompute.method == "block":
        layers = min(span, chunk_layers)
        return chunks * (layers * kept + (chunk_layers - layers) * whole) + whole
    return chunks * chunk_layers / span * kept + min(span, chunk_layers) * whole


def _computed_again(parts: dict[str, float], recompute: Recompute) -> float:
    if recompute.granularity != "selective":
        return 0.0
    of_module = {
        "layernorm": ("normed",),
        "mlp": ("mlp",),
        "moe": ("experts", "expert_activation", "shared_experts"),
        "moe_act": ("expert_activation",),
        "shared_experts": ("shared_experts",),
    }
    again = {part for module in recompute.modules for part in of_module.get(module, ())}
    return sum(parts[part] for part in again)


def _layer_parts(workload: Workload) -> dict[str, float]:
    """Bytes in bf16 that one layer (the mean one, where only some have experts) keeps of one microbatch."""
    topology, shape = workload.topology, workload.shape
    tokens, tp, cut = workload.tokens, topology.tp, workload.sequence_cut
    hidden, gates = shape.hidden_size, 2 if shape.swiglu else 1
    attended = shape.query_size + shape.key_size + shape.value_size + shape.attended_size
    # A latent is kept before and after its norm.
    latents = 4 * tokens * sum(shape.latent_sizes) / cut
    share = sum(shape.moe_layers) / shape.num_layers
    parts = {
        # The inputs of both norms, and what comes out of them.
        "residual": 4 * tokens * hidden / cut,
        "normed": 4 * tokens * hidden / cut,
        "attention": 2 * tokens * attended / tp + latents,
        "mlp": (1 - share) * 2 * tokens * shape.ffn_hidden_size * (gates + 1) / tp,
        "experts": 0.0,
        "expert_activation": 0.0,
        "shared_experts": 0.0,
    }
    if not share:
        return parts
    routed = tokens / cut * shape.moe_router_topk
    # With balanced routing a rank computes as many token copies as it sends; etp gathers those of its group.
    gathered = routed * topology.etp
    ffn = shape.expert_ffn_size / topology.etp
    shared = 2 * tokens * (shape.moe_shared_expert_intermediate_size or 0) * (gates + 1) / tp
    return parts | {
        "experts": share * (gathered * (2 * hidden + 2 * ffn * gates) + 2 * routed * hidden),
        "expert_activation": share * gathered * 2 * ffn,
        "shared_experts": share * shared,
    }
