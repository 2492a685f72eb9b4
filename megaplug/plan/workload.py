"""One training step in plain numbers: all of a job that decides its memory, its time and its cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from megaplug.job.attention import attention_layers
from megaplug.job.checks import job_batch
from megaplug.job.core_attention import CoreAttention
from megaplug.job.experts import are_grouped
from megaplug.job.packages import resolve_backend
from megaplug.job.recompute import granularity, method_and_layers
from megaplug.job.schema import Job
from megaplug.topology import Batch, ModelShape, Topology


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, and what matrix products are computed in. The defaults are fp32; see `of`.

    Attributes:
        parameter: Of a weight and of an activation.
        gradient: Of a gradient as it is summed over microbatches.
        optimizer: Of all that the optimizer keeps of a parameter from step to step.
        for_step: Of what it makes of a parameter for its step alone: fp32 copies of narrower gradients.
        compute: ``fp32``, ``bf16``, ``fp16`` or ``fp8``: a key of ``Cluster.peak_tflops``.
    """

    parameter: int = 4
    gradient: int = 4
    optimizer: int = 8
    compute: str = "fp32"
    for_step: int = 0

    @classmethod
    def of(
        cls,
        *,
        bf16: bool = False,
        fp16: bool = False,
        fp8: bool = False,
        gradients_in_fp32: bool = True,
        moments: int = 2,
    ) -> Precision:
        """Adam has two moments, SGD with momentum one, each fp32; bf16 adds an fp32 copy of the weights.

        Gradients in bf16 or fp16 are copied to fp32 for the step. That makes 18 bytes a parameter in bf16, 20
        in fp16 (4 of them for the step) and 16 in fp32 with Adam before anything is cut (Megatron's
        ``docs/user-guide/features/dist_optimizer.md``).
        """
        if fp16:
            return cls(2, 2, 4 + 4 * moments, "fp16", for_step=4)
        if bf16 or fp8:
            compute = "fp8" if fp8 else "bf16"
            if gradients_in_fp32:
                return cls(2, 4, 4 + 4 * moments, compute)
            return cls(2, 2, 4 + 4 * moments, compute, for_step=4)
        return cls(4, 4, 4 * moments, "fp32")

    @property
    def peak_format(self) -> str:
        """The number format whose peak MFU is a part of: bf16 for fp8, in which only part of a step runs."""
        return "bf16" if self.compute == "fp8" else self.compute


@dataclass(frozen=True)
class Recompute:
    """Megatron's activation recompute.

    Attributes:
        granularity: ``full``, ``selective`` or None.
        method: With ``full``, ``uniform`` or ``block``.
        num_layers: With ``full``, the layers of a chunk or of a stage.
        modules: With ``selective``. ``core_attn`` frees nothing: flash attention keeps no scores.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int | None = None
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sharing:
    """What data-parallel ranks share out, and what is kept on the CPU.

    Attributes:
        zero: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights.
        optimizer_on_cpu: Part of the optimizer's state that is offloaded, 0 to 1.
        layers_on_cpu: Layers whose activations are offloaded.
    """

    zero: int = 1
    optimizer_on_cpu: float = 0.0
    layers_on_cpu: int = 0


@dataclass(frozen=True)
class Overlaps:
    """Which communication runs beside computation.

    Attributes:
        grad_reduce: Gradients of a bucket beside the backward pass of the next.
        param_gather: Weights of a bucket beside the forward pass of the one before.
        p2p: Between pipeline stages.
        tp: Over tensor parallelism, in Transformer Engine's chunks.
        tp_backward: What tensor parallelism sends in backward beside products of the same linear layer, as
            Megatron and Transformer Engine do unasked.
        ep: Tokens to experts beside another microbatch's layers (``overlap_moe_expert_parallel_comm``).
    """

    grad_reduce: bool = True
    param_gather: bool = True
    p2p: bool = True
    tp: bool = False
    tp_backward: bool = True
    ep: bool = False


@dataclass(frozen=True)
class Routing:
    """How tokens find and reach their experts.

    Attributes:
        in_fp32: Whether the router's logits and probabilities are wider than activations.
        gathers: Whether every rank of an expert group gets all tokens (``allgather``), or only those of its
            experts (``alltoall``).
        balances: Whether a loss keeps the router balanced, for which it works out scores again.
        drops: Whether experts take no more than their capacity.
    """

    in_fp32: bool = False
    gathers: bool = False
    balances: bool = True
    drops: bool = False


@dataclass(frozen=True)
class Implementation:
    """Whose code computes a layer and the loss: what of it is kept for backward differs.

    Attributes:
        backend: ``native`` (torch's kernels and Megatron's linear layers) or ``te`` (Transformer Engine).
        device: ``cuda`` or ``cpu``, where activation functions are not fused.
        fused_loss: Whether the logits become their own gradient (ours); False for Megatron's cross-entropy,
            which keeps their softmax in fp32.
        loss_chunk: Tokens whose logits exist at once (ours); None for those of a whole microbatch.
        loss_gradient_in_bf16: Whether Megatron's is its fused one, whose gradient is in bf16 first, then
            in the logits' own type.
        grouped_experts: Whether all experts of a rank are one matrix product.
        hidden_dropout: Probability; where it is not 0 the masks are kept.
        attention_dropout: Likewise, of unfused attention's scores.
        fused_softmax: Whether unfused attention has a kernel of Apex's or Transformer Engine's for mask and
            softmax, which keeps its result alone.
        softmax_in_fp32: Whether it computes a softmax of narrower scores in fp32 where it has no such kernel.
        tokens_sent_once: Whether a token with several experts on a rank goes there once (DeepEP, HybridEP),
            and not with every copy (Megatron's ``alltoall``).
    """

    backend: str = "native"
    device: str = "cuda"
    fused_loss: bool = True
    loss_chunk: int | None = None
    loss_gradient_in_bf16: bool = False
    grouped_experts: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    fused_softmax: bool = False
    softmax_in_fp32: bool = True
    tokens_sent_once: bool = False


@dataclass(frozen=True)
class Workload:
    """A legal job, as the models of memory and of time see it.

    Attributes:
        topology: The rank grid.
        shape: The model's sizes.
        batch: The batch sizes.
        precision: Bytes of a parameter, its gradient and its optimizer state.
        recompute: What is computed again in backward.
        sharing: What is cut over data-parallel ranks or offloaded.
        overlaps: Which communication is hidden where it can be.
        fused_attention: Whether attention keeps no scores (flash); False for Megatron's unfused one.
        core_attention: What each layer's attention is; None: all dense, over ranks Transformer Engine's.
        code: Whose code computes the layers.
        routing: How tokens reach their experts.
    """

    topology: Topology
    shape: ModelShape
    batch: Batch
    precision: Precision = field(default_factory=Precision)
    recompute: Recompute = field(default_factory=Recompute)
    sharing: Sharing = field(default_factory=Sharing)
    overlaps: Overlaps = field(default_factory=Overlaps)
    fused_attention: bool = True
    core_attention: CoreAttention | None = None
    code: Implementation = field(default_factory=Implementation)
    routing: Routing = field(default_factory=Routing)

    # The two that are asked for most, and that are long columns in a search.
    @functools.cached_property
    def num_microbatches(self) -> int:
        """Forward passes of a rank in one step."""
        return self.batch.global_batch_size // (self.batch.micro_batch_size * self.topology.dp)

    @functools.cached_property
    def tokens(self) -> int:
        """Of one microbatch on a rank, before sequence parallelism cuts them."""
        return self.shape.seq_length * self.batch.micro_batch_size // self.topology.cp

    @property
    def sequence_cut(self) -> int:
        """By how much sequence parallelism cuts what lies between attention and MLP."""
        return self.topology.tp if self.topology.sequence_parallel else 1

    @property
    def tokens_per_step(self) -> int:
        """Of the whole world in one step of the optimizer."""
        return self.shape.seq_length * self.batch.global_batch_size


def precision_of(job: Job) -> Precision:
    """The number formats of a job."""
    return Precision.of(
        bf16=job.precision.bf16,
        fp16=job.precision.fp16,
        fp8=job.precision.fp8_format is not None,
        gradients_in_fp32=not job.precision.grad_reduce_in_bf16,
    )


def workload_of(job: Job, topology: Topology, shape: ModelShape) -> Workload:
    """The workload of a job that has passed its checks.

    Args:
        job: The job.
        topology: Its grid.
        shape: Its model, with the vocabulary that it will have.
    """
    train, optimizer, overlap = job.train, job.optimizer, job.overlap
    on_cpu = job.device == "cpu" or (job.device == "auto" and job.cluster.device == "cpu")
    device = "cpu" if on_cpu else "cuda"
    backend = resolve_backend(job.backend, device, job.kernels.te)
    attention = CoreAttention.of(job)
    return Workload(
        topology,
        shape,
        job_batch(job),
        precision=precision_of(job),
        recompute=Recompute(
            granularity(train), *method_and_layers(train), modules=tuple(train.recompute_modules or ())
        ),
        sharing=Sharing(
            zero=job.topology.zero,
            optimizer_on_cpu=optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0,
            layers_on_cpu=train.cpu_offloading_num_layers,
        ),
        overlaps=Overlaps(
            grad_reduce=overlap.overlap_grad_reduce is not False,
            param_gather=overlap.overlap_param_gather is not False,
            p2p=overlap.overlap_p2p_comm is not False,
            tp=overlap.tp_comm_overlap is True,
            ep=bool(job.megatron.get("overlap_moe_expert_parallel_comm")),
        ),
        # Where some layers keep scores, all are counted so.
        fused_attention="local" not in attention_layers(job.attention).names,
        # Counted ranks part the columns of a search, which nothing needs where all is dense.
        core_attention=None if attention.is_dense else attention,
        code=Implementation(
            backend=backend,
            device=device,
            fused_loss=not job.megatron.get("cross_entropy_loss_fusion"),
            loss_chunk=train.loss_chunk_tokens,
            loss_gradient_in_bf16=bool(job.megatron.get("cross_entropy_loss_fusion"))
            and not job.precision.bf16,
            grouped_experts=are_grouped(job, backend),
            hidden_dropout=job.model.hidden_dropout,
            attention_dropout=job.model.attention_dropout,
            fused_softmax=backend == "te" or job.kernels.apex == "require",
            softmax_in_fp32=job.precision.attention_softmax_in_fp32,
        ),
        routing=Routing(
            in_fp32=job.moe.moe_router_dtype is not None,
            gathers=job.moe.moe_token_dispatcher_type == "allgather",
            balances=job.moe.moe_router_load_balancing_type != "none",
            drops=job.moe.moe_expert_capacity_factor is not None,
        ),
    )
