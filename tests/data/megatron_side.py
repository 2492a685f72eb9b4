"""Megatron's tokenizer as a rank builds it from its arguments."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any


def megatron_tokenizer(arguments: list[str]) -> tuple[Any, Namespace]:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    args = _add_tokenizer_args(ArgumentParser()).parse_args(arguments)
    args.rank, args.tensor_model_parallel_size, args.make_vocab_size_divisible_by = 0, 1, 128
    return build_tokenizer(args), args
