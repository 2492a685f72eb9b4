"""Which kernels a run computes with, read from the model and the optimizer that Megatron has built.

Nothing here is concluded from what is installed or asked for: the names are those of the objects themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.models.common.language_module import language_module
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch.optim.optimizer import _default_to_fused_or_foreach

from megaplug.layers import chunked_loss, cross_entropy
from megaplug.layers.experts.stacked import StackedLinear
from megaplug.runtime import fused_adam

# By the first words of a module's name, longest first.
_MAKERS = {
    "megatron.core.extensions.transformer_engine": "Transformer Engine",
    "transformer_engine": "Transformer Engine",
    "megatron": "Megatron",
    "megaplug": "megaplug",
    "apex": "Apex",
    "amp_C": "Apex",
    "torch": "torch",
}
# Layers of one kind of attention that are named.
_SHOWN_LAYERS = 4
_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def watch(
    training: Any, tell: Callable[[dict[str, str]], None], loss_chunk_tokens: int | None = None
) -> None:
    """Tell the kernels as soon as model and optimizer are built.

    Args:
        training: ``megatron.training.training``, whose ``setup_model_and_optimizer`` is followed.
        tell: Called on every rank with :func:`kernels`.
        loss_chunk_tokens: What ``batch.forward_step`` is given.
    """
    real_setup = training.setup_model_and_optimizer

    @functools.wraps(real_setup)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        answer = real_setup(*args, **kwargs)
        tell(kernels(answer[0], answer[1], loss_chunk_tokens))
        return answer

    training.setup_model_and_optimizer = setup_model_and_optimizer


def kernels(
    model: list[torch.nn.Module], optimizer: Any, loss_chunk_tokens: int | None = None
) -> dict[str, str]:
    """The kernel of each part of a training step.

    Args:
        model: The chunks of this rank's pipeline stage.
        optimizer: Megatron's optimizer, or None.
        loss_chunk_tokens: What ``batch.forward_step`` is given.

    Returns:
        ``attention``, ``norm``, ``linear``, ``cross_entropy``, ``weight_gradients``, ``optimizer`` and
        ``clipping``, each as ``<whose> <what>``; ``experts`` where a layer has some.
    """
    modules = [(name, module) for chunk in model for name, module in chunk.named_modules()]
    return {
        "attention": _attentions(model),
        "norm": _joined(_norms(modules)),
        "linear": _joined(_named(type(module)) for name, module in modules if _is_linear(name, module)),
        **_experts(modules),
        "cross_entropy": _cross_entropy(modules, loss_chunk_tokens),
        "weight_gradients": _weight_gradients(modules),
        **_optimizer_kernels(optimizer),
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none on this stage"


def _named(kernel: Any) -> str:
    """Whose it is and what it is called, of a class, a function or a compiled extension's function."""
    module = getattr(kernel, "__module__", None) or ""
    maker = next((maker for start, maker in _MAKERS.items() if f"{module}.".startswith(f"{start}.")), module)
    return f"{maker} {getattr(kernel, '__qualname__', type(kernel).__qualname__)}".strip()


def _attentions(model: list[torch.nn.Module]) -> str:
    """Every kind on this stage; of several, each with its layers, counted from 1 in the whole model."""
    layers: dict[str, list[int]] = {}
    for chunk in model:
        parts = dict(chunk.named_modules())
        for name, module in parts.items():
            if _last(name) == "core_attention":
                holder = parts[name.rpartition(".")[0]]
                layers.setdefault(_attention(module), []).append(getattr(holder, "layer_number", 0))
    if len(layers) < 2:
        return _joined(layers)
    return _joined(f"{kind} in {_numbered(numbers)}" for kind, numbers in layers.items())


def _numbered(layers: list[int]) -> str:
    """``layer 3``, or ``layers 1, 3, 5 and 13 more``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    shown = ", ".join(map(str, sorted(layers)[:_SHOWN_LAYERS]))
    more = f" and {len(layers) - _SHOWN_LAYERS} more" if len(layers) > _SHOWN_LAYERS else ""
    return f"layers {shown}{more}"


def _attention(module: torch.nn.Module) -> str:
    name = _named(type(module))
    if describe := getattr(module, "kernel_name", None):
        return f"{name} ({describe()})"
    return name


def _is_linear(name: str, module: torch.nn.Module) -> bool:
    return _last(name) in _LINEARS and not isinstance(module, StackedLinear)


def _experts(modules: list[tuple[str, torch.nn.Module]]) -> dict[str, str]:
    """Each kind on this stage; nothing where all layers are dense."""
    layers = [module for _, module in modules if isinstance(module, BaseMoELayer)]
    names = []
    for layer in layers:
        name = _named(type(layer.experts))
        described = getattr(layer.experts, "kernel_name", None)
        names.append(f"{name} ({described()})" if described else name)
    return {"experts": _joined(names)} if names else {}


def _norms(modules: list[tuple[str, torch.nn.Module]]) -> Iterator[str]:
    for name, module in modules:
        if "norm" in _last(name) and not isinstance(module, IdentityOp):
            yield _named(type(module))
        elif _last(name) in _LINEARS and "LayerNorm" in type(module).__name__:
            yield f"{_named(type(module))} (one with the linear layer)"


def _cross_entropy(modules: list[tuple[str, torch.nn.Module]], chunk: int | None) -> str:
    """What ``batch.forward_step`` chooses: ours, or what Megatron's model looks up where it is to fuse."""
    for _, module in modules:
        method = getattr(type(module), "compute_language_model_loss", None)
        if method is None:
            continue
        if method is not language_module.LanguageModule.compute_language_model_loss:
            return _named(method)
        config: Any = module.config
        if not config.cross_entropy_loss_fusion and chunk is not None:
            return f"{_named(chunked_loss.chunked_cross_entropy)} (of {chunk:,} tokens at a time)"
        if not config.cross_entropy_loss_fusion:
            return _named(cross_entropy.vocab_parallel_cross_entropy)
        if config.cross_entropy_fusion_impl == "te":
            return f"Transformer Engine {language_module.te_parallel_cross_entropy.__name__}"
        return _named(language_module.fused_vocab_parallel_cross_entropy)
    return "none on this stage"


def _weight_gradients(modules: list[tuple[str, torch.nn.Module]]) -> str:
    fused = []
    for name, module in modules:
        if isinstance(module, StackedLinear):
            fused.append(module.weight_gradients())
            continue
        if _last(name) not in _LINEARS:
            continue
        if getattr(module, "fuse_wgrad_accumulation", False):
            fused.append("Transformer Engine's matrix product adds them to the buffer")
        elif getattr(module, "gradient_accumulation_fusion", False):
            fused.append("Apex fused_weight_gradient_mlp_cuda")
        else:
            fused.append("torch matmul, added to the buffer afterwards")
    return _joined(fused)


def _optimizer_kernels(optimizer: Any) -> dict[str, str]:
    if optimizer is None:
        return {"optimizer": "none", "clipping": "none"}
    parts = [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part is not None]
    names = _joined(name for part in parts for name in _optimizers(getattr(part, "optimizer", None)))
    if not getattr(optimizer.config, "clip_grad", 0):
        return {"optimizer": names, "clipping": "none (optimizer.clip_grad=0)"}
    both = (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl)
    return {"optimizer": names, "clipping": _joined(map(_named, both))}


def _optimizers(optimizer: Any) -> Iterator[str]:
    if optimizer is None:
        return
    inner = getattr(optimizer, "sub_optimizers", None)
    if inner:  # Megatron's, for moments that lie in the host's memory
        yield from (f"{name} in {_named(type(optimizer))}" for part in inner for name in _optimizers(part))
        return
    name = _named(type(optimizer))
    yield f"{name} ({_way(optimizer)})" if type(optimizer).__module__.startswith("torch.optim") else name


def _way(optimizer: torch.optim.Optimizer) -> str:
    """How torch walks over the parameters, by its own rule where nothing was asked for."""
    group = optimizer.param_groups[0]
    fused, foreach = group.get("fused") or fused_adam.is_chosen_for(optimizer) or None, group.get("foreach")
    if fused is None and foreach is None:
        fused, foreach = _default_to_fused_or_foreach(group["params"], False, False)
    return "fused" if fused else "foreach" if foreach else "one parameter after the other"
