"""Every rule that a job must keep, asked before anything is started; all that is wrong is told at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaplug import topology as meshes
from megaplug.errors import Problem, UserError
from megaplug.job.checks_attention import attention_problems
from megaplug.job.checks_experts import experts_problems
from megaplug.job.checks_graphs import cuda_graph_problems
from megaplug.job.checks_loss import loss_problems
from megaplug.job.checks_model import model_problems
from megaplug.job.checks_nodes import nodes_problems, share_problems
from megaplug.job.checks_offload import offload_problems
from megaplug.job.checks_precision import precision_problems
from megaplug.job.checks_recompute import recompute_problems
from megaplug.job.checks_resilience import resilience_problems
from megaplug.job.checks_sharding import sharding_problems
from megaplug.job.checks_slurm import slurm_problems
from megaplug.job.checks_training import end_problems, training_problems
from megaplug.job.checks_values import value_problems
from megaplug.job.checks_watching import watching_problems
from megaplug.job.experts import layer_freq
from megaplug.job.overlap import overlap_problems
from megaplug.job.packages import package_problems, resolve_backend
from megaplug.job.passthrough import passthrough_problems
from megaplug.job.retention import retention_problems
from megaplug.job.saving import async_problems
from megaplug.job.schema import Job
from megaplug.topology import Batch, ModelShape, Topology

if TYPE_CHECKING:
    from megaplug.job.derive import Derived
    from megaplug.job.facts import DataFacts

# A vocabulary that is not known before the data is read; any number that breaks no rule.
_ANY_VOCAB_SIZE = 256
# Rank grids that are told in place of one that is not possible, and of how many they are chosen.
_NEAREST_SHOWN, _NEAREST_TRIED = 3, 12


def check(job: Job, *, device: str | None = None, suggest: bool = True) -> list[Problem]:
    """Check a job without looking at its data.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda`` where it is known; what only one of them cannot do is asked then.
        suggest: Whether the nearest rank grids are looked for where this one is not possible.

    Returns:
        Everything that is wrong, in the order of the configuration; empty if the job can be started.
    """
    problems = value_problems(job)
    # Rules about sums and products make no sense of sizes that are no sizes.
    sizes_hold = not problems
    if sizes_hold:
        problems = topology_problems(job, suggest=suggest)
    if sizes_hold and not problems:
        problems = [*share_problems(job, resolve_topology(job)), *kernel_problems(job, device)]
    problems += attention_problems(job, device, sizes_hold=sizes_hold)
    problems += [*watching_problems(job, device), *resilience_problems(job, device)] if sizes_hold else []
    backend = _backend(job, device)
    return [
        *problems,
        *nodes_problems(job),
        *slurm_problems(job),
        *sharding_problems(job, device),
        *async_problems(job, device),
        *model_problems(job),
        *experts_problems(job, device, backend),
        *training_problems(job),
        *recompute_problems(job, backend),
        *loss_problems(job),
        *offload_problems(job, device, backend),
        *(precision_problems(job, device, backend) if sizes_hold else ()),
        *passthrough_problems(job),
    ]


def _backend(job: Job, device: str | None) -> str | None:
    """The backend that the layers will be of; None where that depends on a device not known yet."""
    if device is None and job.backend == "auto":
        return None
    return resolve_backend(job.backend, device or "cpu", job.kernels.te)


def check_facts(job: Job, derived: Derived, facts: DataFacts) -> list[Problem]:
    """Check a job against its data: the vocabulary, and the steps that follow from the number of tokens."""
    problems = []
    if job.model.vocab_size is not None and facts.vocab_size > job.model.vocab_size:
        problems.append(
            Problem(
                "model.vocab_size",
                f"the tokenizer has {facts.vocab_size} ids, but the model only {job.model.vocab_size}",
                f"use model.vocab_size={facts.vocab_size} or more, or null to follow the tokenizer",
            )
        )
    if job.train.iters is None:
        problems += end_problems(job, derived.iters)
    return [*problems, *retention_problems(job, derived)]


def resolve_topology(job: Job) -> Topology:
    """The rank grid of a job that passed :func:`check`.

    Raises:
        UserError: The grid is not possible.
    """
    topology, problems = meshes.resolve(job.topology)
    if topology is None or problems:
        raise UserError.from_problems(problems)
    return topology


def job_shape(job: Job, vocab_size: int | None = None) -> ModelShape:
    """The sizes of a job's model.

    Args:
        job: The job.
        vocab_size: Unpadded; that of the configuration when not given, or any if that is not set either.
    """
    model, moe = job.model, job.moe
    experts = moe.num_experts or None
    # A single expert's weight is constant after a softmax only; sinkhorn makes its weights in another way.
    by_softmax = moe.moe_router_score_function == "softmax"
    by_softmax = by_softmax and moe.moe_router_load_balancing_type != "sinkhorn"
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        seq_length=model.seq_length,
        vocab_size=vocab_size or model.vocab_size or _ANY_VOCAB_SIZE,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        num_experts=experts,
        moe_ffn_hidden_size=moe.moe_ffn_hidden_size,
        moe_router_topk=moe.moe_router_topk,
        swiglu=model.swiglu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        normalization=model.normalization,
        qk_layernorm=model.qk_layernorm,
        sub_layer_norm=job.attention.sub_layer_norm,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        moe_shared_expert_intermediate_size=moe.moe_shared_expert_intermediate_size if experts else None,
        moe_layer_freq=layer_freq(moe, model.num_layers),
        moe_router_pre_softmax=moe.moe_router_pre_softmax if by_softmax else None,
        max_position_embeddings=model.seq_length,
        multi_latent_attention=model.multi_latent_attention,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_head_dim,
        qk_pos_emb_head_dim=model.qk_pos_emb_head_dim,
        v_head_dim=model.v_head_dim,
    )


def job_batch(job: Job) -> Batch:
    """The batch sizes of a job."""
    return Batch(job.train.micro_batch_size, job.train.global_batch_size)


def topology_problems(job: Job, *, suggest: bool = True) -> list[Problem]:
    """What is wrong with the rank grid for this model and batch, with the nearest grids that are right."""
    if job.topology.auto:
        hint = "launch/train.py chooses them; launch/plan.py action=search shows the best"
        return [Problem("topology.auto", "the sizes of this topology are not chosen yet", hint)]
    topology, problems = meshes.resolve(job.topology)
    if topology is None:
        return problems
    shape, batch = job_shape(job), job_batch(job)
    overlap = job.overlap.overlap_p2p_comm is not False
    problems = [*problems, *meshes.violations(topology, shape, batch, overlap_p2p_comm=overlap)]
    if not problems or not suggest:
        return problems
    last = problems[-1]
    hints = [last.hint] if last.hint else []
    near: dict[tuple[int, ...], Topology] = {}
    for found in meshes.nearest_legal(topology, shape, batch, _NEAREST_TRIED, request=job.topology):
        # Of those that differ in their etp only, the nearest is enough.
        near.setdefault((found.tp, found.pp, found.cp, found.ep, found.dp), found)
    shown = list(near.values())[:_NEAREST_SHOWN]
    typed = [" ".join(meshes.overrides(found, job.topology)) for found in shown]
    if any(typed):
        hints.append("nearest that fit: " + "  |  ".join(words for words in typed if words))
    larger = meshes.smallest_world(topology, shape, request=job.topology)
    if larger is not None and job.topology.world_size is not None and larger.world_size > topology.world_size:
        words = meshes.overrides(larger, job.topology)
        if batch.global_batch_size % (step := batch.micro_batch_size * larger.dp):
            words.append(f"train.global_batch_size={-(-batch.global_batch_size // step) * step}")
        hints.append(f"smallest world for {larger.label}: {larger.world_size} ranks, {' '.join(words)}")
    return [*problems[:-1], Problem(last.key, last.message, "; ".join(hints))]


def kernel_problems(job: Job, device: str | None) -> list[Problem]:
    """What is wrong with kernels, overlap and CUDA graphs of a job whose rank grid is possible."""
    problems = list(package_problems(job, device))
    # Where the device is not known, only what no device can do is asked.
    device = device or "cuda"
    backend = resolve_backend(job.backend, device, job.kernels.te)
    problems += overlap_problems(job, resolve_topology(job), backend=backend, device=device)
    return [*problems, *cuda_graph_problems(job, device=device, backend=backend)]
