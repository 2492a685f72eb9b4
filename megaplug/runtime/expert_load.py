"""How many tokens each expert gets: counted where Megatron's routers decide it, summed over all ranks.

A router's map is that after dropping, so what is missing from ``tokens x topk`` was dropped.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router import TopKRouter

# An expert starves that gets less than this of an even share, over so many logged steps.
STARVED, STARVED_STEPS = 0.1, 20
_SHOWN = 4


@dataclass(frozen=True)
class Load:
    """One layer of experts in one step.

    Attributes:
        tokens: Copies of tokens that each expert of the whole layer got.
        asked: Copies that the router meant to send: ``topk`` of every token.
    """

    tokens: tuple[int, ...]
    asked: int

    def balance(self, num_ranks: int) -> float:
        """Mean over maximum of what the ranks of expert parallelism got; 1 where all got the same."""
        per_rank = len(self.tokens) // num_ranks
        ranks = [sum(self.tokens[first : first + per_rank]) for first in range(0, len(self.tokens), per_rank)]
        return sum(ranks) / len(ranks) / max(ranks) if any(ranks) else 1.0

    @property
    def drop_rate(self) -> float:
        """Share of the copies that no expert took."""
        return 1 - sum(self.tokens) / self.asked if self.asked else 0.0

    @property
    def entropy(self) -> float:
        """Of the shares of experts, over the largest possible: 1 where all are the same, 0 for one expert."""
        total = sum(self.tokens)
        shares = [count / total for count in self.tokens if count]
        most = math.log(len(self.tokens))
        return -sum(share * math.log(share) for share in shares) / most if most else 1.0


class ExpertLoad:
    """Counts on every rank, tells on one.

    Args:
        num_layers: Of the whole model.
        num_experts: Of a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_layers, self._num_experts = num_layers, num_experts
        self._counts: dict[int, torch.Tensor] = {}

    def watch(self, training: Any) -> None:
        """Follow the model that ``megatron.training.training.setup_model_and_optimizer`` builds."""
        real_setup = training.setup_model_and_optimizer

        @functools.wraps(real_setup)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            answer = real_setup(*args, **kwargs)
            self.observe(answer[0])
            return answer

        training.setup_model_and_optimizer = setup_model_and_optimizer

    def observe(self, model: Iterable[torch.nn.Module]) -> None:
        """Count what the routers of these chunks send, but for those of multi-token prediction."""
        from megatron.core.transformer.moe.router import TopKRouter

        for chunk in model:
            for module in chunk.modules():
                if isinstance(module, TopKRouter) and not module.is_mtp_layer:
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        # Neither in validation nor in the first of two passes where activations are computed again.
        if not torch.is_grad_enabled():
            return
        probs, routing_map = output
        if router.config.moe_pad_expert_input_to_capacity:
            routing_map = routing_map & (probs > 0)
        layer = int(router.layer_number or 0)
        if layer not in self._counts:
            # Experts, and what was asked for.
            device, size = routing_map.device, self._num_experts + 1
            self._counts[layer] = torch.zeros(size, dtype=torch.int64, device=device)
        counts = self._counts[layer]
        counts[:-1] += routing_map.sum(0)
        counts[-1] += routing_map.size(0) * router.topk

    def gather(self) -> dict[int, Load]:
        """Every layer's load since it was last asked, by layer number from 1; all ranks call it."""
        device = torch.cuda.current_device()
        size = (self._num_layers + 1, self._num_experts + 1)
        every = torch.zeros(size, dtype=torch.int64, device=device)
        for layer, counts in self._counts.items():
            every[layer] = counts
            counts.zero_()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(every)
        rows = enumerate(every.tolist())
        return {layer: Load(tuple(row[:-1]), row[-1]) for layer, row in rows if row[-1]}


def load_figures(loads: Mapping[int, Load], num_ranks: int) -> dict[str, Any]:
    """What goes into ``metrics.jsonl``; nothing where no layer has experts.

    Args:
        loads: By layer number.
        num_ranks: Of expert parallelism.

    Returns:
        ``expert_balance`` (mean over maximum of the ranks), ``expert_drop_rate`` and ``expert_entropy``, each
        the mean over the layers; ``expert_balance/layer_<n>``; and ``tokens_per_expert`` by layer.
    """
    if not loads:
        return {}
    balances = {layer: load.balance(num_ranks) for layer, load in loads.items()}
    each = list(loads.values())
    return {
        "expert_balance": _mean(list(balances.values())),
        "expert_drop_rate": _mean([load.drop_rate for load in each]),
        "expert_entropy": _mean([load.entropy for load in each]),
        **{f"expert_balance/layer_{layer}": balance for layer, balance in balances.items()},
        "tokens_per_expert": {str(layer): list(load.tokens) for layer, load in loads.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Starvation:
    """Finds experts that are hardly used any more, and says so once for each layer until they are again."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[int, ...]]] = {}
        self._told: dict[int, tuple[int, ...]] = {}

    def told_of(self, loads: Mapping[int, Load]) -> list[str]:
        """A line for each layer in which other experts starve than were told of before."""
        lines = []
        for layer, load in loads.items():
            steps = self._steps.setdefault(layer, deque(maxlen=STARVED_STEPS))
            steps.append(load.tokens)
            if len(steps) < STARVED_STEPS:
                continue
            sums = [sum(counts) for counts in zip(*steps, strict=True)]
            least = STARVED * sum(sums) / len(sums)
            starved = tuple(expert for expert, count in enumerate(sums) if count < least)
            if set(starved) - set(self._told.get(layer, ())):
                lines.append(_told(layer, starved))
            self._told[layer] = starved
        return lines


def _told(layer: int, starved: Sequence[int]) -> str:
    shown = ", ".join(map(str, starved[:_SHOWN]))
    more = f" and {len(starved) - _SHOWN} more" if len(starved) > _SHOWN else ""
    which = f"expert {shown} gets" if len(starved) == 1 else f"experts {shown}{more} get"
    return (
        f"layer {layer}: {which} less than a tenth of an even share in {STARVED_STEPS} logged steps; "
        "a larger moe.moe_aux_loss_coeff spreads tokens more evenly"
    )
