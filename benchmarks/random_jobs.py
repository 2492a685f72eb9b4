"""Random jobs that a rehearsal can be made of, always the same for one seed.

Small models of every kind that the config has: dense and with experts, latent and grouped-query attention,
flash and unfused, norms, biases, dropout, positions; on grids of up to 4 x 4 x 8 ranks, with virtual and
uneven stages; in fp32, bf16 and fp16; with every kind of recomputation.
"""

from __future__ import annotations

import random
from typing import Any

from megaplug.errors import UserError
from megaplug.job.checks import check, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.schema import Job

Words = dict[str, Any]


def draw(chance: random.Random) -> list[str]:
    """The words of one job, legal or not."""
    tp, pp, dp = chance.choice((1, 1, 2, 4)), chance.choice((1, 1, 2, 4)), chance.choice((1, 2, 4, 8))
    vpp = chance.choice((None, 2, 3)) if pp > 1 else None
    experts = chance.choice((None, None, 4, 8))
    latent = chance.random() < 0.15
    microbatches, micro_batch = chance.choice((1, 2, 4, 8)), chance.choice((1, 2))
    if vpp:
        microbatches = max(microbatches, pp)
    words = {
        "model": "tiny",
        "precision": chance.choice(("bf16", "bf16", "bf16", "fp32", "fp16")),
        "topology.tp": tp,
        "topology.pp": pp,
        "topology.vpp": vpp,
        "topology.dp": dp,
        "topology.zero": chance.choice((0, 1, 1)),
        "topology.sequence_parallel": tp > 1 and (experts is not None or latent or chance.random() < 0.7),
        "train.micro_batch_size": micro_batch,
        "train.global_batch_size": micro_batch * microbatches * dp,
        "overlap": chance.choice(("default", "default", "off")),
    }
    words |= _model(chance, latent)
    words |= _layers(chance, pp, vpp)
    words |= _recomputed(chance, experts is not None, latent)
    if experts:
        words |= _experts(chance, experts, tp, words["model.num_layers"])
    elif chance.random() < 0.3:
        words |= {"model.add_bias_linear": True}
    if words["precision"] == "bf16" and chance.random() < 0.2:
        words["precision.grad_reduce_in_bf16"] = True
    if chance.random() < 0.15:
        words["+megatron.cross_entropy_loss_fusion"] = True
    return [f"{key}={_written(value)}" for key, value in words.items()]


def _model(chance: random.Random, latent: bool) -> Words:
    heads = chance.choice((8, 16))
    hidden = chance.choice((512, 1024, 2048))
    gated = chance.random() < 0.65
    words: Words = {
        "model.hidden_size": hidden,
        "model.ffn_hidden_size": chance.choice((1024, 2816, 4096)),
        "model.num_attention_heads": heads,
        "model.seq_length": chance.choice((512, 1024, 2048)),
        "model.vocab_size": chance.choice((8000, 32000, 50257)),
        "model.swiglu": gated,
        "model.squared_relu": not gated and chance.random() < 0.3,
        "model.normalization": chance.choice(("RMSNorm", "LayerNorm")),
        "model.untie_embeddings_and_output_weights": chance.choice((True, False)),
        "model.qk_layernorm": chance.random() < 0.25,
        "model.hidden_dropout": chance.choice((0.0, 0.0, 0.0, 0.1)),
    }
    if latent:
        words |= {
            "model.num_query_groups": heads,
            "model.multi_latent_attention": True,
            "model.rope_type": "rope",
            "model.q_lora_rank": chance.choice((None, 256)),
            "model.kv_lora_rank": 256,
            "model.qk_head_dim": 64,
            "model.qk_pos_emb_head_dim": 32,
            "model.v_head_dim": chance.choice((64, 96)),
        }
    else:
        words |= {
            "model.num_query_groups": chance.choice((2, 4, heads, heads)),
            "model.kv_channels": chance.choice((None, None, 128)),
            "model.add_qkv_bias": chance.random() < 0.2,
            "model.position_embedding_type": chance.choice(("rope",) * 4 + ("learned_absolute", "none")),
            "model.rotary_percent": chance.choice((1.0, 1.0, 0.5)),
        }
    if chance.random() < 0.2:
        words |= {"attention": "local", "model.attention_dropout": chance.choice((0.0, 0.1))}
    return words


def _layers(chance: random.Random, pp: int, vpp: int | None) -> Words:
    each = chance.choice((1, 2, 3)) if (vpp or 1) < 3 else 1
    words: Words = {"model.num_layers": pp * (vpp or 1) * each}
    if pp > 1 and vpp is None and chance.random() < 0.35:
        end = chance.choice((1, 2, 3))
        kind = chance.choice(("first", "last", "both", "embedding and loss"))
        if kind == "embedding and loss":
            words = {
                "model.num_layers": pp * (each + 1) - 2,
                "topology.account_for_embedding_in_pipeline_split": True,
                "topology.account_for_loss_in_pipeline_split": True,
            }
        else:
            ends = [kind] if kind != "both" else ["first", "last"]
            words = {f"topology.decoder_{each_end}_pipeline_num_layers": end for each_end in ends}
            words["model.num_layers"] = end * len(ends) + each * (pp - len(ends))
    return words


def _recomputed(chance: random.Random, with_experts: bool, latent: bool) -> Words:
    kind = chance.choice(("none", "none", "uniform", "block", "selective", "selective"))
    if kind in ("uniform", "block"):
        return {
            "train.recompute_granularity": "full",
            "train.recompute_method": kind,
            "train.recompute_num_layers": chance.choice((1, 1, 2)),
        }
    if kind == "none":
        return {}
    names = ["layernorm", "core_attn", "mlp"]
    names += ["moe", "moe_act", "shared_experts"] if with_experts else []
    names += ["mla_up_proj"] if latent else []
    chosen = chance.sample(names, chance.choice((1, 2, 3)))
    return {"train.recompute_modules": "[" + ",".join(sorted(chosen)) + "]"}


def _experts(chance: random.Random, experts: int, tp: int, layers: int) -> Words:
    score, topk = chance.choice(("softmax", "softmax", "sigmoid")), chance.choice((1, 2))
    words = {
        "moe": "small",
        "moe.num_experts": experts,
        "moe.moe_ffn_hidden_size": chance.choice((512, 1024)),
        "moe.moe_router_topk": topk,
        "moe.moe_router_score_function": score,
        "moe.moe_router_pre_softmax": score == "softmax" and (topk == 1 or chance.random() < 0.5),
        "moe.moe_router_enable_expert_bias": score == "sigmoid" and chance.random() < 0.5,
        "moe.moe_router_dtype": chance.choice((None, "fp32")),
        "moe.moe_router_load_balancing_type": chance.choice(("aux_loss", "aux_loss", "seq_aux_loss", "none")),
        "moe.moe_shared_expert_intermediate_size": chance.choice((None, None, 512)),
        "moe.moe_token_dispatcher_type": chance.choice(("alltoall", "alltoall", "allgather")),
        "moe.moe_expert_capacity_factor": chance.choice((None, None, None, 1.0)),
        "topology.ep": chance.choice((1, 2, 4)),
        "topology.etp": chance.choice((1, tp)),
    }
    if layers > 1 and chance.random() < 0.3:
        words["moe.moe_layer_freq"] = chance.choice(("2", f'"([0]*1+[1]*{layers - 1})"'))
    if chance.random() < 0.3:
        words["moe.experts"] = "sequential"
    return words


def _written(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def random_jobs(count: int, seed: int) -> list[tuple[list[str], Job, int]]:
    """Words, job and rank of that many jobs that pass all checks.

    The rank is the first or the last of the world, or any.
    """
    chance = random.Random(seed)
    found: list[tuple[list[str], Job, int]] = []
    while len(found) < count:
        words = draw(chance)
        try:
            job = compose_job(words)
            if check(job, device="cuda"):
                continue
            topology = resolve_topology(job)
        except UserError:
            continue
        last = topology.world_size - 1
        found.append((words, job, chance.choice((0, last, chance.randint(0, last)))))
    return found
