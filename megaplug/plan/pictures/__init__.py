"""Pictures of a plan as PNG, with their numbers as JSON beside. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megaplug.plan.cluster import Cluster
from megaplug.plan.memory import stage_memory
from megaplug.plan.pictures.cells import Cell, cells_of
from megaplug.plan.pictures.growth import sizes_of
from megaplug.plan.pictures.heat_map import draw_heat_map
from megaplug.plan.pictures.memory_bars import draw_memory
from megaplug.plan.pictures.panels import schedule_panels
from megaplug.plan.pictures.predicted import Point, draw_predicted
from megaplug.plan.pictures.scaling import draw_scaling
from megaplug.plan.pictures.timeline import draw_timeline
from megaplug.plan.workload import Workload

__all__ = [
    "Point",
    "cells_of",
    "draw_heat_map",
    "draw_impossible",
    "draw_memory",
    "draw_plan_pictures",
    "draw_predicted",
    "draw_scaling",
    "draw_timeline",
    "schedule_panels",
    "sizes_of",
]


def draw_plan_pictures(workload: Workload, cluster: Cluster, directory: Path, name: str) -> list[Path]:
    """Draws all pictures of a job: memory by stage, schedules, heat map and scaling.

    Args:
        workload: A legal job.
        cluster: Its machines.
        directory: Where they go; it is made.
        name: Of the model or of the job, for the titles.

    Returns:
        The pictures: ``memory.png``, ``timeline.png``, ``heat_map.png``, ``scaling.png``; the numbers of each
        lie beside it, as ``memory.json`` and so on. Of CPU ranks, whose time is not modelled, the first only.

    Raises:
        UserError: The disk refused, or the cluster has no peak for the number format.
    """
    topology, num_gpus = workload.topology, workload.topology.world_size
    job = f"{name}, {topology.label}"
    memory = draw_memory(
        [stage_memory(workload, stage) for stage in range(topology.pp)],
        directory / "memory.png",
        job=f"{job} on {num_gpus:,} {cluster.name}",
        device=cluster.name,
        memory=cluster.memory,
        usable=cluster.usable_memory,
        layers=topology.layers_of_stage(workload.shape.num_layers),
    )
    if cluster.device != "cuda":
        return [memory]
    return [
        memory,
        draw_timeline(
            schedule_panels(workload, cluster), directory / "timeline.png", job=job, cluster=cluster.name
        ),
        _draw_layouts(cells_of(workload, cluster), directory, name, cluster.name, num_gpus),
        draw_scaling(sizes_of(workload, cluster), directory / "scaling.png", job=job, cluster=cluster.name),
    ]


def draw_impossible(workload: Workload, cluster: Cluster, directory: Path, name: str) -> list[Path]:
    """Draws what can be drawn of a layout that breaks a rule: the heat map, whose cells name the rules.

    Args:
        workload: The job; its topology is one that cannot be.
        cluster: Its machines.
        directory: Where it goes; it is made.
        name: Of the model, for the title.

    Returns:
        ``heat_map.png``; nothing of CPU ranks, or where no rule of the map forbids the job.

    Raises:
        UserError: The disk refused.
    """
    if cluster.device != "cuda":
        return []
    cells = cells_of(workload, cluster)
    if not any(cell.own and cell.problems for cell in cells):
        return []
    return [_draw_layouts(cells, directory, name, cluster.name, workload.topology.world_size)]


def _draw_layouts(cells: Sequence[Cell], directory: Path, name: str, cluster: str, num_gpus: int) -> Path:
    return draw_heat_map(cells, directory / "heat_map.png", job=name, cluster=cluster, num_gpus=num_gpus)
