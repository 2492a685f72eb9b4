"""Dilated attention written out over all pairs of tokens: what the layers are compared with."""

from __future__ import annotations

import torch

DEFAULTS = {"causal": True, "offset": "kv_group"}


def head_offset(rule, head, rate, num_heads, num_groups):
    """Ours by group, LongNet's by head, torchscale's by block of heads."""
    return {
        "kv_group": head // (num_heads // num_groups) % rate,
        "query_head": head % rate,
        "torchscale_block": head // -(-num_heads // rate),
    }[rule]


def multiplicity(num_tokens, num_heads, num_groups, lengths, rates, *, causal, offset):
    """``[heads, queries, keys]``: in how many branches a query reads a key."""
    tokens = torch.arange(num_tokens)
    count = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.int64)
    for length, rate in zip(lengths, rates, strict=True):
        same_segment = tokens[:, None] // length == tokens[None, :] // length
        for head in range(num_heads):
            mine = tokens % length % rate == head_offset(offset, head, rate, num_heads, num_groups)
            count[head] += mine[:, None] & mine[None, :] & same_segment
    return count * torch.ones(num_tokens, num_tokens, dtype=torch.int64).tril() if causal else count


def softmax_of(q, k, v, count):
    """Output and log-sum-exp of a softmax in which a key counts so often; zeros for rows without a key."""
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(3) ** -0.5 + count.to(q.dtype).log()
    has_key = (count.sum(-1) > 0)[None, :, :, None]
    weights = torch.where(has_key, scores, 0.0).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.where(has_key, weights, 0.0), v)
    return out, scores.detach().logsumexp(-1).transpose(1, 2)


def dense(q, k, v, lengths, rates, **pattern):
    """One softmax over all keys, each with the logarithm of its multiplicity."""
    sizes = (q.size(1), q.size(2), k.size(2))
    return softmax_of(q, k, v, multiplicity(*sizes, lengths, rates, **{**DEFAULTS, **pattern}))[0]


def detached(q, k, v, lengths, rates, **pattern):
    """Each branch's softmax apart, weighed by its share of the softmax's denominator without a gradient.

    So torchscale's dilated_attention.py is described: a softmax of the log-sum-exps gives the weights under
    ``no_grad``; a branch that a row is not in has none.
    """
    sizes = (q.size(1), q.size(2), k.size(2))
    outs, lses = [], []
    for length, rate in zip(lengths, rates, strict=True):
        out, lse = softmax_of(q, k, v, multiplicity(*sizes, [length], [rate], **{**DEFAULTS, **pattern}))
        outs.append(out)
        lses.append(lse)
    weights = torch.stack(lses).softmax(0).nan_to_num(0.0)
    return (torch.stack(outs) * weights[..., None]).sum(0)


def tensors(num_tokens, num_heads=4, num_groups=4, batch=1, dim=8, dtype=torch.float64, seed=0):
    """Query, key, value that want gradients, and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, num_tokens, heads, dim) for heads in (num_heads, num_groups, num_groups, num_heads))
    q, k, v, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def with_grads(attention, inputs, grad):
    """Output and the gradients of query, key and value."""
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def error(found, wanted):
    """The largest difference."""
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, wanted, strict=True))
