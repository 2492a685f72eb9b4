"""From a job to what is searched: what its person has chosen stays, the rest is free."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import fields

from megaplug.errors import Problem, UserError
from megaplug.job.attention import attention_layers
from megaplug.job.experts import are_grouped
from megaplug.job.packages import resolve_backend
from megaplug.job.recompute import granularity, method_and_layers
from megaplug.job.schema import Job, TopologyConfig
from megaplug.plan.search.space import Layout, Space, micro_batches, recomputes
from megaplug.plan.workload import Recompute
from megaplug.topology import ModelShape

SIZES = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
_LAYOUT = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_RECOMPUTE = ("granularity", "method", "num_layers", "modules")


def space_of(job: Job, shape: ModelShape, typed: Set[str], num_gpus: int | None = None) -> Space:
    """What may be chosen for a job.

    A key of the topology stays if it was typed, or if a file sets it to another value than the default;
    the size of a microbatch if it was typed; recomputation if anything says how.

    Args:
        job: The job; ``topology.world_size`` says how many ranks.
        shape: Its model.
        typed: Keys that were typed, such as ``topology.tp``.
        num_gpus: Ranks where the job does not say.

    Raises:
        UserError: Sizes that cannot be, or no number of ranks.
    """
    request, train, default = job.topology, job.train, TopologyConfig()
    world_size = _world_size(request, num_gpus)
    stays = {
        field.name
        for field in fields(TopologyConfig)
        if f"topology.{field.name}" in typed or getattr(request, field.name) != getattr(default, field.name)
    }
    # etp follows tp and dp the others where they are null: there is nothing to keep
    chosen = {key: _size(key, getattr(request, key)) for key in SIZES if key in stays}
    fixed = {key: size for key, size in chosen.items() if size is not None}
    if fixed.get("vpp") == 1:
        fixed["vpp"] = 0
    problems = [
        Problem(f"topology.{key}", f"must be at least 1, but is {size}")
        for key, size in {**fixed, "world_size": world_size}.items()
        if size < (key != "vpp")
    ]
    batch = train.global_batch_size
    if batch < 1:
        problems.append(Problem("train.global_batch_size", f"must be at least 1, but is {batch}"))
    if problems:
        raise UserError.from_problems(problems)
    return Space(
        shape,
        world_size,
        batch,
        (train.micro_batch_size,) if "train.micro_batch_size" in typed else micro_batches(batch),
        _recomputes(job, shape, typed),
        fixed,
        Layout(*(getattr(request, key) for key in _LAYOUT)) if stays & set(_LAYOUT) else None,
        request.sequence_parallel,
        job.overlap.overlap_p2p_comm is not False,
    )


def _world_size(request: TopologyConfig, num_gpus: int | None) -> int:
    sizes = {key: getattr(request, key) for key in ("tp", "pp", "cp")}
    if request.world_size is not None:
        if num_gpus is not None and request.world_size > num_gpus:
            raise UserError(
                f"topology.world_size: {request.world_size:,} ranks are asked for, and the cluster has "
                f"{num_gpus:,} GPUs",
                hint=f"topology.world_size={num_gpus} or a larger cluster.num_gpus",
            )
        return request.world_size
    if num_gpus is not None:
        return num_gpus
    if request.dp is not None and min(*sizes.values(), request.dp) > 0:
        return request.dp * sizes["tp"] * sizes["pp"] * sizes["cp"]
    raise UserError(
        "topology.world_size is not given: for how many GPUs is a topology wanted?",
        hint="such as topology.world_size=64",
    )


def _size(key: str, value: int | None) -> int | None:
    return 0 if key == "vpp" and value is None else value


def _recomputes(job: Job, shape: ModelShape, typed: Set[str]) -> tuple[Recompute, ...]:
    train = job.train
    said = granularity(train) is not None
    if said or any(f"train.recompute_{key}" in typed for key in _RECOMPUTE):
        modules = tuple(train.recompute_modules or ())
        return (Recompute(granularity(train), *method_and_layers(train), modules=modules),)
    grouped = are_grouped(job, resolve_backend(job.backend, "cuda", job.kernels.te))
    fused = "local" not in attention_layers(job.attention).names
    return recomputes(shape, fused_attention=fused, grouped_experts=grouped)
