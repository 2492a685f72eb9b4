"""Asks a declaration whether it can do what a job wants of it."""

from __future__ import annotations

from collections.abc import Sequence

from megaplug.errors import Problem
from megaplug.layers.registry.plugin import Plugin
from megaplug.layers.registry.store import missing_packages


def limits_problems(
    plugin: Plugin,
    *,
    key: str = "attention.name",
    attention_dropout: float = 0.0,
    context_parallel_size: int = 1,
    head_dim: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    packed_sequences: bool = False,
    attention_bias: bool = False,
    latent_attention: bool = False,
    sliding_window: bool = False,
    softmax_type: str = "vanilla",
    largest_scores: str = "",
    batch_invariant: bool = False,
    multi_token_prediction: bool = False,
    communication: str = "",
    mask: str = "causal",
) -> list[Problem]:
    """Everything that a job asks of a core attention and that its declaration excludes.

    Args:
        plugin: The declaration.
        key: Under which it is named.
        attention_dropout: Probability of dropping an attention weight.
        context_parallel_size: Over how many ranks a sequence is split.
        head_dim: Elements a head.
        dtype: ``fp64``, ``fp32``, ``bf16`` or ``fp16``; None leaves it open.
        device: ``cpu`` or ``cuda``; None, where it is not known yet, asks only what no device can do.
        packed_sequences: Whether documents in one row are kept apart.
        attention_bias: Whether a bias is added to the scores.
        latent_attention: Whether values have heads of another size than queries and keys.
        sliding_window: Whether a query reads only so many keys before it.
        softmax_type: A name of Megatron's.
        largest_scores: The argument of Megatron's that asks for the largest score; empty if none does.
        batch_invariant: Whether results may not depend on the other sequences of a batch.
        multi_token_prediction: Whether Megatron adds layers that predict further tokens.
        communication: The argument of Megatron's that says how ranks exchange a sequence; empty if none does.
        mask: A name of Megatron's ``AttnMaskType``.

    Returns:
        The problems, each under the configuration key that a user would change.
    """
    limits, what = plugin.limits, f"the {plugin.kind} {plugin.name!r}"
    problems: list[Problem] = []

    def refuse(where: str, message: str, hint: str, lacks: str = "") -> None:
        problems.append(Problem(where, f"{what} {message}", hint, lacks))

    if missing := missing_packages(plugin):
        refuse(
            key,
            f"needs {', '.join(missing)}, which is not installed",
            "install it or choose another",
            lacks=", ".join(missing),
        )
    if device is not None and device not in limits.devices:
        refuse(key, f"does not run on {device}", f"it runs on {_listed(limits.devices)}")
    # Only a device that can be had at all is worth a second complaint.
    devices = [name for name in limits.devices if device in (None, name)]
    if not devices:
        return problems
    if attention_dropout > 0 and not set(devices) & set(limits.dropout_devices):
        possible = _listed(limits.dropout_devices)
        hint = "set model.attention_dropout=0" + (f"; it can drop on {possible}" if possible else "")
        where = f" on {_listed(devices)}" if possible else ""
        refuse(
            "model.attention_dropout",
            f"has no dropout{where}; {attention_dropout} was asked",
            hint,
        )
    if context_parallel_size > 1 and not limits.context_parallel:
        refuse(
            "topology.cp",
            f"cannot split a sequence over {context_parallel_size} ranks",
            "attention=ring and ring_dilated can; or set topology.cp=1",
        )
    if packed_sequences and not limits.packed_sequences:
        refuse(key, "cannot keep packed documents apart", "leave megatron.reset_attention_mask off")
    if attention_bias and not limits.attention_bias:
        refuse(key, "takes no attention bias", "use a position embedding without one, such as rope")
    if latent_attention and not limits.latent_attention:
        refuse(
            key,
            "takes no heads of latent attention",
            "use attention=flash, or model.multi_latent_attention=false",
        )
    if sliding_window and not limits.sliding_window:
        refuse(
            key,
            "has no sliding window",
            "leave megatron.window_size out: every token is read then; attention=te has windows, on CUDA",
        )
    if softmax_type not in limits.softmax_types:
        refuse(
            "megatron.softmax_type",
            f"has no {softmax_type} softmax, and so no attention sinks",
            "leave it out; attention=local and te have it",
        )
    if largest_scores and not limits.largest_scores:
        refuse(
            f"megatron.{largest_scores}", "does not tell its largest score", "leave it out; attention=te does"
        )
    if batch_invariant and not limits.batch_invariant:
        refuse(
            "megatron.batch_invariant_mode",
            "does not promise results that do not depend on the batch",
            "leave it out; attention=te has a mode for it",
        )
    if multi_token_prediction and not limits.multi_token_prediction:
        refuse(
            "megatron.mtp_num_layers",
            "is not in layers of multi-token prediction: Megatron builds these with its own dense attention",
            "leave it out, or use attention=flash, local or te for all layers",
        )
    if communication and not limits.communication:
        refuse(
            f"megatron.{communication}",
            "does not heed it: how a sequence is exchanged is not to be chosen",
            "leave it out; attention=te has it",
        )
    if mask not in limits.masks:
        refuse(key, f"has no {mask} mask", f"it has: {_listed(limits.masks)}")
    if dtype is not None and not any(dtype in limits.dtypes.get(name, (dtype,)) for name in devices):
        possible = "; ".join(f"{name}: {_listed(limits.dtypes[name])}" for name in devices)
        refuse("precision", f"does not compute in {dtype}", f"possible are {possible}")
    if head_dim is not None:
        heads = "model.kv_channels"
        largest = max(limits.max_head_dim.get(name, head_dim) for name in devices)
        if head_dim > largest:
            refuse(
                heads,
                f"takes heads of at most {largest} elements; {head_dim} were asked",
                "use more, smaller heads",
            )
        multiple = min(limits.head_dim_multiple.get(name, 1) for name in devices)
        if head_dim % multiple:
            nearest = max(multiple, round(head_dim / multiple) * multiple)
            refuse(
                heads,
                f"takes heads of a multiple of {multiple} elements; {head_dim} were asked",
                f"use {nearest}",
            )
    return problems


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
