"""What is wrong with the experts that a job names."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem, UserError
from megaplug.job.experts import experts_choice
from megaplug.job.schema import Job
from megaplug.layers import registry

_NAME, _PARAMS = "moe.experts", "moe.experts_params"
# What grouped experts are not written for, in Megatron's words.
_NOT_GROUPED = ("moe_latent_size", "use_te_activation_func", "delay_wgrad_compute")


def experts_problems(job: Job, device: str | None, backend: str | None) -> list[Problem]:
    """What is wrong with them.

    Args:
        job: As composed.
        device: ``cpu`` or ``cuda`` where it is known.
        backend: ``native`` or ``te`` where it is known.
    """
    if not job.moe.num_experts or (backend is None and job.moe.experts == "auto"):
        return []
    choice = experts_choice(job, backend or "native")
    if choice.name is None:
        if choice.params:
            message = "Transformer Engine's experts have no parameters"
            return [Problem(_PARAMS, message, "leave it out, or use backend=native")]
        return []
    try:
        plugin = registry.lookup(registry.EXPERTS, choice.name)
    except UserError as error:
        return [Problem(_NAME, error.message, error.hint)]
    dtype = job.precision.dtype
    problems = registry.validate_params(plugin, choice.params, _PARAMS)
    problems = problems or registry.needs_problems(
        plugin, choice.params, device=device, dtype=dtype, key=_PARAMS
    )
    problems += registry.limits_problems(plugin, key=_NAME, dtype=dtype, device=device)
    return [*problems, *_of_backend(job, choice.name, backend), *_not_grouped(job, choice.name)]


def _of_backend(job: Job, name: str, backend: str | None) -> Iterator[Problem]:
    if backend == "te":
        message = f"the layers of Transformer Engine have their own experts, not {name}"
        yield Problem(_NAME, message, "use moe.experts=auto, or backend=native")


def _not_grouped(job: Job, name: str) -> Iterator[Problem]:
    if name != "grouped":
        return
    for argument in _NOT_GROUPED:
        if job.megatron.get(argument):
            yield Problem(f"megatron.{argument}", "is not in grouped experts", "use moe.experts=sequential")
