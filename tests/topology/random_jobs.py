"""Jobs at random: most begin as one that fits together, and most of those then have something changed."""

from __future__ import annotations

import math
import random
from typing import Any

from megaplug.job.schema import Job

LARGEST_WORLD = 192
SIZES = (1, 1, 1, 2, 2, 2, 3, 4, 4, 6, 8)
# What a mistake may set a key to; each is right somewhere and wrong elsewhere.
CHANGES: dict[str, tuple[Any, ...]] = {
    "topology.tp": (1, 2, 3, 4, 6, 8),
    "topology.pp": (1, 2, 3, 4, 5, 8),
    "topology.vpp": (None, 1, 2, 3, 4),
    "topology.cp": (1, 2, 3, 4, 8),
    "topology.ep": (1, 2, 3, 4, 6, 8),
    "topology.etp": (None, 1, 2, 3, 4),
    "topology.world_size": (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    "topology.sequence_parallel": (None, False, True),
    "topology.decoder_first_pipeline_num_layers": (None, 0, 1, 2, 3, 4, 6, 8),
    "topology.decoder_last_pipeline_num_layers": (None, 0, 1, 2, 3, 4, 6, 8),
    "topology.account_for_embedding_in_pipeline_split": (False, True),
    "topology.account_for_loss_in_pipeline_split": (False, True),
    "model.num_layers": (1, 2, 3, 4, 6, 7, 8, 10, 12, 16, 22, 24),
    "model.hidden_size": (48, 64, 90, 96, 100, 128),
    "model.ffn_hidden_size": (48, 50, 64, 72, 96, 99),
    "model.num_attention_heads": (1, 2, 3, 4, 6, 8, 12, 16, 24),
    "model.num_query_groups": (1, 2, 3, 4, 5, 6, 8, 12),
    "model.kv_channels": (None, 1, 3, 4, 6, 8, 16),
    "model.seq_length": (16, 24, 30, 32, 36, 48, 64, 96, 100, 192),
    "model.vocab_size": (1, 100, 255, 256, 1000),
    "model.make_vocab_size_divisible_by": (1, 3, 16, 100, 128),
    "model.add_bias_linear": (False, True),
    "model.swiglu": (False, True),
    "model.squared_relu": (False, True),
    "moe.num_experts": (None, 0, 1, 2, 3, 4, 6, 8, 16),
    "moe.moe_router_topk": (1, 2, 3, 4, 8),
    "moe.moe_router_pre_softmax": (False, True),
    "moe.moe_router_load_balancing_type": ("aux_loss", "sinkhorn", "quantile_balancing", "none"),
    "moe.moe_aux_loss_coeff": (0.0, 0.01),
    "moe.moe_router_num_groups": (None, 1, 2, 3),
    "moe.moe_router_group_topk": (None, 1, 2),
    "moe.moe_expert_capacity_factor": (None, 1.0),
    "moe.moe_router_enable_expert_bias": (False, True),
    "moe.moe_token_dispatcher_type": ("alltoall", "allgather"),
    "moe.moe_router_score_function": ("softmax", "sigmoid"),
    "moe.moe_ffn_hidden_size": (None, 24, 32, 36, 50),
    "moe.moe_shared_expert_intermediate_size": (None, 12, 16, 25, 32),
    "moe.moe_layer_freq": (None, "1", "2", "3", "[1]", "[0]+[1]*3", "([0]*1+[1]*1)*3", "([1]*2+[0]*2)*2"),
    "train.micro_batch_size": (1, 2, 3, 4),
    "train.global_batch_size": (1, 2, 4, 6, 8, 12, 24, 32, 48, 64, 96),
    "overlap.overlap_p2p_comm": (None, False),
}


def random_job(draw: random.Random) -> Job:
    """A small job; its world has at most `LARGEST_WORLD` ranks."""
    while True:
        job = _fitting(draw)
        for _ in range(draw.choice((0, 0, 1, 1, 1, 2, 2, 3))):
            section, _, key = (dotted := draw.choice(list(CHANGES))).partition(".")
            if dotted == "model.num_query_groups" and job.model.multi_latent_attention:
                continue  # means nothing there, which `model_problems` says
            setattr(getattr(job, section), key, draw.choice(CHANGES[dotted]))
        if job.model.multi_latent_attention:
            job.model.num_query_groups, job.model.kv_channels = job.model.num_attention_heads, None
        if job.topology.world_size is not None:
            job.topology.dp = None  # Megatron has no argument for it: it follows
        if job.topology.tp * job.topology.pp * job.topology.cp <= LARGEST_WORLD:
            return job


def _fitting(draw: random.Random) -> Job:
    job = Job(name="random")
    job.model.name = "random"
    _mesh(job, draw)
    _attention(job, draw)
    _experts(job, draw)
    _layers(job, draw)
    model, topology = job.model, job.topology
    model.ffn_hidden_size = topology.tp * draw.choice((12, 16, 20))
    model.vocab_size = draw.choice((97, 256, 1000, 4097))
    model.make_vocab_size_divisible_by = draw.choice((1, 16, 128))
    model.swiglu = draw.random() < 0.7
    model.normalization = draw.choice(("RMSNorm", "LayerNorm"))
    model.untie_embeddings_and_output_weights = draw.random() < 0.7
    model.position_embedding_type = draw.choice(("rope", "rope", "learned_absolute", "none"))
    if model.multi_latent_attention:
        model.position_embedding_type = "rope"
    model.seq_length = 2 * topology.cp * topology.tp * draw.choice((1, 2, 3, 8))
    return job


def _mesh(job: Job, draw: random.Random) -> None:
    topology = job.topology
    while True:
        tp, pp, cp, ep = draw.choice(SIZES), draw.choice(SIZES), draw.choice((1, 1, 1, 1, 2, 2, 3, 4)), 1
        etp = None
        if draw.random() < 0.5:
            job.moe.num_experts = 1
            ep, etp = draw.choice(SIZES), draw.choice((None, 1, 1, 2, 3))
        dense, expert = tp * cp, (etp or tp) * ep
        world_size = pp * math.lcm(dense, expert) * draw.choice((1, 1, 2, 3, 5))
        if world_size <= LARGEST_WORLD:
            break
        job.moe.num_experts = None
    topology.tp, topology.pp, topology.cp, topology.ep, topology.etp = tp, pp, cp, ep, etp
    topology.world_size = world_size
    dp = world_size // (tp * pp * cp)
    if pp > 1 and draw.random() < 0.35:
        topology.vpp = draw.choice((2, 2, 3))
    topology.sequence_parallel = draw.choice((None, None, None, tp > 1))
    micro = draw.choice((1, 1, 2, 3))
    job.train.micro_batch_size = micro
    job.train.global_batch_size = micro * dp * draw.choice((1, 2, 3)) * (pp if topology.vpp else 1)
    if draw.random() < 0.2:
        topology.world_size = draw.choice((None, world_size))
        topology.dp = dp
    if draw.random() < 0.1:
        job.overlap.overlap_p2p_comm = False


def _attention(job: Job, draw: random.Random) -> None:
    model, tp = job.model, job.topology.tp
    groups = draw.choice(
        [*(tp * size for size in (1, 2)), *(size for size in range(1, tp + 1) if tp % size == 0)]
    )
    heads = math.lcm(groups, tp) * draw.choice((1, 1, 2, 3))
    model.num_query_groups, model.num_attention_heads = groups, heads
    size = draw.choice((2, 4, 6, 8))
    model.hidden_size = heads * size if draw.random() < 0.7 else draw.choice((48, 64, 96))
    model.kv_channels = None if model.hidden_size == heads * size and draw.random() < 0.7 else size
    model.add_bias_linear = draw.random() < 0.15
    model.add_qkv_bias = draw.random() < 0.15
    model.qk_layernorm = draw.random() < 0.2
    if draw.random() < 0.12:
        model.multi_latent_attention, model.rope_type = True, "rope"
        model.num_query_groups, model.kv_channels, model.add_qkv_bias = heads, None, False
        model.q_lora_rank = draw.choice((None, 12 * tp, 16))
        model.kv_lora_rank, model.qk_pos_emb_head_dim = 8 * tp, draw.choice((4, 4 * tp))
        model.qk_head_dim, model.v_head_dim = draw.choice((4, 6)), draw.choice((4, 8))
        if model.qk_pos_emb_head_dim % tp:
            model.kv_lora_rank = 8 * tp + draw.choice((-model.qk_pos_emb_head_dim % tp, 0))


def _experts(job: Job, draw: random.Random) -> None:
    if not job.moe.num_experts:
        return
    moe, ep, etp = job.moe, job.topology.ep, job.topology.etp or job.topology.tp
    moe.num_experts = ep * draw.choice((1, 2, 4))
    moe.moe_router_topk = min(moe.num_experts, draw.choice((1, 2, 2, 3, 4)))
    moe.moe_router_pre_softmax = moe.moe_router_topk == 1 or draw.random() < 0.3
    moe.moe_ffn_hidden_size = etp * draw.choice((8, 12)) if draw.random() < 0.8 else None
    if draw.random() < 0.3:
        moe.moe_shared_expert_intermediate_size = job.topology.tp * draw.choice((4, 8))
    job.model.add_bias_linear = job.model.add_bias_linear and draw.random() < 0.3


def _layers(job: Job, draw: random.Random) -> None:
    topology, vpp = job.topology, job.topology.vpp or 1
    per_stage = vpp * draw.choice((1, 1, 2, 3))
    layers = topology.pp * per_stage
    kind = draw.random()
    if topology.pp > 1 and kind < 0.2:
        topology.account_for_embedding_in_pipeline_split = draw.random() < 0.7
        topology.account_for_loss_in_pipeline_split = draw.random() < 0.7
        layers -= topology.account_for_embedding_in_pipeline_split
        layers -= topology.account_for_loss_in_pipeline_split
    elif topology.pp > 1 and kind < 0.4:
        first, last = vpp * draw.choice((1, 2, 3)), vpp * draw.choice((1, 2))
        if draw.random() < 0.7 or topology.pp == 2:
            topology.decoder_first_pipeline_num_layers = first
            layers += first - per_stage
        if draw.random() < 0.7 and topology.pp > 2:
            topology.decoder_last_pipeline_num_layers = last
            layers += last - per_stage
    job.model.num_layers = max(1, layers)
    if job.moe.num_experts and draw.random() < 0.4:
        pattern = f"([0]*1+[1]*{layers - 1})" if layers > 1 else "[1]"
        job.moe.moe_layer_freq = draw.choice(("1", "2", "3", pattern, f"[1]*{layers}"))
