"""What a declaration of a layer says: its name, its target, its parameters, its limits, its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megaplug.errors import Problem
from megaplug.layers.registry.sequence_cost import SequenceCost, SequenceSizes

CORE_ATTENTION = "core_attention"
EXPERTS = "experts"


@dataclass(frozen=True)
class Need:
    """What one choice of a parameter asks for.

    Attributes:
        devices: Where it runs.
        dtypes: The number formats that it computes in; empty if in all.
        modules: Python modules that must be there.
        package: What brings them, as a person installs it.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    package: str = ""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a plugin, as a user may set it under ``<group>.params``.

    Attributes:
        type: What it has to be; an ``int`` is taken where a ``float`` is asked for.
        default: Its value when the user says nothing; None is possible only where it is the default.
        doc: One line for the user.
        choices: The values that are possible; empty if any value of the type is.
        needs: What single choices ask of device, number format and installed packages; the others run
            wherever the plugin does.
    """

    type: type
    default: Any
    doc: str
    choices: tuple[Any, ...] = ()
    needs: Mapping[Any, Need] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What a layer can do. Devices are ``cpu`` and ``cuda``, dtypes ``fp64 fp32 bf16 fp16``.

    Of experts only ``devices``, ``dtypes`` and ``requires`` are asked.

    Attributes:
        devices: Where it runs.
        dtypes: In which number formats, for each device.
        dropout_devices: Where it can drop attention weights; empty if nowhere.
        context_parallel: Whether the sequence may be split over ranks.
        packed_sequences: Whether several documents may share a row without attending to each other.
        attention_bias: Whether an additive bias on the scores is taken.
        latent_attention: Whether heads of values may have another size than those of queries and keys.
        sliding_window: Whether a query may be kept from keys that lie far back (Megatron's ``window_size``).
        softmax_types: The kinds of softmax, in the names of Megatron's ``softmax_type``; all but ``vanilla``
            have a sink for attention.
        largest_scores: Whether the largest score is told (``qk_clip``, ``log_max_attention_logit``).
        batch_invariant: Whether a sequence's result may be asked not to depend on the others of its batch.
        multi_token_prediction: Whether Megatron's layers of multi-token prediction compute the same, which it
            builds with its own dense attention whatever the plugin is.
        communication: Whether ``cp_comm_type`` and ``hierarchical_context_parallel_sizes`` are heeded: how
            ranks that share a sequence exchange it.
        masks: The kinds of mask, in the names of Megatron's ``AttnMaskType``.
        max_head_dim: The largest head dimension for each device; a missing device has no limit.
        head_dim_multiple: What a head's dimension must be divisible by, for each device.
        requires: Top-level Python packages that must be installed.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropout_devices: tuple[str, ...] = ()
    context_parallel: bool = False
    packed_sequences: bool = False
    attention_bias: bool = False
    latent_attention: bool = False
    sliding_window: bool = False
    softmax_types: tuple[str, ...] = ("vanilla",)
    largest_scores: bool = False
    batch_invariant: bool = False
    multi_token_prediction: bool = False
    communication: bool = False
    masks: tuple[str, ...] = ("causal",)
    max_head_dim: Mapping[str, int] = field(default_factory=dict)
    head_dim_multiple: Mapping[str, int] = field(default_factory=dict)
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionSizes:
    """What the cost of one attention layer on one rank depends on; heads are those of the rank.

    ``v_head_dim`` is the size of a value's head where it differs from a key's.
    """

    batch_size: int
    seq_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_size: int
    v_head_dim: int | None = None

    @property
    def summed_head_dim(self) -> int:
        """Channels of a key and a value together."""
        return self.head_dim + (self.v_head_dim or self.head_dim)


@dataclass(frozen=True)
class Plugin:
    """A declaration of one layer.

    Attributes:
        name: What a user writes in a config.
        kind: What it takes the place of: ``core_attention`` or ``experts``.
        target: ``module:attribute`` of the class; imported only when a model is built.
        doc: One line for the user.
        parameters: What the user may set, by name; handed to the class as keywords.
        limits: What it can do.
        forward_flops: Floating-point operations of one forward pass (a multiply-add counts two).
        saved_bytes_per_token: Bytes kept for the backward pass, for each token of the batch.
        sequence_cost: What the fullest of the ranks that share a sequence computes and receives in one layer,
            given the user's parameters; None counts as dense.
        check_params: What is wrong with a user's parameters together, given them and the key they stand
            under; asked when each for itself is of the right type.
        notes: What a user may not have meant by parameters that are right, a line each, given the layer's
            sizes, the parameters and the key they stand under.
        reach: How many tokens back a layer reads at most, itself included, given the sequence's tokens and
            the user's parameters; None reads all.
    """

    name: str
    kind: str
    target: str
    doc: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    forward_flops: Callable[[AttentionSizes], int] | None = None
    saved_bytes_per_token: Callable[[AttentionSizes], int] | None = None
    sequence_cost: Callable[[SequenceSizes, Mapping[str, Any]], SequenceCost] | None = None
    check_params: Callable[[Mapping[str, Any], str], Iterable[Problem]] | None = None
    notes: Callable[[SequenceSizes, Mapping[str, Any], str], Iterable[str]] | None = None
    reach: Callable[[int, Mapping[str, Any]], int] | None = None
