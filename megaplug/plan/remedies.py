"""The nearest jobs that work: legal, and within the memory of the cluster, with the words to type.

Asked for where a job is impossible. Milder changes come first: what leaves the result alone (a smaller
microbatch, recomputation), then another layout of as many ranks, then more ranks, or fewer where the cluster
has no more. Of the nearest ones the cheapest are named
with the very nearest, in the order of the GPU time that a token takes.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megaplug.errors import Problem, UserError
from megaplug.job.checks import job_shape, resolve_topology
from megaplug.job.checks_attention import attention_problems
from megaplug.job.elsewhere import judge
from megaplug.job.schema import Job, TopologyConfig
from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import stage_memory
from megaplug.plan.parameters import total_parameters
from megaplug.plan.plan import HOUR
from megaplug.plan.step_time import step_time
from megaplug.plan.telling_stages import stages_unlike
from megaplug.plan.units import gib, in_words, money, span
from megaplug.plan.workload import workload_of
from megaplug.topology import Batch, ModelShape, Topology, overrides, resolve, violations
from megaplug.topology.nearest import Mesh, by_distance

# More ranks than these many times those that hold the state, and more layouts of one world, are not tried;
# of those that could fit, the nearest are kept.
_MOST_TIMES = 8
_MESHES = 2000
_KEPT = 40
# The cheapest of so many that are nearest are named beside the nearest.
_COMPARED = 8
# Sequences are not made shorter than this.
_SHORTEST = 4096
_ONE_RANK = Topology(1, 1, None, 1, 1, 1, 1, 1)
# All layers, one by one; what nobody has said need not be typed.
_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Remedy:
    """A job that works.

    Attributes:
        words: What to type beside what was typed.
        job: The job that they make.
        world_size: Its ranks.
        memory: Modelled bytes of its fullest rank.
        label: Its layout in a few letters.
        seconds: Modelled time of a step; None where no time is modelled.
        dollars: What a billion tokens cost; None without a time or a price.
        result: What of it changes what is learned, such as shorter sequences; empty if nothing does.
    """

    words: tuple[str, ...]
    job: Job
    world_size: int
    memory: int
    label: str
    seconds: float | None = None
    dollars: float | None = None
    result: str = ""

    @property
    def gpu_seconds_per_token(self) -> float:
        """What it is compared by; 0 where no time is modelled."""
        tokens = self.job.train.global_batch_size * self.job.model.seq_length
        return (self.seconds or 0.0) * self.world_size / tokens

    def __str__(self) -> str:
        ranks = f"{self.world_size:,} rank{'s' * (self.world_size > 1)}"
        said = [ranks, self.label, f"{gib(self.memory)} GiB each"]
        if self.seconds is not None:
            said.append(f"{span(self.seconds)} a step")
        if self.dollars is not None:
            said.append(f"{money(self.dollars)} a billion tokens")
        if self.result:
            said.append(f"trains otherwise: {self.result}")
        return f"{' '.join(self.words)}   # {', '.join(said)}"


def nearest_jobs(job: Job, cluster: Cluster, vocab_size: int, *, limit: int = 2) -> list[Remedy]:
    """The nearest jobs that are legal and fit, that with the least GPU time a token first.

    Args:
        job: One that is neither, or only legal; what else is wrong with it than its layout stays wrong.
        cluster: The machines, whose ``num_gpus`` is the most that is tried.
        vocab_size: Of the model, before padding.
        limit: How many, of as many ranks as were asked for where that is possible.
    """
    topology, _ = resolve(job.topology)
    if topology is None:
        return []
    shape = job_shape(job, vocab_size)
    worlds = [
        # What does not fit with the shortest sequences is not asked about longer ones.
        list(
            islice((mesh for mesh in meshes if _fits(_cut(job, _SHORTEST), mesh, cluster, vocab_size)), _KEPT)
        )
        for size in _worlds(topology.world_size, least_ranks(job, shape, cluster), cluster)
        for meshes in [_meshes(job, topology, shape, size, cluster)]
    ]
    layouts = [mesh for world in worlds for mesh in world]
    length = job.model.seq_length
    lengths = [length, *(length >> by for by in range(1, 32) if length >> by >= _SHORTEST)]
    # What fits also fits with shorter sequences: the first length at which anything does is bisected.
    first = bisect_left(
        lengths,
        True,
        key=lambda one: any(_fits(_cut(job, one), mesh, cluster, vocab_size) for mesh in layouts),
    )
    for seq_length in lengths[first : first + 1]:
        words = () if seq_length == length else (f"model.seq_length={seq_length}",)
        for world in worlds:
            tried = (_mildest(_cut(job, seq_length), mesh, words, vocab_size, cluster) for mesh in world)
            if found := list(islice((remedy for remedy in tried if remedy and remedy.words), _COMPARED)):
                timed = [_timed(remedy, job, cluster, vocab_size) for remedy in found]
                # The nearest of all keeps its place among those that are cheap.
                cheap = sorted(timed[1:], key=lambda remedy: remedy.gpu_seconds_per_token)
                shown = [timed[0], *cheap[: limit - 1]]
                return sorted(shown, key=lambda remedy: remedy.gpu_seconds_per_token)
    return []


def _timed(remedy: Remedy, asked: Job, cluster: Cluster, vocab_size: int) -> Remedy:
    """With its time, its price, and what of it changes the result."""
    told, found = [], remedy.job
    if found.model.seq_length != asked.model.seq_length:
        told.append(f"sequences of {found.model.seq_length:,} tokens, not {asked.model.seq_length:,}")
    if found.train.global_batch_size != asked.train.global_batch_size:
        size = asked.train.global_batch_size
        told.append(f"{found.train.global_batch_size:,} sequences a step, not {size:,}")
    remedy = replace(remedy, result=" and ".join(told))
    if cluster.device != "cuda":
        return remedy
    workload = workload_of(found, resolve_topology(found), job_shape(found, vocab_size))
    remedy = replace(remedy, seconds=step_time(workload, cluster).total)
    if (price := cluster.price_per_gpu_hour) is None:
        return remedy
    return replace(remedy, dollars=1e9 * remedy.gpu_seconds_per_token / HOUR * price)


def _cut(job: Job, seq_length: int) -> Job:
    """The job with sequences of at most this length."""
    length = min(job.model.seq_length, seq_length)
    return replace(job, model=replace(job.model, seq_length=length))


def _fits(job: Job, mesh: Topology, cluster: Cluster, vocab_size: int) -> bool:
    """Whether a layout fits with everything done that needs less memory."""
    frugal = _train(job, micro_batch_size=1, **_RECOMPUTE, recompute_modules=None)
    return _needed(frugal, mesh, job_shape(frugal, vocab_size)) <= cluster.usable_memory


def state_bytes(job: Job, shape: ModelShape) -> float:
    """Weights, gradients and optimizer of the whole model, each once: what no layout can go below."""
    workload = workload_of(job, _ONE_RANK, shape)
    kept = 1 - workload.sharing.optimizer_on_cpu
    precision = workload.precision
    of_one = precision.parameter + precision.gradient + (precision.optimizer + precision.for_step) * kept
    return total_parameters(shape) * of_one


def least_ranks(job: Job, shape: ModelShape, cluster: Cluster) -> int:
    """Ranks below which not even an even share of the state fits, whatever the layout."""
    return math.ceil(state_bytes(job, shape) / cluster.usable_memory)


def too_few_ranks(job: Job, world_size: int, shape: ModelShape, cluster: Cluster) -> list[Problem]:
    """That a world is too small for a model under every layout, in numbers."""
    least = least_ranks(job, shape, cluster)
    if world_size >= least:
        return []
    state = state_bytes(job, shape)
    parameters = total_parameters(shape)
    share = "all on one rank"
    if world_size > 1:
        share = f"{gib(state / world_size)} for each of {world_size:,} ranks even if all is shared out evenly"
    unit = "GPU" if cluster.device == "cuda" else "core"
    return [
        Problem(
            "topology.world_size",
            f"weights, gradients and optimizer of {in_words(parameters)} parameters are {gib(state)} GiB "
            f"({state / parameters:.0f} bytes each), {share}; {cluster.name} has "
            f"{gib(cluster.usable_memory)} a {unit}",
            f"at least {least:,} such {unit}s, without a single activation",
        )
    ]


def _worlds(asked: int, least: int, cluster: Cluster) -> Iterator[int]:
    """As many ranks as asked for, then twice, three, four, five times as many and so on; large enough.

    Of a cluster with fewer: all its GPUs, then parts of what was asked for that it has.
    """
    if cluster.num_gpus is not None and asked > cluster.num_gpus:
        parts = {asked // by for by in range(2, asked + 1) if asked % by == 0}
        yield from sorted(
            (size for size in parts | {cluster.num_gpus} if least <= size <= cluster.num_gpus), reverse=True
        )
        return
    most = _MOST_TIMES * max(asked, least)
    for factor in sorted({base << power for base in (1, 3, 5, 15) for power in range(16)}):
        size = asked * factor
        if least <= size <= most and (cluster.num_gpus is None or size <= cluster.num_gpus):
            yield size


def _meshes(
    job: Job, asked: Topology, shape: ModelShape, world_size: int, cluster: Cluster
) -> Iterator[Topology]:
    """The legal layouts of a world, nearest first, whose tensor parallelism stays inside NVLink's domain."""
    # A batch that every number of replicas divides; the job's own is rounded up in the end.
    batch = Batch(1, world_size)
    if world_size == asked.world_size and asked.dp and not violations(asked, shape, batch):
        yield asked
    start = replace(asked, world_size=world_size, dp=0)
    request = replace(job.topology, world_size=world_size, dp=None)
    if world_size == asked.world_size and job.topology.world_size is None:
        # Nobody has said how many ranks: those follow from the sizes that are nearest.
        start, request = asked, job.topology
    widest = max(asked.tp, cluster.link_domain)
    precision = workload_of(job, _ONE_RANK, shape).precision
    # If stages were equal, weights and gradients alone: quickly told.
    held = total_parameters(shape) * (precision.parameter + precision.gradient)
    in_two = replace(job, topology=replace(job.topology, cp=2))
    cuts_sequences = all(problem.key != "topology.cp" for problem in attention_problems(in_two))

    def possible(sizes: Mesh) -> bool:
        tp, pp, cp, ep, _, dp = sizes
        cut = tp * pp * cp * dp if job.topology.zero > 1 else tp * pp * (ep if shape.is_moe else 1)
        return tp <= widest and (cp == 1 or cuts_sequences) and held / cut < cluster.usable_memory

    for mesh in islice(by_distance(start, shape, batch, request=request, possible=possible), _MESHES):
        if mesh != asked:
            yield mesh


def _mildest(
    job: Job, mesh: Topology, words: tuple[str, ...], vocab_size: int, cluster: Cluster
) -> Remedy | None:
    """The job on a layout, if need be with a microbatch of 1 and with recomputation; None if none fits."""
    laid_out = replace(job, topology=_config(job.topology, mesh))
    words, shape = (*overrides(mesh, job.topology), *words), job_shape(job, vocab_size)
    tried = [(laid_out, words)]
    if job.train.micro_batch_size > 1:
        tried.append((_train(laid_out, micro_batch_size=1), (*words, "train.micro_batch_size=1")))
    if job.train.recompute_granularity != "full":
        anew = {"recompute_granularity": "full"} | {
            key: None
            for key in ("recompute_method", "recompute_num_layers", "recompute_modules")
            if getattr(job.train, key) is not None
        }
        again = [f"train.{key}={'null' if value is None else value}" for key, value in anew.items()]
        tried += [(_train(found, **anew), (*typed, *again)) for found, typed in tried]
    if _needed(tried[-1][0], mesh, shape) > cluster.usable_memory:
        return None
    for found, typed in tried:
        whole = _whole_batch(found, mesh)
        if whole.train.global_batch_size != found.train.global_batch_size:
            found, typed = whole, (*typed, f"train.global_batch_size={whole.train.global_batch_size}")
        memory = _needed(found, mesh, shape)
        if memory > cluster.usable_memory:
            continue
        if not judge(found, cluster.device, suggest=False).problems:
            return Remedy(typed, found, mesh.world_size, int(memory), mesh.label)
    return None


def _whole_batch(job: Job, mesh: Topology) -> Job:
    """The job with a batch that its replicas can share out, rounded up."""
    step = job.train.micro_batch_size * mesh.dp
    return _train(job, global_batch_size=-(-job.train.global_batch_size // step) * step)


def _needed(job: Job, mesh: Topology, shape: ModelShape) -> float:
    """Bytes of the fullest rank."""
    try:
        workload = workload_of(_whole_batch(job, mesh), mesh, shape)
        return max(stage_memory(workload, stage).total for stage in stages_unlike(mesh, shape))
    except UserError:
        return math.inf  # the layers cannot be dealt out so


def _train(job: Job, **changes: object) -> Job:
    return replace(job, train=replace(job.train, **changes))  # type: ignore[arg-type]


def _config(asked: TopologyConfig, mesh: Topology) -> TopologyConfig:
    """The section that makes a layout, with all that a layout does not know as it was asked for."""
    sizes = {field.name: getattr(mesh, field.name) for field in dataclasses.fields(mesh)}
    return replace(asked, **sizes)
