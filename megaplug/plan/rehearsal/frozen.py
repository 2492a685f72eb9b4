"""The frozen job of a rehearsal: as it would be frozen for a GPU, without data and without a run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from megaplug import __version__
from megaplug.errors import UserError
from megaplug.job.attention import attention_layers
from megaplug.job.checks import check, resolve_topology
from megaplug.job.derive import derive
from megaplug.job.facts import DataFacts
from megaplug.job.freeze import FrozenJob, frozen_text
from megaplug.job.schema import AttentionConfig, CudaGraphConfig, Job, KernelsConfig, ProfileConfig
from megaplug.job.translate import megatron_arguments
from megaplug.runs.folder import RunFolder

# A text long enough for any job: nothing of it is read.
_TOKENS = 10**13
# A run's folder that can never be: nothing is read from it or written to it.
NOWHERE = RunFolder(Path(os.devnull))


def rehearsed_job(job: Job) -> Job:
    """The job as it is rehearsed: on CUDA, with what torch alone brings.

    Raises:
        UserError: The vocabulary is not known, or the job has something that cannot be rehearsed.
    """
    if job.model.vocab_size is None:
        raise UserError(
            "a rehearsal needs model.vocab_size, which is null: it would follow from the tokenizer",
            hint="give model.vocab_size=<number of token ids>, such as model.vocab_size=128256",
        )
    _refuse(job)
    attention = _without_te(job.attention)
    return dataclasses.replace(
        job,
        device="cuda",
        backend="native",
        attention=attention,
        kernels=KernelsConfig(apex="off", te="off"),
        cuda_graph=CudaGraphConfig(),
        # Nothing is watched, so that nothing is written.
        logging=dataclasses.replace(
            job.logging, tensorboard=False, wandb_project=None, mlflow_tracking_uri=None
        ),
        profile=ProfileConfig(),
    )


def differences(job: Job) -> list[str]:
    """What a run of the job has that its rehearsal has not, a sentence each."""
    said = [
        "workspaces of cuBLAS and NCCL, the CUDA context and the allocator's unused rest are not counted",
        "what Megatron compiles counts as one kernel; a compiler may keep less for the backward pass",
    ]
    if (
        job.backend == "te"
        or "te" in attention_layers(job.attention).names
        or "require" in (job.kernels.te, job.kernels.apex)
    ):
        said.append("Transformer Engine and Apex are replaced by torch's own kernels")
    if job.moe.num_experts:
        said.append("routing is balanced: every expert gets an even share of each rank's tokens")
    if job.cuda_graph.cuda_graph_impl != "none":
        said.append("CUDA graphs are left out, and so are their memory pools")
    return said


def _without_te(config: AttentionConfig) -> AttentionConfig:
    """Flash attention in place of Transformer Engine's."""
    layers = attention_layers(config)
    unit = ["flash" if name == "te" else name for name in layers.unit]
    name = "flash" if config.name == "te" else config.name
    others = {other: dict(layers.params_of(other)) for other in unit if other != name}
    pattern = None if config.pattern is None else unit
    return dataclasses.replace(
        config, name=name, params=dict(layers.params_of(name)), pattern=pattern, pattern_params=others
    )


def _refuse(job: Job) -> None:
    """What the pretence does not reach."""
    topology, wanted = job.topology, []
    if topology.cp > 1 and "te" in attention_layers(job.attention).names:
        what = "topology.cp={} with attention=te, which is Transformer Engine's (attention=ring can)"
        wanted.append(what.format(topology.cp))
    if topology.zero >= 2:
        wanted.append(f"topology.zero={topology.zero}, which is FSDP's")
    if job.precision.fp8_format is not None:
        wanted.append("precision=fp8, whose layers are Transformer Engine's")
    if job.optimizer.optimizer_cpu_offload:
        wanted.append("optimizer.optimizer_cpu_offload")
    if job.train.cpu_offloading_num_layers or job.train.fine_grained_activation_offloading:
        wanted.append("the offload of activations")
    if job.megatron.get("gradient_accumulation_fusion"):
        wanted.append("megatron.gradient_accumulation_fusion, whose kernels are Apex's")
    if wanted:
        raise UserError(
            "these cannot be rehearsed: " + "; ".join(wanted),
            hint="action=plan models them; leave them out to rehearse the rest",
        )


def freeze(job: Job) -> str:
    """What would stand in the ``job.yaml`` of a job.

    Args:
        job: As ``rehearsed_job`` gives it.

    Raises:
        UserError: All that is wrong with the job.
    """
    if problems := check(job, device="cuda"):
        raise UserError.from_problems(problems)
    topology = resolve_topology(job)
    facts = _facts(job.model.vocab_size or 0)
    derived = derive(job, topology, facts, device="cuda", backend="native")
    return frozen_text(
        FrozenJob(
            job=job,
            topology=topology,
            derived=derived,
            facts=facts,
            megatron_args=megatron_arguments(job, topology, derived, facts, NOWHERE),
            digest="rehearsal",
            model_fingerprint={},
            revision="",
            megaplug_version=__version__,
            folder=NOWHERE,
        )
    )


def _facts(vocab_size: int) -> DataFacts:
    return DataFacts(
        fingerprint="",
        prefixes={},
        num_tokens={"train": _TOKENS, "valid": 0, "test": 0},
        num_documents={"train": 1, "valid": 0, "test": 0},
        vocab_size=vocab_size,
        unigram_loss=None,
        source="nothing",
        eod=0,
        tokenizer_fingerprint="",
        tokenizer_arguments=["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)],
    )
