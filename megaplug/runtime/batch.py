"""From tokenized files to a loss: data sets, batches and the forward step that ``pretrain()`` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.global_vars import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megaplug.layers.attention.megatron_tokens import batch_of_rank
from megaplug.layers.chunked_loss import output_layer_loss
from megaplug.layers.cross_entropy import vocab_parallel_cross_entropy
from megaplug.runtime.source_losses import SourceLosses
from megaplug.runtime.stopwatch import data_wait

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
_SPIKY_LOSS_FACTOR = 10.0


def build_datasets(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]:
    """The train, validation and test data sets of this rank.

    Every rank of the first and the last pipeline stage reads its own (memory-mapped) copy, so that no batch
    is broadcast.

    Args:
        num_samples: How many samples of ``seq_length`` tokens each of the three must hold.
        vp_stage: The virtual pipeline stage, or None without virtual stages.

    Returns:
        The three data sets; None where a split is empty or this stage needs no data.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, num_samples, partial(is_first_or_last_pipeline_stage, vp_stage), config
    )
    train, valid, test = builder.build()
    return train, valid, test


# Each rank builds its own loader; without this Megatron would only build one on tensor-parallel rank 0.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None
) -> dict[str, Any]:
    """The next micro-batch of this rank, with its own part of the sequence under context parallelism.

    Returns:
        ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` ``[micro_batch, seq_length / cp]`` and
        ``attention_mask`` (or None), and ``dataset_id`` ``[micro_batch]`` (None unless sources are blended);
        all None on a stage in the middle of the pipeline.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys((*_BATCH_KEYS, "dataset_id"))
    assert data_iterator is not None, "the first and the last pipeline stage read data"
    with data_wait:
        sample = next(data_iterator)
    device = torch.cuda.current_device()
    batch: dict[str, Any] = {
        key: sample[key].to(device, non_blocking=True) if key in sample else None for key in _BATCH_KEYS
    }
    if get_args().context_parallel_size > 1:
        group = mpu.get_context_parallel_group()
        batch = batch_of_rank(batch, group)
    number = sample.get("dataset_id")
    return {**batch, "dataset_id": None if number is None else number.to(device, non_blocking=True)}


def masked_loss(
    loss_mask: torch.Tensor,
    output_tensor: torch.Tensor,
    *,
    dataset_id: torch.Tensor | None = None,
    sources: SourceLosses | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy summed over the tokens that count, as Megatron's ``pretrain_gpt.py`` does it.

    Args:
        loss_mask: ``[micro_batch, seq_length / cp]``, 1 where a token counts.
        output_tensor: ``[micro_batch, seq_length / cp]``, nats per token.
        dataset_id: ``[micro_batch]``, the source of each sample; None where there is one.
        sources: Reports the losses of sources apart.

    Returns:
        The sum (nats), the number of tokens, and what is reported under ``lm loss`` and for sources.
    """
    args = get_args()
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    if args.check_for_nan_in_loss_and_grad:
        rerun = get_rerun_state_machine()
        rerun.validate_result(
            result=loss,
            rejection_func=torch.isnan,
            message="found NaN in the loss",
            tolerance=0.0,
            fatal=True,
        )
        rerun.validate_result(
            result=loss,
            rejection_func=torch.isinf,
            message="found Inf in the loss",
            tolerance=0.0,
            fatal=True,
        )
    if args.check_for_spiky_loss:
        rerun = get_rerun_state_machine()
        rerun.validate_result(
            result=loss,
            rejection_func=partial(rerun.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"),
            message="spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.cat([loss.detach().view(1), num_tokens.float().view(1)])
    of_sources = {}
    if sources is not None:
        by_sample = output_tensor.detach().float().view_as(loss_mask)
        of_sources = sources.report(dataset_id, by_sample, loss_mask.float())
    return loss, num_tokens, {"lm loss": report, **of_sources}


def fused_loss(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    runtime_gather_output: bool | None,
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    config: Any,
    chunk: int | None = None,
    **unused: Any,
) -> torch.Tensor:
    """What ``GPTModel`` does after its last layer, with our cross-entropy; its ``output_processor``.

    With ``chunk`` the logits of so many tokens exist at once, and not those of all.

    Returns:
        ``[micro_batch, seq_length / cp]``, nats per token.
    """
    if chunk is not None:
        factor = config.mup_output_mult if config.use_mup else 1.0
        losses = output_layer_loss(
            output_layer, hidden_states, labels.t(), chunk, weight_VH=output_weight, factor=factor
        )
        return losses.t().contiguous()
    logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output)
    group = mpu.get_tensor_model_parallel_group()
    return vocab_parallel_cross_entropy(scale_logits(logits), labels.t(), group).t().contiguous()


def end_of_model(loss_chunk_tokens: int | None) -> Callable[..., torch.Tensor] | None:
    """What a model does after its last layer; None: what Megatron does.

    That is so where Megatron's own fused cross-entropy is asked for by name.
    """
    if get_args().cross_entropy_loss_fusion:
        return None
    return partial(fused_loss, chunk=loss_chunk_tokens)


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: GPTModel,
    *,
    sources: SourceLosses | None = None,
    loss_chunk_tokens: int | None = None,
) -> tuple[Any, Any]:
    """One forward pass over one micro-batch, for Megatron's pipeline schedules.

    Args:
        data_iterator: Gives samples.
        model: This stage.
        sources: Reports the losses of sources apart.
        loss_chunk_tokens: Tokens whose logits exist at once; None for all.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = get_batch(data_iterator, vp_stage)
    timers("batch-generator").stop()
    output_tensor = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        output_processor=end_of_model(loss_chunk_tokens),
    )
    loss = partial(masked_loss, dataset_id=batch["dataset_id"], sources=sources)
    return output_tensor, partial(loss, batch["loss_mask"])
