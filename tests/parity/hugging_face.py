"""Logits of a random Hugging Face model, and of the native model that was given its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hugging_face_weights import to_megatron
from ranks import run_ranks
from small_jobs import SmallJobs

# Name of a fault: what is laid out otherwise, and what of Megatron's configuration is another.
Faults = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
SEQUENCES, LENGTH = 2, 96


def their_logits(theirs: Any, file: Path) -> None:
    """Give a Hugging Face model weights in which every part counts, and keep them with its logits.

    The logits are of order one: matrices keep the size of what they multiply, norms are not all ones.
    """
    chance = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in sorted(theirs.named_parameters()):
            noise = torch.randn(weight.shape, generator=chance)
            if weight.dim() == 1:
                weight.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name and not theirs.config.tie_word_embeddings:
                weight.copy_(noise)
            else:
                weight.copy_(noise * weight.size(-1) ** -0.5)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=chance))
        tokens = torch.randint(theirs.config.vocab_size, (SEQUENCES, LENGTH), generator=chance)
        logits = theirs.eval()(tokens).logits
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    torch.save({"weights": weights, "tokens": tokens, "logits": logits}, file)


def differences(
    theirs: Any, words: Sequence[str], small_jobs: SmallJobs, folder: Path, faults: Faults | None = None
) -> dict[str, float]:
    """The largest difference of any logit, right and with each fault; the name of none is empty.

    Args:
        theirs: A Hugging Face causal language model.
        words: Overrides of the job whose model is to be the same.
        small_jobs: Makes the job.
        folder: For files of this comparison.
        faults: What is to be done wrongly, by name.
    """
    file = folder / "theirs.pt"
    their_logits(theirs, file)
    job, _ = small_jobs.freeze([*words, f"model.vocab_size={theirs.config.vocab_size}", "train.iters=1"])
    arguments = (str(job.job_file), str(file), theirs.config, dict(faults or {}))
    return run_ranks(1, _compare, *arguments, folder=folder / "ranks")[0]


def _compare(job_file: str, file: str, config: Any, faults: Faults) -> dict[str, float]:
    """In a rank of its own, since the stand-in for CUDA changes the process."""
    from megaplug.runtime import cpu, repairs

    cpu.install()
    repairs.apply()
    build = _builder(Path(job_file))
    kept = torch.load(file, weights_only=True)
    found = {}
    for name, (layout, changes) in {"": ({}, {}), **faults}.items():
        model = build(changes)
        keys = {key for key, _ in model.named_parameters()}
        grouped = not any("local_experts" in key for key in keys)
        weights = to_megatron(kept["weights"], config, grouped=grouped, **layout)
        model.load_state_dict(weights, strict=False)
        missing = keys - set(weights)
        assert not missing, f"not filled: {sorted(missing)}"
        found[name] = (_logits(model, kept["tokens"]) - kept["logits"]).abs().max().item()
    return found


def _builder(job_file: Path) -> Callable[[Mapping[str, Any]], Any]:
    """What makes the job's model as a training run does, with changes to the transformer's configuration."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megaplug.job.attention import attention_layers
    from megaplug.job.experts import experts_choice
    from megaplug.job.freeze import read_frozen
    from megaplug.layers.spec import transformer_layer_spec

    frozen = read_frozen(job_file)
    sys.argv = ["megaplug", *frozen.megatron_args]
    args = parse_and_validate_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    def build(changes: Mapping[str, Any]) -> Any:
        config = argument_utils.gpt_config_from_args(args)
        layers = attention_layers(frozen.job.attention)
        config.transformer_layer_spec = transformer_layer_spec(
            layers, "native", experts_choice(frozen.job, "native")
        )
        for key, value in changes.items():
            holder = config.transformer if hasattr(config.transformer, key) else config
            assert hasattr(holder, key), key
            setattr(holder, key, value)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True).eval()

    return build


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)
