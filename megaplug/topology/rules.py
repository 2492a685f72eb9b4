"""Every rule that Megatron-core 0.19 holds a mesh, a model and a batch to, judged before a rank starts.

Sources: ``initialize_model_parallel`` (the grids), ``validate_args`` in ``training/arguments.py``,
``__post_init__`` of ``TransformerConfig`` and ``ModelParallelConfig``, ``schedules.py`` (interleaving),
``moe_layer.py``, and the ``divide`` calls of the tensor-parallel layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem, UserError
from megaplug.topology.mesh import Topology, mesh_problems
from megaplug.topology.shape import Batch, ModelShape
from megaplug.topology.stages import layer_problems

POSITIVE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
)


def violations(
    topology: Topology, shape: ModelShape, batch: Batch, *, overlap_p2p_comm: bool = True
) -> list[Problem]:
    """Everything that is wrong, at once, each with the numbers that make it so.

    Args:
        topology: The mesh, as `resolve` returns it. What `resolve` itself has reported is not repeated.
        shape: The model's sizes.
        batch: The batch sizes.
        overlap_p2p_comm: Megatron's default; ``False`` with ``--no-overlap-p2p-communication``.
    """
    wrong_sizes = [
        Problem(f"model.{key}", f"must be at least 1, but is {getattr(shape, key)}")
        for key in (*POSITIVE, "vocab_size", "make_vocab_size_divisible_by")
        if getattr(shape, key) < 1
    ]
    if wrong_sizes:
        return wrong_sizes
    return [
        *mesh_problems(topology),
        *tensor_problems(topology, shape),
        *layer_problems(topology, shape.num_layers),
        *sequence_problems(topology, shape),
        *expert_problems(topology, shape),
        *schedule_problems(topology, batch, overlap_p2p_comm),
    ]


def tensor_problems(topology: Topology, shape: ModelShape) -> Iterator[Problem]:
    """What tensor parallelism divides: heads, KV groups, the QKV projection, the MLP."""
    tp, heads, groups = topology.tp, shape.num_attention_heads, shape.num_query_groups
    if shape.kv_channels is None and shape.hidden_size % heads:
        yield Problem(
            "model.num_attention_heads",
            f"hidden_size {shape.hidden_size} is not a multiple of {heads} heads and kv_channels is not set",
            "set model.kv_channels, or a number of heads that divides hidden_size",
        )
    if heads % groups and not shape.multi_latent_attention:
        yield Problem(
            "model.num_query_groups",
            f"{heads} attention heads cannot be shared by {groups} KV groups",
            f"use a divisor of {heads}: {_near_divisors(heads, groups)}",
        )
    if heads % tp:
        yield Problem(
            "topology.tp",
            f"{heads} attention heads are not a multiple of tp {tp}",
            f"tensor-parallel sizes that fit {heads} heads and {groups} KV groups: {_tp_sizes(shape, tp)}",
        )
    if shape.multi_latent_attention:
        yield from _latent_problems(topology, shape)
    elif groups % tp and tp % groups:
        yield Problem(
            "topology.tp",
            f"num_query_groups {groups} must be a multiple or a divisor of tp {tp}",
            f"tensor-parallel sizes that fit {heads} heads and {groups} KV groups: {_tp_sizes(shape, tp)}; "
            f"or another model.num_query_groups, such as {_near_divisors(heads, tp, of=tp)}",
        )
    elif heads % tp == 0 and (shape.query_size + 2 * shape.key_size) % tp:
        yield Problem(
            "topology.tp",
            f"QKV has {shape.query_size} + 2 x {shape.key_size} channels, no multiple of tp {tp}",
            "use an even kv_channels or a smaller topology.tp",
        )
    if not all(_pattern(shape)[1]) and shape.ffn_hidden_size % tp:
        yield Problem(
            "topology.tp",
            f"ffn_hidden_size {shape.ffn_hidden_size} is not a multiple of tp {tp}",
            f"use model.ffn_hidden_size={-(-shape.ffn_hidden_size // tp) * tp} or a tp that divides it",
        )


def _latent_problems(topology: Topology, shape: ModelShape) -> Iterator[Problem]:
    """Megatron's column-parallel linear layers make the latents."""
    tp = topology.tp
    if tp > 1 and not topology.sequence_parallel:
        # finalize_model_grads takes every q_layernorm for one of each rank's own heads.
        yield Problem(
            "topology.sequence_parallel",
            f"latent attention with tp {tp} needs sequence parallelism; Megatron accepts it without and then "
            "sums gradients of its norms that are whole already",
            "set topology.sequence_parallel=true",
            megatron_accepts=True,
        )
    keys_values = shape.kv_lora_rank + shape.qk_pos_emb_head_dim
    for key, size, what in (
        ("q_lora_rank", shape.q_lora_rank or 0, "q_lora_rank"),
        ("kv_lora_rank", keys_values, "kv_lora_rank + qk_pos_emb_head_dim ="),
    ):
        if size % tp:
            yield Problem(
                f"model.{key}", f"{what} {size} is not a multiple of tp {tp}", "use a tp that divides it"
            )


def sequence_problems(topology: Topology, shape: ModelShape) -> Iterator[Problem]:
    """What context and sequence parallelism cut the sequence into."""
    tp, cp, tokens = topology.tp, topology.cp, shape.seq_length
    if cp > 1 and tokens % (2 * cp):
        yield Problem(
            "topology.cp",
            f"seq_length {tokens} is not a multiple of 2 x cp = {2 * cp} "
            "(two chunks a rank: Megatron's rule for every layout of tokens)",
            f"use model.seq_length={-(-tokens // (2 * cp)) * 2 * cp} or another cp",
        )
    if topology.sequence_parallel and tp == 1:
        yield Problem(
            "topology.sequence_parallel",
            "sequence parallelism needs tp > 1, but tp is 1",
            "set topology.sequence_parallel=false, or topology.tp=2",
        )
    if topology.sequence_parallel and tokens % (cp * tp):
        step = cp * tp if cp == 1 else 2 * cp * tp
        yield Problem(
            "topology.sequence_parallel",
            f"sequence parallelism cuts seq_length {tokens} / cp {cp} by tp {tp}, and "
            f"{tokens} is not a multiple of {cp * tp}",
            f"use model.seq_length={-(-tokens // step) * step}, or topology.sequence_parallel=false",
        )
    if shape.is_moe and tp > 1 and not topology.sequence_parallel:
        yield Problem(
            "topology.sequence_parallel",
            f"experts with tp {tp} need sequence parallelism (else Megatron's MoE layer refuses to train)",
            "set topology.sequence_parallel=true",
        )


def expert_problems(topology: Topology, shape: ModelShape) -> Iterator[Problem]:
    """What expert parallelism divides, and what Megatron's MoE layer refuses."""
    ep, etp, experts = topology.ep, topology.etp, shape.num_experts
    if not experts:
        if ep > 1:
            yield Problem(
                "topology.ep", f"ep {ep} needs a model with experts", "set topology.ep=1, or moe.num_experts"
            )
        return
    if experts % ep:
        yield Problem(
            "topology.ep",
            f"{experts} experts are not a multiple of ep {ep}",
            f"expert-parallel sizes that fit: {_near_divisors(experts, ep)}",
        )
    if not 1 <= shape.moe_router_topk <= experts:
        yield Problem(
            "moe.moe_router_topk",
            f"{shape.moe_router_topk} of {experts} experts cannot be chosen",
            f"1 to {experts} can be, such as moe.moe_router_topk={min(2, experts)}",
        )
    if shape.moe_router_topk == 1 and shape.moe_router_pre_softmax is False:
        yield Problem(
            "moe.moe_router_topk",
            "with one expert a token the softmax over the chosen ones is constant: the router cannot learn",
            "set moe.moe_router_pre_softmax=true",
        )
    if shape.expert_ffn_size % etp:
        yield Problem(
            "topology.etp",
            f"the experts' ffn size {shape.expert_ffn_size} is not a multiple of etp {etp}",
            "set topology.etp=1, or a size that divides it",
        )
    if shape.add_bias_linear and etp > 1:
        yield Problem(
            "topology.etp",
            f"experts with biases need etp 1, but it is {etp}",
            "set model.add_bias_linear=false",
        )
    shared = shape.moe_shared_expert_intermediate_size
    if shared is not None:
        if shared < 1 or shared % topology.tp:
            yield Problem(
                "moe.moe_shared_expert_intermediate_size",
                f"{shared} is not a positive multiple of tp {topology.tp}",
                "use null for no shared expert, or a multiple of tp",
            )
        if shape.add_bias_linear:
            yield Problem(
                "moe.moe_shared_expert_intermediate_size",
                "Megatron's shared experts have no biases",
                "set model.add_bias_linear=false",
            )
    error, _ = _pattern(shape)
    if error:
        yield Problem("moe.moe_layer_freq", error.message, error.hint)


def schedule_problems(topology: Topology, batch: Batch, overlap_p2p_comm: bool) -> Iterator[Problem]:
    """Whether the batch can be cut into microbatches, and the pipeline schedule can run them."""
    pp, dp, vpp = topology.pp, topology.dp, topology.vpp
    micro, total = batch.micro_batch_size, batch.global_batch_size
    if vpp is not None and pp < (2 if overlap_p2p_comm else 3):
        least = (
            "pp > 1" if overlap_p2p_comm else "pp > 2 where point-to-point communication is not overlapped"
        )
        yield Problem(
            "topology.vpp", f"{vpp} virtual stages need {least}, but pp is {pp}", "set topology.vpp=null"
        )
    if micro < 1 or total < 1:
        key, size = ("micro", micro) if micro < 1 else ("global", total)
        yield Problem(f"train.{key}_batch_size", f"must be at least 1, but is {size}")
    elif dp and total % (micro * dp):
        step = micro * dp
        sizes = [size for size in (total // step * step, -(-total // step) * step) if size]
        yield Problem(
            "train.global_batch_size",
            f"{total} is not a multiple of micro_batch_size {micro} x dp {dp} = {step}",
            "use train.global_batch_size=" + " or ".join(str(size) for size in sizes),
        )
    elif dp and vpp is not None and pp > 1 and (total // (micro * dp)) % pp:
        num, step = total // (micro * dp), micro * dp * pp
        yield Problem(
            "train.global_batch_size",
            f"interleaving (vpp {vpp}) runs microbatches in groups of pp {pp}, but there are {num}: "
            f"{total} / (micro_batch_size {micro} x dp {dp})",
            f"use train.global_batch_size={-(-total // step) * step}, or topology.vpp=null",
        )


def _pattern(shape: ModelShape) -> tuple[UserError | None, tuple[bool, ...]]:
    """Which layers have experts, or the error that says why that cannot be read."""
    try:
        return None, shape.moe_layers
    except UserError as error:
        return error, ()


def _tp_sizes(shape: ModelShape, tp: int) -> str:
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    fits = [
        size
        for size in range(1, heads + 1)
        if heads % size == 0 and (groups % size == 0 or size % groups == 0)
    ]
    return _listed_near(fits, tp)


def _near_divisors(number: int, wanted: int, of: int | None = None) -> str:
    """The divisors of a number nearest to a size; with ``of``, those that it divides or that divide it."""
    fits = [
        size
        for size in range(1, number + 1)
        if number % size == 0 and (of is None or of % size == 0 or size % of == 0)
    ]
    return _listed_near(fits, wanted)


def _listed_near(sizes: list[int], wanted: int) -> str:
    below, above = (
        [size for size in sizes if size <= wanted][-3:],
        [size for size in sizes if size > wanted][:2],
    )
    return ", ".join(str(size) for size in below + above)
