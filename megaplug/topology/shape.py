"""What of a model and of a batch the rules and the counts need: plain numbers."""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import dataclass

from megaplug.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer, under Megatron's names.

    ``vocab_size`` is the tokenizer's, before Megatron pads it. ``kv_channels`` is the size of one head,
    ``None`` for ``hidden_size / num_attention_heads``; ``moe_ffn_hidden_size`` is ``None`` for
    ``ffn_hidden_size``. Under ``multi_latent_attention`` heads have the last three sizes and the number of
    groups says nothing. ``num_experts`` is ``None`` (or 0) for a dense model. ``moe_router_pre_softmax`` is
    ``None`` where it is not known, and then not judged. ``rotary_percent`` is the part of a head that is
    rotated.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int | None
    seq_length: int
    vocab_size: int
    make_vocab_size_divisible_by: int = 128
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int = 2
    swiglu: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    normalization: str = "RMSNorm"
    qk_layernorm: bool = False
    sub_layer_norm: bool = False
    untie_embeddings_and_output_weights: bool = True
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    moe_shared_expert_intermediate_size: int | None = None
    moe_layer_freq: str | int | None = None
    moe_router_pre_softmax: bool | None = None
    max_position_embeddings: int | None = None
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128

    @property
    def head_size(self) -> int:
        """Channels of one attention head, of a query's or key's in latent attention."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // max(1, self.num_attention_heads)

    @property
    def query_size(self) -> int:
        """Channels of all queries together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Channels of all keys together; the values have as many, but in latent attention."""
        groups = self.num_attention_heads if self.multi_latent_attention else self.num_query_groups
        return groups * self.head_size

    @property
    def value_size(self) -> int:
        """Channels of all values together."""
        return self.num_attention_heads * self.v_head_dim if self.multi_latent_attention else self.key_size

    @property
    def attended_size(self) -> int:
        """Channels of the core attention's output."""
        return self.value_size if self.multi_latent_attention else self.query_size

    @property
    def latent_sizes(self) -> tuple[int, int]:
        """Channels of the latents of queries, and of keys and values; 0 where there is none."""
        return (self.q_lora_rank or 0, self.kv_lora_rank) if self.multi_latent_attention else (0, 0)

    @property
    def expert_ffn_size(self) -> int:
        """Hidden size of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def is_moe(self) -> bool:
        """Whether there are experts at all."""
        return bool(self.num_experts)

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For each layer, whether its MLP is a mixture of experts.

        Raises:
            UserError: If ``moe_layer_freq`` cannot be read or does not name every layer.
        """
        if not self.is_moe:
            return (False,) * self.num_layers
        return moe_pattern(self.moe_layer_freq, self.num_layers)

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding: a multiple of ``make_vocab_size_divisible_by`` that ``tp`` divides.

        Megatron itself pads to a multiple of ``make_vocab_size_divisible_by * tp``, and so gives one model
        another vocabulary, and another loss, under every ``tp``. Here the two only differ where ``tp`` does
        not divide ``make_vocab_size_divisible_by``.
        """
        multiple = self.make_vocab_size_divisible_by
        if multiple % tp:
            multiple = math.lcm(multiple, tp)
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass of one rank, and of one optimizer step of all ranks."""

    micro_batch_size: int
    global_batch_size: int


@functools.cache
def moe_pattern(freq: str | int | None, num_layers: int) -> tuple[bool, ...]:
    """Reads Megatron's ``--moe-layer-freq`` without evaluating it.

    Args:
        freq: ``N`` for an expert layer in every N (the first of them), or a list of 0 and 1 for every layer,
            written with ``+`` and ``*`` such as ``([1]*3+[0]*1)*3``; ``None`` for all layers.
        num_layers: Layers of the model.

    Raises:
        UserError: If it is neither, or the list has another length than the model.
    """
    value = _literal(freq) if isinstance(freq, str) else 1 if freq is None else freq
    if isinstance(value, int) and value > 0:
        return tuple(layer % value == 0 for layer in range(num_layers))
    if not isinstance(value, list) or not all(flag in (0, 1) for flag in value):
        raise UserError(
            f"moe_layer_freq {freq!r} is neither a positive number nor a list of 0 and 1",
            hint="write 2 for an expert layer in every two, or a list such as ([1]*3+[0]*1)*3",
        )
    if len(value) != num_layers:
        raise UserError(
            f"moe_layer_freq {freq!r} names {len(value)} layers, but the model has {num_layers}",
            hint=f"name each of the {num_layers} layers once",
        )
    return tuple(flag == 1 for flag in value)


def _literal(text: str) -> object:
    try:
        return _fold(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, MemoryError):
        return None


def _fold(node: ast.expr) -> object:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_fold(element) for element in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _fold(node.left), _fold(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, int):
            left, right = right, left
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right > 1_000_000:
                raise MemoryError
            return left * right
    raise TypeError
