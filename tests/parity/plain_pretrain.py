"""What Megatron-LM's ``pretrain_gpt.py`` (core_v0.19) does with its arguments, of Megatron's public parts.

The wheel has ``megatron.training`` and not this script. As there: the arguments alone make the configuration,
the model comes from ``--spec``, tensor-parallel rank 0 reads the data and broadcasts every batch. Of megaplug
only the stand-in for CUDA is used. As a program it stands in the place of ``pretrain_gpt.py`` and writes the
measured curve to the file that ``PLAIN_CURVE`` names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

Curve = list[tuple[float, float]]


def pretrain_from_arguments(store: Callable[[Any], Any] | None = None) -> Curve:
    """Train as ``sys.argv`` says.

    Args:
        store: Makes the rendezvous store from the parsed arguments; else the environment says where it is.

    Returns:
        Loss and gradient norm of every step, as the last rank knows them; nothing on the others.
    """
    from megatron.core.enums import ModelType
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    curve = watch(training)
    datasets.is_distributed = True  # type: ignore[attr-defined]
    training.pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store(args) if store is not None else None,
        get_embedding_ranks=embedding_ranks,
    )
    return curve


def watch(training: Any) -> Curve:
    """Read loss and gradient norm where Megatron logs them, unrounded."""
    curve: Curve = []
    real_log = training.training_log

    def training_log(loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            # total_loss_dict, learning_rate, iteration, loss_scale, report_memory, skipped, grad_norm
            curve.append((float(loss_dict["lm loss"]), float(args[6])))
        return real_log(loss_dict, *args, **kwargs)

    training.training_log = training_log
    return curve


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def is_built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, num_samples, is_built_here, config).build()
    return train, valid, test


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    names = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(names)
    read = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        extra = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
        read = {name: sample[name].cuda() if name in sample else None for name in (*names, *extra)}
    batch = get_batch_on_this_tp_rank(
        read,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


def loss_function(loss_mask: torch.Tensor, output_tensor: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
    losses, mask = output_tensor.view(-1).float(), loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output_tensor = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output_tensor, partial(loss_function, batch["loss_mask"])


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    from megatron.training import get_args

    tied = len(pp_ranks) > 1 and not get_args().untie_embeddings_and_output_weights
    return [pp_ranks[0], pp_ranks[-1]] if tied else [pp_ranks[0]]


def stand_in() -> None:
    """Megatron-LM needs CUDA; here the CPU stands in. The wheel's compiled helpers are left as they are."""
    from megaplug.runtime import cpu, repairs

    cpu.install()
    repairs.apply(frozenset(repair.name for repair in repairs.REPAIRS) - {"compiled-helpers-stay"})


def main() -> None:
    stand_in()
    curve = pretrain_from_arguments()
    if curve:
        Path(os.environ["PLAIN_CURVE"]).write_text(json.dumps(curve))


if __name__ == "__main__":
    sys.exit(main())
