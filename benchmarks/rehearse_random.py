"""The plan's closed form of memory against rehearsals of random jobs.

Small and medium models with random topologies, recomputation, experts, activations and precision, always the
same for one seed. Each job's fullest stage by the plan, its first or its last is rehearsed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megaplug.errors import UserError
from megaplug.job.checks import check, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.schema import Job
from megaplug.plan.rehearsal import compare, rehearse_all

SEED, JOBS = 20, 50


def draw(chance: random.Random) -> list[str]:
    """The words of one job, legal or not."""
    tp, pp = chance.choice((1, 1, 2, 4)), chance.choice((1, 1, 2, 4))
    vpp = chance.choice((None, 2)) if pp > 2 else None
    dp = chance.choice((1, 2, 4, 8))
    experts = chance.choice((None, None, 4, 8))
    layers = pp * (vpp or 1) * chance.choice((1, 2, 3))
    heads = chance.choice((8, 16))
    microbatches, micro_batch = chance.choice((1, 2, 4, 8)), chance.choice((1, 2))
    if vpp:
        microbatches = max(microbatches, pp)
    words = {
        "model": "tiny",
        "precision": chance.choice(("bf16", "bf16", "bf16", "fp32")),
        "model.num_layers": layers,
        "model.hidden_size": chance.choice((512, 1024, 2048)),
        "model.ffn_hidden_size": chance.choice((1024, 2816, 4096)),
        "model.num_attention_heads": heads,
        "model.num_query_groups": chance.choice((4, heads)),
        "model.seq_length": chance.choice((512, 1024, 2048)),
        "model.vocab_size": chance.choice((8000, 32000, 50257)),
        "model.swiglu": chance.choice(("true", "true", "false")),
        "model.normalization": chance.choice(("RMSNorm", "LayerNorm")),
        # Megatron has no fused SwiGLU of experts with biases, and takes it on CUDA.
        "model.add_bias_linear": chance.choice(("false", "false", "true")) if not experts else "false",
        "model.untie_embeddings_and_output_weights": chance.choice(("true", "false")),
        "topology.tp": tp,
        "topology.pp": pp,
        "topology.vpp": vpp or "null",
        "topology.dp": dp,
        "topology.zero": chance.choice((0, 1, 1)),
        "topology.sequence_parallel": str(tp > 1 and (experts is not None or chance.random() < 0.7)).lower(),
        "train.micro_batch_size": micro_batch,
        "train.global_batch_size": micro_batch * microbatches * dp,
    }
    recompute = chance.choice(("none", "none", "full", "block", "selective"))
    if recompute in ("full", "block"):
        words |= {
            "train.recompute_granularity": "full",
            "train.recompute_method": "uniform" if recompute == "full" else "block",
            "train.recompute_num_layers": 1,
        }
    elif recompute == "selective":
        words["train.recompute_modules"] = chance.choice(("[mlp]", "[layernorm]", "[layernorm,mlp]"))
    if experts:
        words |= {
            "moe": "small",
            "moe.num_experts": experts,
            "moe.moe_ffn_hidden_size": chance.choice((512, 1024)),
            "moe.moe_router_topk": chance.choice((1, 2)),
            "moe.moe_router_pre_softmax": "true",
            "moe.moe_shared_expert_intermediate_size": chance.choice(("null", 512)),
            "topology.ep": chance.choice((1, 2, 4)),
            "topology.etp": chance.choice((1, tp)),
        }
        if recompute == "selective":
            words["train.recompute_modules"] = chance.choice(
                ("[moe_act]", "[layernorm]", "[layernorm,moe_act]")
            )
    return [f"{key}={value}" for key, value in words.items()]


def random_jobs(count: int, seed: int) -> list[tuple[list[str], Job, int]]:
    """Words, job and rank of that many jobs that pass all checks."""
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
        rank = chance.choice((0, topology.world_size - 1))
        found.append((words, job, rank))
    return found


def main() -> int:
    """Print one line a job, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, help="the number of one job")
    parser.add_argument("--json", action="store_true", help="everything that was counted, a line a job")
    given = parser.parse_args()
    jobs = list(enumerate(random_jobs(given.jobs, given.seed)))
    if given.only is not None:
        jobs = [jobs[given.only]]
    worst = 0.0
    rehearsals = rehearse_all([(job, rank) for _, (_, job, rank) in jobs])
    for (number, (words, job, rank)), rehearsed in zip(jobs, rehearsals, strict=True):
        figures = {figure.name: figure for figure in compare(job, rehearsed)}
        peak = figures["peak"]
        worst = max(worst, abs(peak.relative))
        if given.json:
            values: dict[str, object] = {
                name: [found.planned, found.rehearsed] for name, found in figures.items()
            }
            values["at_peak"] = rehearsed.at_peak
            print(json.dumps({"job": number, "rank": rank, "words": words, **values}))
            continue
        shares = " ".join(
            f"{name[:6]} {found.relative:+7.2%}" for name, found in figures.items() if found.unit == "bytes"
        )
        wrong = figures["parameters"].difference
        print(f"{number:3} rank {rank:3} {peak.rehearsed / 2**20:9.1f} MiB  {shares}  parameters {wrong:+d}")
        print("    " + " ".join(word.split(".", 1)[-1] for word in words), flush=True)
    print(f"largest difference of the peak: {worst:.2%}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
