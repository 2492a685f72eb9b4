"""Grouped experts against Megatron's SequentialMLP with the same weights.

Tolerance in fp32: 1e-6 of the largest value. Rows are multiplied by the same matrices and summed over the
same elements; only the order of a sum may be another one. In bf16 the error against fp64 is at most twice
that of SequentialMLP.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn import functional as F

from megaplug.errors import UserError
from megaplug.layers.experts import computing
from megaplug.layers.experts.grouped import GroupedExperts
from megaplug.layers.experts.grouped_linear import choose_kernel, grouped_linear

HIDDEN, WIDTH, EXPERTS = 48, 40, 4
LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
KINDS: dict[str, dict[str, Any]] = {
    "SwiGLU": {},
    "SwiGLU as Megatron fuses it": {"bias_activation_fusion": True},
    "GEGLU": {"activation_func": F.gelu},
    "GELU": {"gated_linear_unit": False, "activation_func": F.gelu},
    "squared ReLU": {"gated_linear_unit": False, "activation_func": squared_relu},
    "clamped SwiGLU": {"activation_func_clamp_value": 0.1, "glu_linear_offset": 1.0},
}
COUNTS = {
    "any": (5, 0, 20, 7),
    "one takes all": (0, 0, 32, 0),
    "even": (8, 8, 8, 8),
    "none": (0, 0, 0, 0),
    "the last has none": (16, 15, 1, 0),
}


def group(size: int = 1, rank: int = 0) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def groups(ep: Any = None) -> Any:
    return SimpleNamespace(ep=ep or group(), expt_tp=group(), expt_dp=group())


@pytest.fixture
def make(config, monkeypatch):
    """A function that builds experts of a class, always with the same initial values."""
    monkeypatch.setattr(parallel_state, "get_data_parallel_group", lambda **kwargs: group())

    def build(
        kind: type, *, ep: Any = None, kernel: str = "auto", num_experts: int = EXPERTS, **changes: Any
    ) -> Any:
        values: dict[str, Any] = {
            "hidden_size": HIDDEN,
            "num_moe_experts": EXPERTS * (ep.size() if ep else 2),
            "moe_ffn_hidden_size": WIDTH,
            "ffn_hidden_size": 2 * WIDTH,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "bias_activation_fusion": False,
            "init_method_std": 0.3,
            # Linear layers of experts then leave all communication to the dispatcher.
            "expert_model_parallel_size": ep.size() if ep else 2,
        }
        torch.manual_seed(0)
        more = {"kernel": kernel} if kind is GroupedExperts else {}
        return kind(num_experts, config(**(values | changes)), LINEARS, groups(ep), **more)

    return build


def inputs(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Rows, their probabilities, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(counts)
    x, grad = (torch.randn(rows, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    return [x, torch.rand(rows, generator=generator), grad]


def results(experts: Any, counts: tuple[int, ...], given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of rows, probabilities and both weights ``[E, ...]``."""
    x, probs = (each.detach().requires_grad_() for each in given[:2])
    out, bias = experts(x, torch.tensor(counts), probs)
    assert bias is None
    out.backward(given[2].to(out.dtype))
    if isinstance(experts, GroupedExperts):
        weights = [experts.linear_fc1.weight, experts.linear_fc2.weight]
        found = [weight.grad for weight in weights]
    else:
        found = [
            torch.stack([_grad_or_zeros(getattr(one, name).weight) for one in experts.local_experts])
            for name in ("linear_fc1", "linear_fc2")
        ]
    return [out.detach(), x.grad, probs.grad, *found]


def _grad_or_zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def errors(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """Of each the largest difference, in units of the largest value."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs if b.numel()]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_results_and_gradients_are_those_of_sequential_experts(kind, counts, make):
    given = inputs(counts)
    wanted = results(make(SequentialMLP, **kind), counts, given)
    found = results(make(GroupedExperts, **kind), counts, given)
    assert max(errors(found, wanted)) < 1e-6


@pytest.mark.parametrize("kernel", ["loop", "loop with AMX", "loop of AMD's", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_in_bf16_the_error_is_at_most_twice_that_of_sequential_experts(kind, kernel, make, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: kernel == "loop with AMX")
    monkeypatch.setattr(computing, "is_amd_with_bf16", lambda: kernel == "loop of AMD's")
    counts = COUNTS["any"]
    exact = make(SequentialMLP, **(kind | {"bias_activation_fusion": False}))
    theirs = make(SequentialMLP, params_dtype=torch.bfloat16, bf16=True, **kind)
    kernel = kernel.split(" ")[0]
    ours = make(GroupedExperts, kernel=kernel, params_dtype=torch.bfloat16, bf16=True, **kind)
    given = inputs(counts, torch.bfloat16)
    for one, narrow in zip(exact.local_experts, theirs.local_experts, strict=True):
        one.load_state_dict(narrow.state_dict())
    wanted = results(exact.double(), counts, [each.double() for each in given])
    both = [errors(results(each, counts, given), wanted) for each in (ours, theirs)]
    assert all(mine <= 2 * other for mine, other in zip(*both, strict=True)), both


def test_biases_are_added_before_the_activation_and_weighed_after_it(make):
    """SequentialMLP itself raises in its backward pass here, so that each expert is written out."""
    counts = COUNTS["any"]
    experts = make(GroupedExperts, add_bias_linear=True)
    with torch.no_grad():
        for layer in (experts.linear_fc1, experts.linear_fc2):
            layer.bias.copy_(torch.randn(layer.bias.shape))
    x, probs, _ = inputs(counts)
    parts = []
    for e, (rows, p) in enumerate(zip(x.split(counts), probs.split(counts), strict=True)):
        gate, up = F.linear(rows, experts.linear_fc1.weight[e], experts.linear_fc1.bias[e]).chunk(2, -1)
        hidden = F.silu(gate) * up * p[:, None]
        parts.append(F.linear(hidden, experts.linear_fc2.weight[e]) + experts.linear_fc2.bias[e] * p[:, None])
    assert errors([experts(x, torch.tensor(counts), probs)[0]], [torch.cat(parts)])[0] < 1e-6


def test_probabilities_on_the_input_are_as_in_sequential_experts(make):
    counts = COUNTS["any"]
    change = {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True}
    given = inputs(counts)
    wanted = results(make(SequentialMLP, **change), counts, given)
    assert max(errors(results(make(GroupedExperts, **change), counts, given), wanted)) < 1e-6


def test_rows_need_not_lie_one_after_the_other(make):
    counts = COUNTS["any"]
    experts, given = make(GroupedExperts), inputs(counts)
    wanted = results(experts, counts, given)
    experts.zero_grad()
    apart = [
        given[0].t().contiguous().t(),
        torch.stack([given[1]] * 2, 1)[:, 0],
        given[2].t().contiguous().t(),
    ]
    assert not any(each.is_contiguous() for each in apart)
    assert max(errors(results(experts, counts, apart), wanted)) < 1e-6


def test_an_activation_that_is_computed_again_is_not_kept_and_changes_nothing(make):
    counts = COUNTS["any"]
    change = {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act"],
        "moe_grouped_gemm": True,
    }
    kept, found = {}, {}
    kinds = {"kept": {"kernel": "grouped_mm"}, "again": {"kernel": "grouped_mm"} | change, "in cache": {}}
    for name, kind in kinds.items():
        experts = make(GroupedExperts, **kind)
        shapes: list[torch.Size] = []
        x, probs, _ = inputs(counts)
        with torch.autograd.graph.saved_tensors_hooks(partial(_noted, shapes), lambda tensor: tensor):
            experts(x.requires_grad_(), torch.tensor(counts), probs)
        kept[name] = shapes.count(torch.Size((sum(counts), WIDTH)))
        found[name] = results(make(GroupedExperts, **kind), counts, inputs(counts))
    assert kept == {"kept": 1, "again": 0, "in cache": 0}
    assert max(errors(found["again"], found["kept"])) == 0
    assert max(errors(found["in cache"], found["kept"])) < 1e-6


def _noted(shapes: list[torch.Size], tensor: torch.Tensor) -> torch.Tensor:
    shapes.append(tensor.shape)
    return tensor


def test_gradients_go_into_megatrons_buffer_as_they_come(make):
    """As Megatron's DDP keeps it: added for every microbatch, and told."""
    counts, experts = COUNTS["any"], make(GroupedExperts)
    given = inputs(counts)
    wanted = results(experts, counts, given)[3:]
    weights = [experts.linear_fc1.weight, experts.linear_fc2.weight]
    for dtype in (torch.float32, torch.float64):
        for weight in weights:
            weight.main_grad = torch.zeros(weight.shape, dtype=dtype)
            weight.grad_added_to_main_grad = False  # once for a step
        for _ in range(2):
            for weight in weights:
                weight.grad = None
            results(experts, counts, given)
            assert all(weight.grad_added_to_main_grad and weight.grad is not None for weight in weights)
        assert max(errors([weight.main_grad for weight in weights], [2 * each for each in wanted])) < 1e-6


def test_weights_that_are_not_trained_get_no_gradient(make):
    counts, given = COUNTS["any"], inputs(COUNTS["any"])
    wanted = results(make(GroupedExperts), counts, given)
    experts = make(GroupedExperts)
    experts.linear_fc1.weight.requires_grad_(False)
    *found, first, second = results(experts, counts, given)
    assert first is None
    assert max(errors([*found, second], [*wanted[:3], wanted[4]])) == 0


@pytest.mark.parametrize("counts", [COUNTS["any"], COUNTS["the last has none"]], ids=str)
def test_torchs_grouped_mm_gives_what_a_loop_gives(counts, make):
    given = inputs(counts)
    loop = results(make(GroupedExperts, kernel="loop"), counts, given)
    assert max(errors(results(make(GroupedExperts, kernel="grouped_mm"), counts, given), loop)) < 1e-6


def test_a_checkpoint_lies_as_that_of_sequential_experts(make):
    """For the third of four ranks: keys, shapes, places, and values; so that each reads the other's."""
    sequential, grouped = (make(kind, ep=group(4, 2)) for kind in (SequentialMLP, GroupedExperts))
    grouped.load_state_dict(sequential.state_dict(), strict=False)
    theirs, ours = (
        _entries(experts.sharded_state_dict("decoder.mlp.experts.", ((0, 1, 3),)))
        for experts in (sequential, grouped)
    )
    assert _laid_out(ours).keys() == _laid_out(theirs).keys()
    for key, (whole, replicas) in _laid_out(theirs).items():
        mine, my_replicas = _laid_out(ours)[key]
        assert torch.equal(mine, whole) and my_replicas == replicas, key
    num_pieces = [sum(isinstance(entry, ShardedTensor) for entry in entries) for entries in (theirs, ours)]
    assert num_pieces == [3 * EXPERTS, 2]  # Megatron has gate and up apart


def _laid_out(entries: list[ShardedTensor | ShardedObject]) -> dict[str, tuple[torch.Tensor, set[Any]]]:
    """By key, the whole of it as far as this rank has it, and its replica numbers."""
    found: dict[str, tuple[torch.Tensor, set[Any]]] = {}
    for entry in entries:
        whole, replicas = found.setdefault(entry.key, (torch.zeros(entry.global_shape), set()))
        replicas.add(entry.replica_id)
        if isinstance(entry, ShardedObject):
            whole[entry.global_offset] = 1
            continue
        lengths = (1,) * entry.prepend_axis_num + entry.local_shape
        places = zip(entry.global_offset, lengths, strict=True)
        whole[tuple(slice(at, at + length) for at, length in places)] = entry.data
    return found


def _entries(found: Any) -> list[Any]:
    if isinstance(found, ShardedTensorFactory):
        found = found.build()
    if isinstance(found, dict):
        found = list(found.values())
    return [entry for value in found for entry in _entries(value)] if isinstance(found, list) else [found]


def test_a_rank_begins_with_its_own_experts_of_those_that_one_rank_begins_with(make):
    """All numbers are drawn on each, so that what is drawn after them is the same everywhere."""
    after = []
    parts = []
    for rank in range(2):
        parts.append(make(GroupedExperts, ep=group(2, rank)))
        after.append(torch.rand(()))
    whole = make(GroupedExperts, num_experts=2 * EXPERTS)
    after.append(torch.rand(()))
    assert len(set(map(float, after))) == 1
    for name, weight in whole.named_parameters():
        assert torch.equal(torch.cat([part.get_parameter(name) for part in parts]), weight)


def test_what_was_saved_is_put_together_again(make):
    experts = make(GroupedExperts)
    state = experts.sharded_state_dict("experts.")
    for name, parameter in experts.named_parameters():
        factory = state[f"experts.{name}"]
        assert torch.equal(factory.merge_fn([part.data for part in factory.build()]), parameter)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"moe_latent_size": 16}, "moe_latent_size"), ({"use_te_activation_func": True}, "use_te_activation")],
)
def test_what_grouped_experts_have_not_is_refused_by_name(change, said, make):
    with pytest.raises(UserError, match=f"grouped experts have no {said}"):
        make(GroupedExperts, **change)


def test_groups_that_do_not_fit_are_refused():
    x, weight = torch.randn(6, 4), torch.randn(2, 3, 4)
    for counts in ((3, 4), (6,), (2, 2, 2)):
        with pytest.raises(UserError, match="6 rows of 4 in groups of"):
            grouped_linear(x, weight, counts)
    with pytest.raises(UserError, match="there is no kernel 'gropued'"):
        choose_kernel(x, weight, "gropued")


def test_on_a_cpu_a_loop_computes():
    x, weight = torch.randn(6, 4), torch.randn(2, 3, 4)
    assert choose_kernel(x, weight) == "loop"
    assert choose_kernel(x, weight, "grouped_mm") == "grouped_mm"
