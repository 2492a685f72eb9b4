"""The machines that a plan is made for: what a GPU computes and holds, and how fast GPUs talk."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any

from megaplug.errors import Problem, UserError
from megaplug.job.compose import conf_dir
from megaplug.job.schema import ClusterConfig
from megaplug.job.suggest import closest, did_you_mean

GIB = 1024**3
AUTO, WITHOUT_GPU = "auto", "cpu2"
_MAY_BE_NULL = ("num_gpus", "link_domain", "price_per_gpu_hour", "constants")

# What the driver calls a GPU, and its preset. H100 NVL and H100 PCIe, and the A100 of 40 GB, are others.
_PRESET_OF_GPU = (
    (r"GB300", "gb300"),
    (r"GB200", "gb200"),
    (r"\bB300", "b300"),
    (r"\bB200", "b200"),
    (r"\bH200\b(?! NVL)", "h200"),
    (r"\bH100\b(?! (?:NVL|PCIe))", "h100"),
    (r"A100-SXM4-80GB", "a100_80gb"),
    (r"RTX 4090(?! D)", "rtx4090"),
)


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
    constants: str = ""

    @property
    def usable_memory(self) -> float:
        """Bytes that weights, state and activations may take."""
        return self.memory - self.reserved


def cluster_of(config: ClusterConfig, gpu: str | None = None) -> Cluster:
    """The cluster of a job's ``cluster`` section.

    Args:
        config: The section; of ``cluster=auto`` every key that was not typed is None.
        gpu: The name of the GPU that is here, for ``cluster=auto``; None where there is none.

    Raises:
        UserError: No preset is known of that GPU, a key is null that a cluster cannot do without, or
            there are no such constants.
    """
    values = dataclasses.asdict(config)
    if config.constants is not None:
        _check_constants(config.constants)
    if config.name == AUTO:
        below = preset_values(preset_of_gpu(gpu) if gpu is not None else WITHOUT_GPU)
        peaks = {**below["peak_tflops"], **(config.peak_tflops or {})}
        values = below | {key: value for key, value in values.items() if value is not None}
        values |= {"name": below["name"], "peak_tflops": peaks}
    return _cluster(values)


@functools.cache
def cluster_preset(name: str) -> Cluster:
    """A shipped preset by its name, without Hydra.

    Raises:
        UserError: There is none of that name.
    """
    return _cluster(preset_values(name))


def preset_values(name: str) -> dict[str, Any]:
    """A shipped preset as ``conf/cluster`` has it.

    Raises:
        UserError: There is none of that name.
    """
    import yaml

    file = conf_dir() / "cluster" / f"{name}.yaml"
    if name == AUTO or not file.is_file():
        raise UserError(f"there is no cluster {name!r}", hint=did_you_mean(name, preset_names()))
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def preset_names() -> list[str]:
    """All shipped presets."""
    return sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml") if path.stem != AUTO)


def preset_of_gpu(gpu: str) -> str:
    """The preset of a GPU by the name that the driver gives it.

    Raises:
        UserError: There is none.
    """
    for pattern, name in _PRESET_OF_GPU:
        if re.search(pattern, gpu):
            return name
    shown = " | ".join(f"cluster={name}" for name in preset_names())
    raise UserError(
        f"cluster=auto: there is no preset for {gpu!r}, the GPU of this machine",
        hint=f"name the machines that the plan is for: {shown}; single values can be given, such as "
        "cluster.memory_gib=48",
    )


def format_problem(cluster: Cluster, compute: str) -> Problem | None:
    """That the GPUs of a cluster do not compute in a number format; None where they do.

    Args:
        cluster: The machines.
        compute: What matrix products are computed in: a key of ``Cluster.peak_flops``.
    """
    if cluster.peak_flops.get(compute):
        return None
    peaks = {name: preset_values(name)["peak_tflops"].get(compute, 0) for name in preset_names()}
    others = sorted((name for name, peak in peaks.items() if peak), key=lambda name: (peaks[name], name))[:2]
    message = f"a GPU of {cluster.name} does not compute in {compute}: cluster.peak_tflops has " + ", ".join(
        sorted(cluster.peak_flops)
    )
    return Problem(
        "precision",
        message,
        "use " + " or ".join(["precision=bf16", *(f"cluster={name}" for name in others)]),
    )


def _check_constants(name: str) -> None:
    """That there are constants of this name: a whole set's, or those that go with a preset."""
    from megaplug.plan.step_time.constants import constants_names

    known = (*preset_names(), *constants_names())
    if name not in known:
        message = f"cluster.constants: there are no constants {name!r} of the step-time model"
        presets = ", ".join(preset_names())
        hint = f"those of a GPU: {presets}; or a set of megaplug/plan/step_time/constants"
        raise UserError(
            message, hint=f"did you mean {meant}? {hint}" if (meant := closest(name, known)) else hint
        )


def _cluster(values: dict[str, Any]) -> Cluster:
    needed = [key for key in values if key not in _MAY_BE_NULL]
    if missing := [f"cluster.{key}" for key in needed if values[key] is None]:
        raise UserError(f"{', '.join(missing)}: not given", hint="a cluster needs a value for each")
    return Cluster(
        name=values["name"],
        gpus_per_node=values["gpus_per_node"],
        memory=values["memory_gib"] * GIB,
        peak_flops={name: value * 1e12 for name, value in values["peak_tflops"].items()},
        memory_bandwidth=values["memory_bandwidth_tbps"] * 1e12,
        link_bandwidth=values["link_gbps"] * 1e9,
        link_domain=values["link_domain"] or values["gpus_per_node"],
        network_bandwidth=values["network_gbps"] * 1e9,
        reserved=values["reserved_gib"] * GIB,
        device=values["device"],
        num_gpus=values["num_gpus"],
        price_per_gpu_hour=values["price_per_gpu_hour"],
        constants=values["constants"] or values["name"],
    )
