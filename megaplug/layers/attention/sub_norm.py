"""Self-attention as in MAGNETO: a norm before its last projection, and Xavier's initial weights.

Wang et al. 2022, arXiv 2210.06423; torchscale's ``inner_attn_ln`` and ``gamma_init``. MAGNETO's second norm,
inside the MLP, is not here.

Shape letters: S tokens, B micro-batch, X channels of this rank's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from megaplug.errors import UserError
from megaplug.layers.attention.rotary import RotarySelfAttention


class ShardedLayerNorm(nn.Module):
    """LayerNorm over channels of which each tensor-parallel rank holds a part; exact, as on one rank.

    Args:
        config: Decides the weights' dtype.
        hidden_size: Channels of all ranks together.
        eps: Added to the variance.
        group: The ranks, each with as many channels.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group = group
        here = hidden_size // group.size()
        self.weight = nn.Parameter(torch.ones(here, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(here, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Every rank has other channels of all tokens: nothing is to be summed, all of it counts in norms.
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SBX: Tensor) -> Tensor:
        """Same shape and dtype."""
        if self.group.size() == 1:
            return F.layer_norm(x_SBX, self.weight.shape, self.weight, self.bias, self.eps)
        return _LayerNormOverRanks.apply(x_SBX, self.weight, self.bias, self.eps, self.group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Both vectors cut over the ranks, so that a checkpoint loads on any number of them."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class _LayerNormOverRanks(torch.autograd.Function):
    """With ``n = (x - mean) r`` and ``y = n w + b``: ``dx = r (g w - mean(g w) - n mean(g w n))``.

    Means are over the channels of all ranks: one message of two numbers a token forward, and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup
    ) -> Tensor:
        """Keep ``x`` and two numbers a token."""
        wide = _widened(x)
        spread, part = torch.var_mean(wide, -1, correction=0)
        own = torch.stack((part, spread))
        gathered = own.new_empty((group.size() * 2, *part.shape))
        dist.all_gather_into_tensor(gathered, own, group=group)
        parts = gathered.unflatten(0, (-1, 2))
        # Means and variances of equal parts, put together without differences of large numbers.
        spread, mean = torch.var_mean(parts[:, 0], 0, correction=0)
        r = (parts[:, 1].mean(0) + spread).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, mean, r)
        ctx.group = group
        normed = (wide - mean[..., None]).mul_(r[..., None])
        return normed.mul_(weight).add_(bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of ``x``, the weight and the bias."""
        x, weight, mean, r = ctx.saved_tensors
        g = _widened(grads[0])
        normed = (_widened(x) - mean[..., None]).mul_(r[..., None])
        d_weight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype)
        d_bias = g.flatten(0, -2).sum(0).to(weight.dtype)
        g_w = g * weight
        sums = torch.stack((g_w.sum(-1), (g_w * normed).sum(-1)))
        dist.all_reduce(sums, group=ctx.group)
        sums /= x.size(-1) * ctx.group.size()
        d_x = (g_w - sums[0][..., None] - normed * sums[1][..., None]).mul_(r[..., None])
        return d_x.to(x.dtype), d_weight, d_bias, None, None


def _widened(x: Tensor) -> Tensor:
    """``x`` in fp32, or as it is when it is no narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RingMultiheadDilatedAttention(RotarySelfAttention):
    """Megatron's self-attention with MAGNETO's norm of what the heads give, before the last projection.

    Its core attention is that of its spec: ring, dilated, or any other.

    Args:
        *args: As of Megatron's ``SelfAttention``.
        **kwargs: As well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sub_layernorm = ShardedLayerNorm(
            self.config, self.query_projection_size, self.config.layernorm_epsilon, self.tp_group
        )
        self.linear_proj.register_forward_pre_hook(self._norm_first)

    def _norm_first(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.sub_layernorm(inputs[0]), *inputs[1:])


def xavier_projections(
    qkv: Callable[..., Any], proj: Callable[..., Any], gamma: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two linear layers of a self-attention, with Xavier's normal initial weights in place of Megatron's.

    Args:
        qkv: What builds the fused projection of queries, keys and values.
        proj: What builds the last one.
        gamma: Gain of the values' and the last projection; that of queries and keys is 1.

    Returns:
        What builds them so.
    """

    def build_qkv(*args: Any, config: TransformerConfig, **kwargs: Any) -> Any:
        if config.attention_output_gate:
            raise UserError("gamma_init knows no attention_output_gate", hint="leave one of them out")
        return qkv(*args, config=config, **{**kwargs, "init_method": _xavier_qkv(config, gamma)})

    def build_proj(*args: Any, config: TransformerConfig, **kwargs: Any) -> Any:
        return proj(*args, config=config, **{**kwargs, "init_method": _xavier_proj(config, gamma)})

    return build_qkv, build_proj


def _xavier_qkv(config: TransformerConfig, gamma: float) -> Callable[[Tensor], Tensor]:
    """Of the fused weight, or a rank's rows of it: each group's query heads, then its key, then its value.

    Each of the three is a matrix of its own, whose rows count for its standard deviation
    ``gain sqrt(2 / (inputs + outputs))`` (Glorot and Bengio 2010).
    """
    head, groups = config.kv_channels, config.num_query_groups
    assert head is not None and groups is not None
    per_group = config.num_attention_heads // groups

    def initialize(weight: Tensor) -> Tensor:
        rows, total = weight.size(0), groups * (per_group + 2) * head
        first = 0 if rows == total else parallel_state.get_tensor_model_parallel_rank() * rows
        place = torch.arange(first, first + rows, device=weight.device) // head % (per_group + 2)
        of_queries = _deviation(weight.size(1), per_group * groups * head)
        of_keys = _deviation(weight.size(1), groups * head)
        deviations = torch.full((rows,), of_queries, device=weight.device)
        deviations[place == per_group] = of_keys
        deviations[place == per_group + 1] = gamma * of_keys
        with torch.no_grad():
            return weight.normal_().mul_(deviations[:, None])

    return initialize


def _xavier_proj(config: TransformerConfig, gamma: float) -> Callable[[Tensor], Tensor]:
    """Of the last projection, or a rank's columns of it."""
    head = config.kv_channels
    assert head is not None

    def initialize(weight: Tensor) -> Tensor:
        deviation = gamma * _deviation(config.num_attention_heads * head, config.hidden_size)
        return nn.init.normal_(weight, std=deviation)

    return initialize


def _deviation(inputs: int, outputs: int) -> float:
    return (2 / (inputs + outputs)) ** 0.5
