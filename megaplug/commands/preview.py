"""``launch=print``: the resolved job, who sits where, and the plain Megatron-LM arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaplug.commands.planned import planned_json
from megaplug.commands.resolved import Resolved
from megaplug.errors import Problem
from megaplug.job.packages import packages_line
from megaplug.job.plain_command import command_script
from megaplug.plan.plan_json import problems_json
from megaplug.runs.folder import RunFolder
from megaplug.topology import coordinates, rank_groups

# More ranks than this are shown by their first and last few.
_RANKS_SHOWN = 32
_GROUPS_SHOWN = 4
_NO_JOB_FILE = " or written; launch=freeze writes the job.yaml that the command reads"


def preview_json(
    resolved: Resolved, folder_name: str, megatron_args: list[str], here: Sequence[Problem] = ()
) -> str:
    """All of it as one JSON object.

    Args:
        resolved: The job.
        folder_name: Where the run would be.
        megatron_args: What Megatron's parser would read.
        here: What this machine lacks for it.
    """
    content: dict[str, Any] = {
        "run": folder_name,
        "job": dataclasses.asdict(resolved.job),
        "topology": dataclasses.asdict(resolved.topology),
        "derived": dataclasses.asdict(resolved.derived),
        "data": dataclasses.asdict(resolved.facts),
        "parameters": resolved.parameters,
        "memory_bytes_per_rank_modelled": resolved.memory.total,
        "plan": planned_json(resolved),
        "not_on_this_machine": problems_json(here),
        "rank_groups": rank_groups(resolved.topology),
        # Whose they are; which they are is known once the model is built: the run's kernels.json.
        "kernels": packages_line(
            resolved.job.kernels.apex,
            resolved.job.kernels.te,
            resolved.derived.device,
            resolved.derived.backend,
        ),
        "megatron_args": megatron_args,
    }
    return json.dumps(content, indent=2)


def preview_text(resolved: Resolved, folder_name: str, megatron_args: list[str], header: list[str]) -> str:
    """All of it for a person.

    Args:
        resolved: The job.
        folder_name: Where the run would be.
        megatron_args: What Megatron's parser would read.
        header: The lines that a started run would show first.
    """
    import yaml

    lines = [
        "# the resolved job",
        yaml.safe_dump(dataclasses.asdict(resolved.job), sort_keys=False, width=110),
    ]
    follows = {
        "topology": dataclasses.asdict(resolved.topology),
        "derived": dataclasses.asdict(resolved.derived),
    }
    lines += ["# what follows from it", yaml.safe_dump(follows, sort_keys=False, width=110)]
    lines += [f"# the run {folder_name}", *header, ""]
    lines += ["# the rank layout", *rank_layout(resolved), ""]
    job_file = RunFolder(Path(folder_name)).job_file
    command = command_script(megatron_args, resolved.topology.world_size, job_file)
    lines += [command.removeprefix("#!/bin/sh\n")]
    lines += ["# launch=print: nothing was started" + ("" if job_file.exists() else _NO_JOB_FILE)]
    return "\n".join(lines)


def rank_layout(resolved: Resolved) -> list[str]:
    """One line a rank with its place in both grids, then the groups that talk to each other."""
    topology = resolved.topology
    size = topology.world_size
    shown = list(range(size))
    if size > _RANKS_SHOWN:
        shown = [*range(_RANKS_SHOWN // 2), *range(size - _RANKS_SHOWN // 2, size)]
    places = {rank: coordinates(topology, rank) for rank in shown}
    names = list(places[0])
    lines = ["  rank  " + "  ".join(f"{name:>4}" for name in names)]
    for before, rank in zip([-1, *shown], shown, strict=False):
        if rank != before + 1:
            lines.append(f"  ... {rank - before - 1} more ranks")
        lines.append(f"  {rank:>4}  " + "  ".join(f"{places[rank][name]:>4}" for name in names))
    for name, groups in rank_groups(topology).items():
        if len(groups[0]) > 1:
            more = f" ... {len(groups)} groups" if len(groups) > _GROUPS_SHOWN else ""
            lines.append(
                f"  {name} groups: " + " ".join(_ranks(group) for group in groups[:_GROUPS_SHOWN]) + more
            )
    stages = topology.layers_of_stage(resolved.shape.num_layers)
    if len(stages) > 1:
        lines.append(f"  layers of the pipeline stages: {' '.join(map(str, stages))}")
    return lines


def _ranks(group: list[int]) -> str:
    if len(group) > 8:
        return f"[{group[0]} {group[1]} ... {group[-1]}]"
    return "[" + " ".join(map(str, group)) + "]"
