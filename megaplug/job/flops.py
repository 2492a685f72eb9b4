"""What a training step computes, counted by hand from the model's sizes; the numerator of TFLOP/s and MFU.

The convention, in full:

* **Model FLOPs**: what forward and backward of the model need, whatever an implementation adds. What
  activation recompute computes again does not count; neither do norms, activations, softmax, RoPE, dropout,
  the loss or the optimizer, which are below a hundredth of the rest in every model of use.
* A multiply-add is 2 FLOPs; backward is twice forward (gradients of inputs and of weights).
* **Causal attention counts what a causal mask leaves**: query i sees i + 1 keys, (s + 1) / 2 of s on
  average, for the scores and again for the values. PaLM's appendix B and most published figures count the
  whole square, which is more: an eighth more for llama3_8b at s = 8,192.
* Dilated attention counts the pairs of queries and keys that its branches have (``job/core_attention.py``).
* Of experts only those that a token is sent to count (``moe_router_topk``), beside router and shared expert.
* The output layer counts with the vocabulary as padded; the embedding is a look-up and does not count.

Published TFLOP/s follow one of three other conventions, and stand beside ours only under their names. All
three leave the router out (``as_megatron``):

* **causal**: Megatron-core since 0.12 and Megatron-Bridge: half the square of scores, s / 2.
* **full** (``causal=False``): the whole square. Megatron before, PaLM, NeMo's summaries.
* **full with recompute**: SC21's formula, which counts the second forward pass of each layer too.

Sources: Chowdhery et al. 2022 (PaLM), appendix B; Korthikanti et al. 2022, appendix A.
"""

from __future__ import annotations

from megaplug.topology import ModelShape


def forward_flops_per_token(
    shape: ModelShape,
    *,
    vocab_size: int,
    causal: bool = True,
    as_megatron: bool = False,
    mtp_num_layers: int = 0,
    pairs: float = 1.0,
) -> float:
    """FLOPs of one token's forward pass in a sequence of ``shape.seq_length``.

    Args:
        shape: The model's sizes.
        vocab_size: Rows of the output layer, padding included.
        causal: False counts the whole square of scores, for a comparison with figures that do.
        as_megatron: Counts as Megatron's log does, for a comparison with figures that were read from it:
            s / 2 for (s + 1) / 2, and no router.
        mtp_num_layers: Layers of multi-token prediction beside the shape's: each is one like the last, joins
            the embedding to its input (2 h -> h) and passes the output layer once more.
        pairs: Pairs of queries and keys that attention computes, over those of dense attention.
    """
    hidden, mlps = shape.hidden_size, 3 if shape.swiglu else 2
    seen = pairs * ((shape.seq_length + (not as_megatron)) / 2 if causal else shape.seq_length)
    attention = 2 * _projections(shape) + 2 * seen * (shape.query_size + shape.attended_size)
    dense = 2 * mlps * hidden * shape.ffn_hidden_size
    experts = 2 * mlps * hidden * shape.moe_router_topk * shape.expert_ffn_size
    experts += 2 * mlps * hidden * (shape.moe_shared_expert_intermediate_size or 0)
    if not as_megatron:
        experts += 2 * hidden * (shape.num_experts or 0)
    total = 2.0 * hidden * vocab_size * (1 + mtp_num_layers) + 4 * hidden**2 * mtp_num_layers
    layers = shape.moe_layers
    for has_experts in layers + layers[-1:] * mtp_num_layers:
        total += attention + (experts if has_experts else dense)
    return total


def _projections(shape: ModelShape) -> int:
    """Multiply-adds of a token in the linear layers of one attention."""
    hidden = shape.hidden_size
    if not shape.multi_latent_attention:
        return hidden * (shape.query_size + 2 * shape.key_size) + shape.query_size * hidden
    of_queries, of_keys_values = shape.latent_sizes
    queries = (hidden + shape.query_size) * of_queries if of_queries else hidden * shape.query_size
    per_head = shape.qk_head_dim + shape.v_head_dim
    down = hidden * (of_keys_values + shape.qk_pos_emb_head_dim)
    up = of_keys_values * shape.num_attention_heads * per_head
    return queries + down + up + shape.value_size * hidden


def training_flops_per_token(
    shape: ModelShape,
    *,
    vocab_size: int,
    causal: bool = True,
    as_megatron: bool = False,
    mtp_num_layers: int = 0,
    pairs: float = 1.0,
) -> float:
    """FLOPs of one token's forward and backward pass; see `forward_flops_per_token`."""
    return 3 * forward_flops_per_token(
        shape,
        vocab_size=vocab_size,
        causal=causal,
        as_megatron=as_megatron,
        mtp_num_layers=mtp_num_layers,
        pairs=pairs,
    )
