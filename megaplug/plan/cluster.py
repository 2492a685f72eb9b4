"""The machines that a plan is made for: what a GPU computes and holds, and how fast GPUs talk."""

from __future__ import annotations

from dataclasses import dataclass, field

from megaplug.job.schema import ClusterConfig

GIB = 1024**3


@dataclass(frozen=True)
class Cluster:
    """Hardware in SI units (bytes, seconds, FLOP/s), a GPU each; see ``conf/cluster`` for the sources.

    Attributes:
        name: Of the preset.
        device: ``cuda`` or ``cpu``.
        num_gpus: GPUs that can be had; None: any number.
        gpus_per_node: GPUs of one machine.
        memory: Bytes of a GPU.
        reserved: Bytes of them that are never a model's: context, NCCL, libraries.
        peak_flops: Dense peak by number format.
        memory_bandwidth: Bytes/s.
        link_bandwidth: Bytes/s in one direction inside the NVLink domain.
        link_domain: GPUs that NVLink joins.
        network_bandwidth: Bytes/s in one direction between domains, of one GPU's adapter.
        price_per_gpu_hour: US dollars, None if no money is counted.
        constants: Name of the fitted constants of the step-time model.
    """

    name: str
    gpus_per_node: int
    memory: float
    peak_flops: dict[str, float]
    memory_bandwidth: float
    link_bandwidth: float
    link_domain: int
    network_bandwidth: float
    reserved: float = 0.0
    device: str = "cuda"
    num_gpus: int | None = None
    price_per_gpu_hour: float | None = None
    constants: str = field(default="")

    @property
    def usable_memory(self) -> float:
        """Bytes that weights, state and activations may take."""
        return self.memory - self.reserved


def cluster_of(config: ClusterConfig) -> Cluster:
    """The cluster of a job's ``cluster`` section."""
    return Cluster(
        name=config.name,
        gpus_per_node=config.gpus_per_node,
        memory=config.memory_gib * GIB,
        peak_flops={name: value * 1e12 for name, value in config.peak_tflops.items()},
        memory_bandwidth=config.memory_bandwidth_tbps * 1e12,
        link_bandwidth=config.link_gbps * 1e9,
        link_domain=config.link_domain,
        network_bandwidth=config.network_gbps * 1e9,
        reserved=config.reserved_gib * GIB,
        device=config.device,
        num_gpus=config.num_gpus,
        price_per_gpu_hour=config.price_per_gpu_hour,
        constants=config.constants or config.name,
    )
