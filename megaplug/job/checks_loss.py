"""What the loss in chunks of tokens cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job

# Megatron's arguments by what they do to the output layer, which chunks go past.
_FOREIGN = {
    "cross_entropy_loss_fusion": "is Megatron's own loss, which takes the logits of all tokens",
    "mtp_num_layers": "makes multi-token prediction take the logits of all tokens",
    "defer_embedding_wgrad_compute": "keeps the gradients of all logits for later",
}


def loss_problems(job: Job) -> Iterator[Problem]:
    """Everything that is wrong with ``train.loss_chunk_tokens``."""
    chunk = job.train.loss_chunk_tokens
    if chunk is None:
        return
    hint = "leave it out, or train.loss_chunk_tokens=null"
    for argument, what in _FOREIGN.items():
        if job.megatron.get(argument):
            message = f"{what}; train.loss_chunk_tokens={chunk} lets only so many exist"
            yield Problem(f"megatron.{argument}", message, hint)
    if job.topology.zero >= 2:
        message = (
            f"topology.zero={job.topology.zero} gathers a layer's weights when the layer is called, "
            "and chunks take the output layer's weight past that"
        )
        yield Problem("train.loss_chunk_tokens", message, "use topology.zero=1, or leave it out")
