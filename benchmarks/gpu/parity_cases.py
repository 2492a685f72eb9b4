"""Ways of training that need a GPU, each with the plain way that it has to agree with.

All go on from one checkpoint for five steps, on one GPU (NCCL takes no two ranks on one). Add a
:class:`Case` here; ``run_parity_cases.py`` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL = ("train.recompute_granularity=full", "train.recompute_method=uniform", "train.recompute_num_layers=1")


@dataclass(frozen=True)
class Case:
    """One way of training.

    Attributes:
        name: What it is called.
        words: Its overrides.
        tolerance: Largest relative difference of loss and gradient norm over all steps.
        why: Where that tolerance comes from.
        like: Overrides of the plain run that it is compared with; they hold for the case, too.
        loads: Whether both go on from the common checkpoint, and not from scratch.
        needs: Modules without which the case is skipped.
        on_cpu: Whether the CPU can stand in for it in a rehearsal.
    """

    name: str
    words: tuple[str, ...]
    tolerance: float
    why: str
    like: tuple[str, ...] = ("precision=bf16",)
    loads: bool = True
    needs: tuple[str, ...] = ()
    on_cpu: bool = False


_SAME_KERNELS = "the same kernels on the same numbers; atomics in backward passes may add in another order"
_OTHER_BLOCKS = "the same attention, perhaps by another kernel, put together in fp32"
_BF16_GRADIENTS = "FSDP reduces gradients in bf16, the plain way in fp32"
_OTHER_ADAM = "torch's Adam of the CPU on the same fp32 numbers"
_TE = ("precision=bf16", "backend=te", "attention=te")

CASES = (
    Case("full_recompute", FULL, 1e-3, _SAME_KERNELS, on_cpu=True),
    Case(
        "selective_recompute",
        ("train.recompute_granularity=selective", "train.recompute_modules=[core_attn,mlp]"),
        1e-3,
        _SAME_KERNELS,
        on_cpu=True,
    ),
    Case(
        "ring_on_one_rank",
        ("attention=ring",),
        3e-2,
        _OTHER_BLOCKS,
        on_cpu=True,
    ),
    Case(
        "ring_dilated_of_one_segment",
        (
            "attention=ring_dilated",
            "attention.params.segment_lengths=[131072]",
            "attention.params.dilation_rates=[1]",
        ),
        3e-2,
        _OTHER_BLOCKS,
        on_cpu=True,
    ),
    Case("cuda_graph_local", ("cuda_graph=local",), 1e-3, _SAME_KERNELS),
    Case("cuda_graph_full_iteration", ("cuda_graph=full_iteration",), 1e-3, _SAME_KERNELS),
    Case(
        "transformer_engine",
        ("backend=te", "attention=te"),
        3e-2,
        "other kernels in bf16, whose roundings add up in the gradient norm",
        ("precision=bf16", "backend=native"),
        needs=("transformer_engine",),
    ),
    Case(
        "transformer_engines_optimizer",
        ("kernels.te=require",),
        1e-3,
        "another Adam on the same fp32 numbers",
        ("precision=bf16", "backend=native", "kernels.te=off"),
        needs=("transformer_engine",),
    ),
    Case("zero0", ("topology.zero=0",), 1e-3, _SAME_KERNELS, on_cpu=True),
    Case("torch_fsdp2", ("topology.zero=3", "topology.fsdp=torch"), 3e-2, _BF16_GRADIENTS, on_cpu=True),
    # Megatron-FSDP has a checkpoint format of its own, so it begins from its seed.
    Case("megatron_fsdp_zero2", ("topology.zero=2",), 3e-2, _BF16_GRADIENTS, loads=False, needs=("einops",)),
    Case("megatron_fsdp_zero3", ("topology.zero=3",), 3e-2, _BF16_GRADIENTS, loads=False, needs=("einops",)),
    Case("optimizer_on_cpu", ("optimizer.optimizer_cpu_offload=true",), 1e-3, _OTHER_ADAM),
    Case(
        "half_of_the_optimizer_on_cpu_overlapped",
        (
            "optimizer.optimizer_cpu_offload=true",
            "optimizer.optimizer_offload_fraction=0.5",
            "optimizer.overlap_cpu_optimizer_d2h_h2d=true",
        ),
        1e-3,
        _OTHER_ADAM,
    ),
    Case(
        "activations_on_cpu",
        ("train.cpu_offloading_num_layers=1",),
        1e-3,
        _SAME_KERNELS,
        _TE,
        needs=("transformer_engine",),
    ),
    Case(
        "modules_on_cpu",
        ("train.fine_grained_activation_offloading=true", "train.offload_modules=[core_attn,attn_proj]"),
        1e-3,
        _SAME_KERNELS,
        _TE,
        needs=("transformer_engine",),
    ),
    Case(
        "fp16",
        # Below the scale at which the first steps would overflow and be skipped.
        ("precision.bf16=false", "precision.fp16=true", "precision.initial_loss_scale=256"),
        3e-2,
        "fp16 has three bits more than bf16, whose roundings add up in the gradient norm",
        on_cpu=True,
    ),
    Case(
        "fp8_delayed",
        ("precision.fp8_format=hybrid",),
        2e-1,
        "FP8 keeps three bits of a number, and its first step has no history of scales",
        _TE,
        needs=("transformer_engine",),
    ),
)
