"""The whole plan of a job: what it holds, whether that fits, how long it takes and what that costs.

Parameters are counted, exactly as Megatron makes them. Memory, time and all that follows from time are
modelled; `Plan.time` carries the error of its model. No torch, no data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaplug.errors import Problem
from megaplug.job.flops import training_flops_per_token
from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import StageMemory, stage_memory
from megaplug.plan.parameters import active_parameters, stage_parameters, total_parameters
from megaplug.plan.step_time import StepTime, step_time
from megaplug.plan.units import gib, percent
from megaplug.plan.workload import Workload

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; every rank of it holds the same.

    Attributes:
        stage: Counted from 0.
        layers: Transformer layers.
        parameters: Of a rank, counted.
        memory: Of a rank, modelled.
    """

    stage: int
    layers: int
    parameters: int
    memory: StageMemory


@dataclass(frozen=True)
class Plan:
    """What a legal job needs on a cluster.

    Attributes:
        workload: The job in plain numbers.
        cluster: The machines.
        parameters: Of the whole model, with the vocabulary as it is: as models are published.
        parameters_padded: The same with the vocabulary padded, as Megatron's log counts them.
        active: Of these, those that one token passes.
        stages: In order.
        time: Of a step; None where no time is modelled.
        no_time: Why not.
        tokens: Of the whole training; None where nothing says how many.
    """

    workload: Workload
    cluster: Cluster
    parameters: int
    parameters_padded: int
    active: int
    stages: tuple[StagePlan, ...]
    time: StepTime | None
    no_time: str = ""
    tokens: int | None = None

    @property
    def world_size(self) -> int:
        """GPUs, or cores, of the job."""
        return self.workload.topology.world_size

    @property
    def num_nodes(self) -> int:
        """Machines of the job, the last perhaps not full."""
        return -(-self.world_size // self.cluster.gpus_per_node)

    @property
    def fullest(self) -> StagePlan:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def spare_memory(self) -> float:
        """Bytes of a GPU that the fullest rank leaves free; negative where it does not fit."""
        return self.cluster.usable_memory - self.fullest.memory.total

    @property
    def bubble(self) -> float:
        """Part of a step that a pipeline of equal stages waits: ``(p - 1) / (v m + p - 1)``."""
        stages, chunks = self.workload.topology.pp, self.workload.topology.vpp or 1
        return (stages - 1) / (chunks * self.workload.num_microbatches + stages - 1)

    def microbatches_for(self, bubble: float) -> int:
        """The fewest microbatches whose bubble is at most this part of a step; rounds of ``pp`` with VPP."""
        stages, chunks = self.workload.topology.pp, self.workload.topology.vpp or 1
        least = math.ceil((stages - 1) * (1 / bubble - 1) / chunks - 1e-9)
        return least if chunks == 1 else -(-least // stages) * stages

    @property
    def flops_per_token(self) -> dict[str, float]:
        """Model FLOPs of a token, forward and backward: ``causal`` and ``full`` square of scores."""
        shape = self.workload.shape
        vocab = shape.padded_vocab_size(self.workload.topology.tp)
        attention = self.workload.core_attention
        pairs = attention.pairs_of_all(shape) if attention else 1.0
        return {
            name: training_flops_per_token(shape, vocab_size=vocab, causal=name == "causal", pairs=pairs)
            for name in ("causal", "full")
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Of all GPUs together."""
        return None if self.time is None else self.workload.tokens_per_step / self.time.total

    @property
    def flops_per_gpu(self) -> dict[str, float]:
        """Model FLOP/s of a GPU in both conventions; empty where no time is modelled."""
        rate = self.tokens_per_second
        if rate is None:
            return {}
        return {name: flops * rate / self.world_size for name, flops in self.flops_per_token.items()}

    @property
    def peak_flops(self) -> float:
        """FLOP/s of a GPU that MFU is a part of; see `Precision.peak_format`."""
        return self.cluster.peak_flops[self.workload.precision.peak_format]

    @property
    def mfu(self) -> dict[str, float]:
        """Model FLOP/s as a part of the peak, in both conventions."""
        return {name: flops / self.peak_flops for name, flops in self.flops_per_gpu.items()}

    @property
    def steps(self) -> int | None:
        """Steps of the whole training."""
        return None if self.tokens is None else -(-self.tokens // self.workload.tokens_per_step)

    @property
    def seconds(self) -> float | None:
        """Of the whole training, without checkpoints, validation, failures and waiting."""
        return None if self.steps is None or self.time is None else self.steps * self.time.total

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole training."""
        return None if self.seconds is None else self.seconds / HOUR * self.world_size

    @property
    def dollars(self) -> float | None:
        """What the whole training costs; None where the cluster has no price."""
        price = self.cluster.price_per_gpu_hour
        return None if self.gpu_hours is None or price is None else self.gpu_hours * price

    @property
    def problems(self) -> list[Problem]:
        """Why this job cannot run on this cluster; none if it can."""
        found, cluster = [], self.cluster
        if cluster.num_gpus is not None and self.world_size > cluster.num_gpus:
            found.append(
                Problem(
                    "cluster.num_gpus",
                    f"the job has {self.world_size:,} ranks, and the cluster {cluster.num_gpus:,} GPUs",
                    f"at most topology.world_size={cluster.num_gpus}",
                )
            )
        if self.spare_memory < 0:
            found.append(self._too_full())
        return found

    def _too_full(self) -> Problem:
        fullest, cluster = self.fullest, self.cluster
        need = fullest.memory.total
        unit = "GPU" if cluster.device == "cuda" else "core"
        where = f"a rank of stage {fullest.stage}" if len(self.stages) > 1 else "a rank"
        message = (
            f"{where} needs {gib(need)} GiB (modelled), {gib(-self.spare_memory)} more than the "
            f"{gib(cluster.usable_memory)} GiB that a {unit} of {cluster.name} has for it"
        )
        state = fullest.memory.weights + fullest.memory.gradients + fullest.memory.optimizer
        if state > cluster.usable_memory:
            message += f"; weights, gradients and optimizer alone are {gib(state)} GiB"
        elif state < need / 2:
            message += f"; {percent(1 - state / need)} of it are activations and what computing needs"
        return Problem("cluster.memory_gib", message)


def make_plan(workload: Workload, cluster: Cluster, *, tokens: int | None = None) -> Plan:
    """Plan a legal job.

    Args:
        workload: The job in plain numbers.
        cluster: The machines.
        tokens: Of the whole training, for days and money.

    Raises:
        UserError: If the layers cannot be dealt out, or the cluster does not compute in the job's format.
    """
    shape, topology = workload.shape, workload.topology
    layers = topology.layers_of_stage(shape.num_layers)
    stages = tuple(
        StagePlan(
            stage,
            layers[stage],
            stage_parameters(shape, topology, stage).total,
            stage_memory(workload, stage),
        )
        for stage in range(topology.pp)
    )
    time, no_time = None, "the time of CPU ranks is not modelled"
    if cluster.device == "cuda":
        time, no_time = step_time(workload, cluster), ""
    return Plan(
        workload,
        cluster,
        total_parameters(shape),
        total_parameters(shape, padded_for_tp=topology.tp),
        active_parameters(shape),
        stages,
        time,
        no_time,
        tokens,
    )
