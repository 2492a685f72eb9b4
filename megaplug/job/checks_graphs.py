"""What CUDA graphs cannot be combined with.

From ``core/transformer/transformer_config.py``, ``core/transformer/cuda_graphs.py`` and
``core/full_cuda_graph.py`` of Megatron 0.19. A graph replays the same kernels on the same addresses, so that
nothing that it captures may ask the GPU for a number before it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.recompute import granularity
from megaplug.job.schema import Job

# What Megatron moves to the CPU beside its own graphs.
_MOVED_BESIDE_A_GRAPH = {"expert_fc1", "moe_act", "fused_group_mlp"}
MODULES = ("attn", "mlp", "moe", "moe_router", "moe_preprocess")
_IMPL, _PARTS, _WARMUP = (f"cuda_graph.cuda_graph_{name}" for name in ("impl", "modules", "warmup_steps"))


def cuda_graph_problems(job: Job, *, device: str | None, backend: str | None) -> Iterator[Problem]:
    """Everything that is wrong with ``cuda_graph.*``.

    Args:
        job: The job.
        device: ``cpu`` or ``cuda``; None where it is not known.
        backend: ``native`` or ``te``; None where it is not known.
    """
    graph = job.cuda_graph
    impl, parts = graph.cuda_graph_impl, graph.cuda_graph_modules
    unknown = sorted(set(parts) - set(MODULES))
    if unknown:
        yield Problem(_PARTS, f"there is no {', '.join(unknown)}", f"known: {', '.join(MODULES)}")
    if graph.cuda_graph_warmup_steps < 0:
        yield Problem(_WARMUP, f"must not be negative, but is {graph.cuda_graph_warmup_steps}")
    if impl == "none":
        if parts:
            yield Problem(_PARTS, "nothing is captured with cuda_graph_impl=none", "choose cuda_graph=local")
        return
    if device == "cpu":
        yield Problem(_IMPL, f"CUDA graphs ({impl}) need a GPU, and the device is cpu", "use cuda_graph=none")
    if impl == "transformer_engine" and backend == "native":
        message = "Transformer Engine captures only its own layers, and the backend is native"
        yield Problem(_IMPL, message, "use cuda_graph=local, or backend=te")
    if impl == "full_iteration" and parts:
        message = f"full_iteration captures everything, and cuda_graph_modules names {', '.join(parts)}"
        yield Problem(_PARTS, message, "leave the list empty")
    if impl != "full_iteration" and granularity(job.train) == "full":
        message = "full recomputation goes with full_iteration only"
        hint = "use cuda_graph=full_iteration, or train.recompute_granularity=selective"
        yield Problem(_IMPL, message, hint)
    yield from _offload(job)
    yield from _dropout(job)
    yield from _experts(job)


def _offload(job: Job) -> Iterator[Problem]:
    """Activations that wait in the CPU's memory."""
    graph, train, off = job.cuda_graph, job.train, "use cuda_graph=none"
    impl = graph.cuda_graph_impl
    if impl != "full_iteration" and train.cpu_offloading_num_layers:
        message = "layers whose activations are moved to the CPU cannot be captured"
        yield Problem(_IMPL, message, f"{off}, or train.cpu_offloading_num_layers=0")
    if not train.fine_grained_activation_offloading:
        return
    outside = sorted(set(train.offload_modules or ()) - _MOVED_BESIDE_A_GRAPH)
    if impl == "local" and outside:
        message = f"beside graphs of Megatron's own, {', '.join(outside)} cannot be moved to the CPU"
        yield Problem("train.offload_modules", message, f"{off}, or cuda_graph=te with backend=te")
    if "moe" in graph.cuda_graph_modules or (impl == "local" and not graph.cuda_graph_modules):
        message = "experts that are captured whole cannot be moved to the CPU"
        yield Problem(
            _PARTS, message, "use [attn,moe_router], or train.fine_grained_activation_offloading=false"
        )
    if graph.cuda_graph_warmup_steps < 1:
        yield Problem(_WARMUP, "what is moved to the CPU is found out in a step before the capture", "use 1")
    in_flight = "fine_grained_offloading_max_inflight_offloads"
    if impl == "full_iteration" and job.megatron.get(in_flight) is None:
        message = "a graph of the whole step needs to know how many moves to the CPU may be under way"
        yield Problem(f"megatron.{in_flight}", message, "for example 2")


def _dropout(job: Job) -> Iterator[Problem]:
    """A part that is captured and computed again draws other numbers the second time."""
    # Megatron recomputes core_attn where no module is named.
    parts, again = job.cuda_graph.cuda_graph_modules, job.train.recompute_modules or ("core_attn",)
    if granularity(job.train) != "selective":
        return
    drawn = (
        ("attn", "core_attn", "attention_dropout"),
        ("mlp", "mlp", "hidden_dropout"),
        ("moe", "moe", "hidden_dropout"),
    )
    for part, module, key in drawn:
        if getattr(job.model, key) and module in again and (not parts or part in parts):
            message = f"{module} is captured and recomputed, and would draw other numbers for model.{key}"
            yield Problem("train.recompute_modules", message, f"leave {module} out, or set model.{key}=0")


def _experts(job: Job) -> Iterator[Problem]:
    impl, parts = job.cuda_graph.cuda_graph_impl, set(job.cuda_graph.cuda_graph_modules)
    if not job.moe.num_experts:
        if named := sorted(part for part in parts if part.startswith("moe")):
            yield Problem(_PARTS, f"{', '.join(named)} without experts", "use attn and mlp")
        return
    if "moe" in parts and "moe_router" in parts:
        yield Problem(_PARTS, "moe holds moe_router", "name one of them")
    if "moe_preprocess" in parts and "moe_router" not in parts:
        yield Problem(_PARTS, "moe_preprocess goes with moe_router only", "add moe_router")
    counts_are_fixed = job.moe.moe_pad_expert_input_to_capacity
    everything = impl == "full_iteration" or not parts or "moe" in parts
    if everything and not counts_are_fixed:
        message = "experts take as many tokens as they are given, and a graph cannot ask how many"
        hint = (
            "use cuda_graph=local cuda_graph.cuda_graph_modules=[attn,moe_router], or "
            "moe.moe_expert_capacity_factor=... with moe.moe_pad_expert_input_to_capacity=true"
        )
        yield Problem(_PARTS, message, hint)
