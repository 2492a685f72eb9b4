"""Whether a dense model's checkpoint can become experts (``load_state=upcycle``).

Megatron's ``upcycling_utils`` copies the MLP of a dense layer into every expert, and cuts it where these are
narrower: "Upcycling Large Language Models into Mixture of Experts", https://arxiv.org/abs/2410.07524.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megaplug.errors import Problem
from megaplug.job.identity import differing_keys
from megaplug.job.schema import Job
from megaplug.job.sharding import implementation

UPCYCLE = "upcycle"
_FFN = "model.ffn_hidden_size"


def upcycling_problems(job: Job, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Problem]:
    """What keeps this job's experts from beginning as that model's MLP.

    Args:
        job: The job that wants to load.
        theirs: The fingerprint of the model of the checkpoint, see ``identity.model_fingerprint``.
        ours: That of the job's model.
    """
    if not job.moe.num_experts:
        message = "upcycle makes experts of a dense model, and this model has none"
        return [Problem("load_state", message, "choose some with moe=..., or use load_state=weights")]
    if theirs.get("moe.num_experts"):
        message = f"the checkpoint has experts already: {theirs['moe.num_experts']} in a layer"
        return [Problem("load_state", message, "use load_state=weights")]
    unlike = [found for found in differing_keys(theirs, ours) if not found[0].startswith("moe.")]
    problems = [
        Problem("load", f"the checkpoint is of another model: {key} is {there!r} there and {mine!r} here",
                "set it as it is there; all but the experts is taken over")
        for key, there, mine in unlike
    ]  # fmt: skip
    return [*problems, *_widths(theirs, ours), *_not_known(job)]


def _widths(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Problem]:
    dense, width, experts = theirs[_FFN], ours["moe.moe_ffn_hidden_size"], ours["moe.num_experts"]
    if dense % width:
        legal = [size for size in range(1, dense + 1) if dense % size == 0]
        nearest = min(legal, key=lambda size: (abs(size - width), size))
        message = f"an MLP that is {dense} wide cannot be cut into experts of {width}"
        yield Problem("moe.moe_ffn_hidden_size", message, f"use {nearest}, for example")
    elif experts % (parts := dense // width):
        message = f"an expert is one of {parts} parts of the dense MLP, and {experts} are no multiple of that"
        more = -(-experts // parts) * parts
        yield Problem("moe.num_experts", message, f"use {more}, for example")
    elif ours["moe.moe_router_topk"] % parts:
        topk = ours["moe.moe_router_topk"]
        message = f"{parts} experts together are the dense MLP, and a token is sent to {topk}"
        more = -(-topk // parts) * parts
        yield Problem("moe.moe_router_topk", message, f"use {more}, for example", megatron_accepts=True)


def _not_known(job: Job) -> Iterator[Problem]:
    """What Megatron's function has no rule for."""
    moe = job.moe
    if moe.moe_shared_expert_intermediate_size:
        key = "moe.moe_shared_expert_intermediate_size"
        message = "the experts of a token together are the dense MLP, and a shared one would be added to it"
        yield Problem(key, message, "leave it out", megatron_accepts=True)
    if (moe.moe_router_topk_scaling_factor or 1.0) != 1.0:
        message = "experts would give a multiple of what the dense MLP gave"
        yield Problem("moe.moe_router_topk_scaling_factor", message, "leave it out", megatron_accepts=True)
    if moe.moe_router_load_balancing_type == "sinkhorn":
        message = "sinkhorn weighs a token's experts by less than 1 in all, and they are the dense MLP"
        yield Problem("moe.moe_router_load_balancing_type", message, "use aux_loss", megatron_accepts=True)
    elif moe.moe_router_topk == 1 and moe.moe_router_score_function != "softmax":
        message = f"{moe.moe_router_score_function} weighs a token's one expert by less than 1"
        hint = "use softmax, or moe.moe_router_topk=2"
        yield Problem("moe.moe_router_score_function", message, hint, megatron_accepts=True)
    if implementation(job) not in ("plain", "distributed_optimizer"):
        message = "weights are cut over data-parallel ranks before they could be made experts of"
        yield Problem("topology.zero", message, "use topology.zero=1 to begin with, and load what that saves")
