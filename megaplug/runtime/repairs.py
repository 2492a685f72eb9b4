"""The mends of faults of Megatron-core 0.19, in one place; each says what is wrong without it.

A repair applies to the versions of megatron-core that it was seen to be needed on, and has a test that fails
without it. What is applied is named in the log of rank 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megaplug.runs.atomic import replaced
from megaplug.runtime import unpickling

_SEEN_ON = ("0.19.",)


@dataclass(frozen=True)
class Repair:
    """One mend: what it is called, what is wrong without it, and how it is put in place."""

    name: str
    fault: str
    apply: Callable[[], None]


def _load_state_dict_clones_step() -> None:
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    real_load = optimizer_class.load_state_dict

    @functools.wraps(real_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        real_load(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    optimizer_class.load_state_dict = load_state_dict


def _learning_rates_are_this_jobs() -> None:
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    optimizer_class = distrib_optimizer.DistributedOptimizer
    real_load, rates = optimizer_class.load_state_dict, ("max_lr", "min_lr")

    def but_for_rates(group: dict[str, Any]) -> tuple[Any, ...]:
        keys = [key for key in param_group_identifier_keys if key not in rates]
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)

    @functools.wraps(real_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        groups = self.optimizer.param_groups
        ours = {but_for_rates(group): {rate: group.get(rate) for rate in rates} for group in groups}
        saved = state_dict.get("optimizer", {})
        # Groups that only their rates tell apart are left to Megatron.
        if len(ours) == len(groups) and "param_groups" in saved:
            changed = [{**group, **ours.get(but_for_rates(group), {})} for group in saved["param_groups"]]
            state_dict = {**state_dict, "optimizer": {**saved, "param_groups": changed}}
        real_load(self, state_dict)

    optimizer_class.load_state_dict = load_state_dict


def _set_states_skips_step() -> None:
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    real_set = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(real_set)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        step = self.optimizer.state[main_param].get("step")
        # Anything that is not a tensor is left as it is, so that the missing key does no harm.
        real_set(self, model_param, tensors if step is None else {"step": None, **tensors})

    optimizer_class._set_main_param_and_optimizer_states = set_states


def _state_dict_of_an_optimizer_without_state() -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    real_state_dict = optimizer_class.state_dict

    @functools.wraps(real_state_dict)
    def state_dict(self: Any) -> Any:
        if distrib_optimizer.HAVE_APEX_OR_TE or len(self.optimizer.state) > 0:
            return real_state_dict(self)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        step = getattr(self, "step_of_siblings", 0.0)
        return {"optimizer": {"param_groups": [{**group, "step": step} for group in groups]}}

    chained_class = optimizer.ChainedOptimizer
    real_sharded = chained_class.sharded_state_dict

    @functools.wraps(real_sharded)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A stage without experts has an optimizer for them that never steps; Megatron saves what rank 0 says,
        # and asserts on loading that all optimizers have taken as many steps.
        parts = self.chained_optimizers
        states = [state for part in parts for state in [*part.optimizer.state.values()][:1]]
        for part in parts:
            part.step_of_siblings = max((float(state["step"]) for state in states), default=0.0)
        return real_sharded(self, *args, **kwargs)

    optimizer_class.state_dict = state_dict
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        chained_class.sharded_state_dict = sharded_state_dict


def _state_of_skipped_steps() -> None:
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    real_sharded = optimizer_class.sharded_state_dict

    @functools.wraps(real_sharded)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_loading and not distrib_optimizer.HAVE_APEX_OR_TE and not self.optimizer.state:
            # What torch's Adam begins with itself.
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    zeros = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
        return real_sharded(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    optimizer_class.sharded_state_dict = sharded_state_dict


def _local_shards_are_found() -> None:
    from megatron.core.dist_checkpointing import optimizer
    from torch.distributed.tensor import DTensor

    def to_local_if_dtensor(tensor: torch.Tensor) -> torch.Tensor:
        return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

    optimizer.to_local_if_dtensor = to_local_if_dtensor


def _step_is_loaded_with_fsdp2() -> None:
    from megatron.training import checkpointing, training

    real_load, real_base = training.load_checkpoint, checkpointing._load_base_checkpoint

    @functools.wraps(real_load)
    def load_checkpoint(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("skip_load_to_model_and_opt") or optimizer is None:
            return real_load(model, optimizer, *args, **kwargs)
        loaded: list[Any] = []

        @functools.wraps(real_base)
        def keep(*args: Any, **kwargs: Any) -> Any:
            answer = real_base(*args, **kwargs)
            loaded.append(answer[0])
            return answer

        checkpointing._load_base_checkpoint = keep
        try:
            answer = real_load(model, optimizer, *args, **kwargs)
        finally:
            checkpointing._load_base_checkpoint = real_base
        _set_step(optimizer, loaded[-1])
        return answer

    training.load_checkpoint = load_checkpoint


def _set_step(optimizer: Any, state_dict: Any) -> None:
    """Give every parameter the step that the checkpoint holds once for all of them."""
    saved = (state_dict or {}).get("optimizer", {})
    step = saved.get("optimizer", saved).get("state", {}).get("common_step")
    if step is None:
        return
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = step.clone()


def _no_fp8_where_none_was_asked() -> None:
    from megatron.core.tensor_parallel import random

    real_init = random.CheckpointWithoutOutput.__init__

    @functools.wraps(real_init)
    def init(self: Any, fp8: Any = None) -> None:
        real_init(self, fp8 or None)

    random.CheckpointWithoutOutput.__init__ = init


def _compiled_helpers_stay() -> None:
    from importlib.util import find_spec

    from megatron.core.datasets import utils

    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _index_files_are_whole() -> None:
    import numpy
    from megatron.core.datasets import blended_dataset, gpt_dataset

    def save(path: str, array: Any, **how: Any) -> None:
        with replaced(Path(path)) as file:
            numpy.save(file, array, **how)

    class Numpy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

    beside = Numpy("numpy")
    beside.save = save  # type: ignore[attr-defined]
    gpt_dataset.numpy = blended_dataset.numpy = beside


def _all_samples_may_have_been_seen() -> None:
    from megatron.training.datasets import data_samplers

    sampler = data_samplers.MegatronPretrainingSampler
    real_init = sampler.__init__

    @functools.wraps(real_init)
    def init(self: Any, total_samples: int, consumed_samples: int, *args: Any, **kwargs: Any) -> None:
        none_left = consumed_samples == total_samples
        total = max(total_samples, 1)
        real_init(self, total, total - 1 if none_left else consumed_samples, *args, **kwargs)
        self.total_samples, self.consumed_samples = total_samples, consumed_samples

    sampler.__init__ = init


def _rope_scaling_factor_is_passed() -> None:
    from megatron.training import argument_utils

    real_config = argument_utils.gpt_config_from_args

    @functools.wraps(real_config)
    def gpt_config_from_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        config = real_config(args, *rest, **kwargs)
        config.rope_scaling_factor = args.rope_scaling_factor
        return config

    argument_utils.gpt_config_from_args = gpt_config_from_args


REPAIRS: tuple[Repair, ...] = (
    Repair(
        "adam-step-per-parameter",
        "DistributedOptimizer.load_state_dict gives all parameters one shared step tensor, which torch's "
        "Adam then counts up once for each of them",
        _load_state_dict_clones_step,
    ),
    Repair(
        "another-learning-rate",
        "DistributedOptimizer.load_state_dict knows a group of parameters by its learning rates, too: a "
        "state that goes on under others raises KeyError",
        _learning_rates_are_this_jobs,
    ),
    Repair(
        "adam-step-is-not-loaded-as-state",
        "DistributedOptimizer._set_main_param_and_optimizer_states takes Adam's step for state to be copied "
        "and raises KeyError 'step'",
        _set_states_skips_step,
    ),
    Repair(
        "adam-state-before-first-step",
        "DistributedOptimizer.state_dict asserts that torch's Adam has counted its steps, which it has not "
        "when a checkpoint is loaded, nor ever on a stage without experts",
        _state_dict_of_an_optimizer_without_state,
    ),
    Repair(
        "adam-state-of-skipped-steps",
        "DistributedOptimizer.sharded_state_dict raises KeyError 'exp_avg' where every step so far was "
        "skipped, as fp16's first ones are",
        _state_of_skipped_steps,
    ),
    Repair(
        "fsdp2-local-shards",
        "get_optim_param_to_id_map looks for the shard that DTensor.to_local returned, which newer torch "
        "makes anew at every call: the optimizer's state cannot be saved",
        _local_shards_are_found,
    ),
    Repair(
        "fsdp2-adam-step",
        "load_checkpoint reads the tensors of torch's FSDP2 in place and leaves Adam's step behind",
        _step_is_loaded_with_fsdp2,
    ),
    Repair(
        "recompute-of-norms",
        "CheckpointWithoutOutput takes its own default, fp8=False, for FP8 and asks Transformer Engine: "
        "recompute_modules=[layernorm] raises NameError without it",
        _no_fp8_where_none_was_asked,
    ),
    Repair(
        "rope-scaling-factor",
        "gpt_config_from_args does not pass --rope-scaling-factor on: the model always scales by 8",
        _rope_scaling_factor_is_passed,
    ),
    Repair(
        "compiled-helpers-stay",
        "initialize_megatron runs make for the data set helpers that the wheel carries compiled",
        _compiled_helpers_stay,
    ),
    Repair(
        "index-files-are-whole",
        "GPTDataset and BlendedDataset write their index in place and take every file that is there for "
        "whole: after a kill while it is written, no start can read it",
        _index_files_are_whole,
    ),
    Repair(
        "all-samples-may-have-been-seen",
        "MegatronPretrainingSampler asserts that there are samples left: a run on a blend that was killed "
        "after its last save can never be finished, and one that validates nothing never begins",
        _all_samples_may_have_been_seen,
    ),
    Repair(
        "metadata-runs-no-code",
        "a checkpoint's .metadata is read with plain pickle.load: a crafted one runs any program",
        unpickling.restrict_metadata,
    ),
    Repair(
        "objects-run-no-code",
        "random states and arguments in a checkpoint's shards are read with weights_only=False: crafted ones "
        "run any program",
        unpickling.restrict_objects,
    ),
)


def apply(skip: frozenset[str] = frozenset()) -> list[Repair]:
    """Put every repair in place that this version of megatron-core needs.

    Args:
        skip: Names of repairs to leave out; for the tests that show the fault.

    Returns:
        The repairs that were applied.
    """
    unknown = skip - {repair.name for repair in REPAIRS}
    assert not unknown, f"no such repair: {sorted(unknown)}"
    if not version("megatron-core").startswith(_SEEN_ON):
        return []
    applied = [repair for repair in REPAIRS if repair.name not in skip]
    for repair in applied:
        repair.apply()
    return applied
