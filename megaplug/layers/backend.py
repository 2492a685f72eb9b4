"""Which modules a layer is built of: torch's and Megatron's own, or Transformer Engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.torch_norm import LayerNormBuilder

from megaplug.errors import UserError
from megaplug.layers.norm import LayerNorm, RMSNorm
from megaplug.layers.registry import (
    CORE_ATTENTION,
    EXPERTS,
    ExpertsChoice,
    load_target,
    lookup,
    resolve_params,
)


class NativeSpecProvider(LocalSpecProvider):
    """Needs neither Transformer Engine nor Apex, on CPU and CUDA.

    Linear layers are Megatron's local ones; norms are ours, since Megatron's torch norm asserts that
    sequence parallelism is off.

    Args:
        core_attention: What builds a core attention.
        normalization: ``RMSNorm`` or ``LayerNorm``, for callers that do not say which they want.
        experts: What builds the experts of a layer; None for Megatron's, one after the other.
    """

    def __init__(
        self,
        core_attention: Callable[..., Any],
        normalization: str = "LayerNorm",
        experts: Callable[..., Any] | None = None,
    ) -> None:
        self._core_attention = core_attention
        self._normalization = normalization
        self._experts = experts

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> LayerNormBuilder:
        """The norm; the same before a residual and on queries and keys."""
        return RMSNorm if rms_norm or self._normalization == "RMSNorm" else LayerNorm

    def core_attention(self) -> Any:
        """The attention that was chosen by name."""
        return self._core_attention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """The experts that were chosen by name."""
        if self._experts is None:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        linears = MLPSubmodules(
            linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear()
        )
        return partial(self._experts, submodules=linears)


def core_attention_builder(
    name: str, params: Mapping[str, Any], num_query_groups: int | None = None
) -> Callable[..., Any]:
    """What builds the core attention of that name, with the user's parameters bound.

    Args:
        name: Of a registered core attention.
        params: The user's parameters for it.
        num_query_groups: Of the whole layer, bound for an attention that ``takes_num_query_groups``: Megatron
            changes the number where there are fewer groups than tensor-parallel ranks.

    Raises:
        UserError: The name or a parameter is unknown, or the target cannot be imported.
    """
    plugin = lookup(CORE_ATTENTION, name)
    target = load_target(plugin)
    bound = resolve_params(plugin, params)
    if getattr(target, "takes_num_query_groups", False):
        bound["num_query_groups"] = num_query_groups
    return partial(target, **bound) if bound else target


def experts_builder(experts: ExpertsChoice) -> Callable[..., Any] | None:
    """What builds the experts of a layer, with the user's parameters bound; None for the backend's own.

    Raises:
        UserError: The name or a parameter is unknown, or the target cannot be imported.
    """
    if experts.name is None:
        return None
    plugin = lookup(EXPERTS, experts.name)
    bound = resolve_params(plugin, experts.params)
    return partial(load_target(plugin), **bound)


def native_provider(
    name: str,
    params: Mapping[str, Any],
    normalization: str,
    num_query_groups: int | None = None,
    experts: Callable[..., Any] | None = None,
) -> BackendSpecProvider:
    """The native backend around a core attention and experts.

    Raises:
        UserError: The norm is neither ``RMSNorm`` nor ``LayerNorm``, or from ``core_attention_builder``.
    """
    if normalization not in ("RMSNorm", "LayerNorm"):
        raise UserError(f"the native backend has no norm {normalization!r}", hint="use RMSNorm or LayerNorm")
    attention = core_attention_builder(name, params, num_query_groups)
    return NativeSpecProvider(attention, normalization, experts)
