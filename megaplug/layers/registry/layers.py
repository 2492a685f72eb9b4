"""Which attention each layer of a model has: one for all, or a unit of names that is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaplug.errors import UserError
from megaplug.layers.registry.params import resolve_params
from megaplug.layers.registry.plugin import CORE_ATTENTION
from megaplug.layers.registry.store import lookup

_MEGATRONS_LAYOUT = "zigzag"


@dataclass(frozen=True)
class AttentionLayers:
    """The attentions of a model, layer by layer.

    Attributes:
        unit: Names of registered core attentions; layer n of the whole model, from 0, has the n-th of them,
            from the first again after the last.
        params: The user's parameters, by name.
        sub_layer_norm: Whether every layer norms what its heads give before its last projection.
        gamma_init: Xavier gain of values and last projection; None takes Megatron's initial weights.
    """

    unit: tuple[str, ...]
    params: Mapping[str, Mapping[str, Any]]
    sub_layer_norm: bool = False
    gamma_init: float | None = None

    @classmethod
    def alike(cls, name: str, params: Mapping[str, Any]) -> AttentionLayers:
        """The same in all layers."""
        return cls((name,), {name: params})

    @property
    def names(self) -> tuple[str, ...]:
        """Every name once, in the order of layers."""
        return tuple(dict.fromkeys(self.unit))

    def name_of(self, layer: int) -> str:
        """The attention of a layer, counted from 0 over all pipeline stages."""
        return self.unit[layer % len(self.unit)]

    def params_of(self, name: str) -> Mapping[str, Any]:
        """The user's parameters for that name."""
        return self.params.get(name, {})

    def counts(self, num_layers: int) -> dict[str, int]:
        """How many layers of the model each name has."""
        names = [self.name_of(layer) for layer in range(num_layers)]
        return {name: names.count(name) for name in self.names if name in names}

    def described(self, num_layers: int) -> str:
        """For a person, such as ``flash attention`` or ``ring attention in 2 layers, dilated in 2``."""
        counts = self.counts(num_layers)
        if len(counts) == 1:
            return f"{next(iter(counts))} attention"
        parts = [f"{name} in {count}" for name, count in counts.items()]
        return f"attention {', '.join(parts)} of {num_layers} layers"

    def token_layouts(self, context_parallel_size: int = 1) -> dict[str, str]:
        """How each attention wants a sequence spread over ranks.

        One that has no parameter for it takes the tokens as Megatron spreads them; on one rank it has none.

        Raises:
            UserError: A name or a parameter is unknown.
        """
        found = {}
        for name in self.names:
            params = resolve_params(lookup(CORE_ATTENTION, name), self.params_of(name))
            if "token_layout" in params or context_parallel_size > 1:
                found[name] = params.get("token_layout", _MEGATRONS_LAYOUT)
        return found

    def token_layout(self) -> str:
        """The one layout of all layers: batches and rotary angles can only have one.

        Raises:
            UserError: They have several, or a name or a parameter is unknown.
        """
        layouts = self.token_layouts()
        if len(set(layouts.values())) > 1:
            told = ", ".join(f"{name} {layout}" for name, layout in layouts.items())
            raise UserError(f"layers spread their tokens in several layouts: {told}", hint="use one of them")
        return next(iter(layouts.values()), _MEGATRONS_LAYOUT)
