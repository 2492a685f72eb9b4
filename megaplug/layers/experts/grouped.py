"""Experts computed together, in the place of Megatron's one after another.

Shape letters: T rows that the dispatcher has sent to this rank, H hidden size, E experts of this rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_object_for_checkpoint,
)
from torch import Tensor

from megaplug.errors import UserError
from megaplug.layers.experts.activation import activate, is_swiglu
from megaplug.layers.experts.grouped_linear import grouped_linear
from megaplug.layers.experts.in_cache import swiglu_experts
from megaplug.layers.experts.recomputed import activated_linear
from megaplug.layers.experts.stacked import StackedLinear, sharded_experts


class GroupedExperts(MegatronModule):
    """The experts of a rank: two grouped linear layers and one activation for all rows.

    It takes the place of Megatron's ``SequentialMLP``: same results, same checkpoint keys, so that
    checkpoints of one are read into the other, and same initial values from the same seed. But where Megatron
    initializes on the CPU, all ranks of expert parallelism draw the same numbers, and its experts begin as
    copies of those of the first rank; here each begins as it does on one rank.

    Args:
        num_local_experts: E.
        config: Of the model.
        submodules: The linear layers that ``SequentialMLP`` would build each expert of.
        pg_collection: Process groups; ``ep``, ``expt_tp`` and ``expt_dp`` are used.
        name: Unused.
        kernel: See ``grouped_linear``.

    Raises:
        UserError: The config asks for number formats that these experts do not have.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        *,
        kernel: str = "auto",
    ) -> None:
        super().__init__(config=config)
        wanted = {
            "fp8": config.fp8,
            "fp4": config.fp4,
            "use_te_activation_func": config.use_te_activation_func,
            "moe_latent_size": config.moe_latent_size,
        }
        if refused := [key for key, value in wanted.items() if value]:
            raise UserError(
                f"grouped experts have no {', '.join(refused)}",
                hint="use moe.experts=sequential, or leave it out",
            )
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size
        common: dict[str, Any] = {
            "config": config,
            "bias": config.add_bias_linear,
            "skip_bias_add": True,
            "is_expert": True,
            "tp_group": self.tp_group,
        }
        fc1 = partial(
            submodules.linear_fc1,
            config.hidden_size,
            width * 2 if config.gated_linear_unit else width,
            init_method=config.init_method,
            gather_output=False,
            stride=2 if config.gated_linear_unit else 1,
            tp_comm_buffer_name="fc1",
            **common,
        )
        fc2 = partial(
            submodules.linear_fc2,
            width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="fc2",
            **common,
        )
        self.linear_fc1 = StackedLinear(num_local_experts, kernel)
        self.linear_fc2 = StackedLinear(num_local_experts, kernel)
        # In the order in which SequentialMLP draws them; on the CPU all ranks draw all.
        draws_all = config.use_cpu_initialization
        first = self.ep_group.rank() * num_local_experts if draws_all else 0
        for number in range(self.ep_group.size() * num_local_experts if draws_all else num_local_experts):
            both = fc1(), fc2()
            if first <= number < first + num_local_experts:
                for stacked, linear in zip((self.linear_fc1, self.linear_fc2), both, strict=True):
                    stacked.put(number - first, linear)
        self.recomputes_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Send every row through its expert.

        Args:
            permuted_local_hidden_states: ``[T, H]``, the rows of the first expert first.
            tokens_per_expert: ``[E]``, integers that sum to T.
            permuted_probs: ``[T]``, by what each row's result is multiplied.

        Returns:
            ``[T, H]``, biases added; and None, for there is no bias left to be added.
        """
        x, probs = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            x, probs = (probs.unsqueeze(-1) * x).to(x.dtype), torch.ones_like(probs)
        counts = tokens_per_expert.tolist()
        fc1, bias = self.linear_fc1()
        if self._stays_in_cache(x):
            fc2, _ = self.linear_fc2()
            return swiglu_experts(x, probs, fc1, fc2, tuple(counts)), None
        kernel = self.kernel_name()
        wide = grouped_linear(x, fc1, counts, kernel)
        if bias is not None:
            wide = wide + _of_rows(bias, counts)
        fc2, bias = self.linear_fc2()
        if self.recomputes_activation:
            out = activated_linear(wide, probs, fc2, tuple(counts), kernel, self.config)
        else:
            out = grouped_linear(activate(wide, probs, self.config), fc2, counts, kernel)
        if bias is not None:
            out = (out + _of_rows(bias, counts) * probs.unsqueeze(-1)).to(x.dtype)
        return out, None

    def _stays_in_cache(self, x: Tensor) -> bool:
        is_plain = is_swiglu(self.config) and self.linear_fc1.bias is None
        return x.device.type == "cpu" and self.kernel_name() == "loop" and is_plain

    def kernel_name(self) -> str:
        """Which kernel computes the linear layers."""
        return self.linear_fc1.kernel_name()

    def backward_dw(self) -> None:
        """Nothing is left to do: weight gradients are not put off."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As ``SequentialMLP``'s: keys ``experts.linear_fc1.weight`` and so on, an axis of experts before."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        if metadata.get("singleton_local_shards"):
            raise UserError("grouped experts are not saved with a key for each expert")
        axis, local = len(sharded_offsets), self.num_local_experts
        total, first = self.ep_group.size() * local, self.ep_group.rank() * local
        offsets = [(*sharded_offsets, (axis, first + expert, total)) for expert in range(local)]
        shard = (self.tp_group.rank(), self.tp_group.size())
        found: ShardedStateDict = {}
        # The bias of the second layer is whole on every rank of expert-tensor parallelism.
        axes = {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1, "linear_fc2.bias": None}
        for name, parameter in self.named_parameters():
            is_copy = 0 if axes[name] is not None else shard[0]
            found[f"{prefix}{name}"] = sharded_experts(
                parameter,
                f"{prefix}experts.{name}",
                sharded_offsets,
                (self.ep_group.rank(), self.ep_group.size()),
                axes[name],
                shard,
                (0, is_copy, self.dp_group.rank()),
                self.config.gated_linear_unit and name.startswith("linear_fc1"),
            )
        # Megatron's layers keep a place for what Transformer Engine's have besides, and look for it.
        replica = (0, shard[0], self.dp_group.rank())
        for name in ("linear_fc1._extra_state", "linear_fc2._extra_state"):
            found[f"{prefix}{name}"] = [
                make_sharded_object_for_checkpoint(None, f"{prefix}experts.{name}", at, replica)
                for at in offsets
            ]
        return found


def _stack_experts(module: GroupedExperts, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the plain state of ``SequentialMLP``, which has the parameters of each expert by themselves."""
    for name, _parameter in module.named_parameters():
        keys = [f"{prefix}local_experts.{expert}.{name}" for expert in range(module.num_local_experts)]
        if keys[0] in state_dict:
            state_dict[f"{prefix}{name}"] = torch.stack([state_dict.pop(key) for key in keys])


def _of_rows(bias_EN: Tensor, counts: list[int]) -> Tensor:
    """``[T, N]``, each row that of its expert."""
    return bias_EN.repeat_interleave(torch.tensor(counts, device=bias_EN.device), 0, output_size=sum(counts))
