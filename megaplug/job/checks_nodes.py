"""Whether a job can be shared out among the nodes that it is to run on."""

from __future__ import annotations

from collections.abc import Iterator

from megaplug.errors import Problem
from megaplug.job.schema import Job
from megaplug.topology import Topology
from megaplug.topology.groups import GROUPS, group_size, stays_in_node


def nodes_problems(job: Job) -> Iterator[Problem]:
    """What is wrong with the keys that say which node this is."""
    launch = job.launch
    strange = [name for name in launch.within_node if name not in GROUPS]
    if strange:
        known = ", ".join(GROUPS)
        yield Problem("launch.within_node", f"{strange[0]} is no process group", f"groups: {known}")
    if launch.kind == "local":
        for name in ("nnodes", "node_rank"):
            if getattr(launch, name) is not None:
                yield Problem(f"launch.{name}", "means nothing on this machine alone", "use launch=nodes")
    if launch.kind != "nodes":
        return
    missing = [name for name in ("nnodes", "node_rank", "master_addr") if getattr(launch, name) in (None, "")]
    meaning = {
        "nnodes": "how many nodes there are",
        "node_rank": "which of them this is, from 0",
        "master_addr": "the address of node 0",
    }
    for name in missing:
        yield Problem(f"launch.{name}", f"is not given: {meaning[name]}")
    number, own = launch.nnodes, launch.node_rank
    # That there are none, or fewer, is said elsewhere.
    if number is not None and number > 0 and own is not None and own not in range(number):
        message = f"is {own}, and there {'is 1 node' if number == 1 else f'are {number} nodes'}"
        yield Problem("launch.node_rank", message, "use 0" if number == 1 else f"from 0 to {number - 1}")
    if launch.master_port is None and (launch.nnodes or 1) > 1:
        message = "the other nodes cannot know a port that is found"
        yield Problem("launch.master_port", message, "such as 29400")


def share_problems(job: Job, topology: Topology) -> Iterator[Problem]:
    """What keeps the ranks from being shared out among the nodes.

    Ranks fill one node after the other, in Megatron's order, in which the groups that talk most are
    neighbours.
    """
    number = job.launch.nnodes
    if job.launch.kind not in ("nodes", "slurm") or number is None or number == 1:
        return
    if topology.world_size % number:
        ranks = "1 rank" if topology.world_size == 1 else f"{topology.world_size} ranks"
        message = f"{ranks} cannot be shared out among {number} nodes"
        yield Problem("launch.nnodes", message, "the number of ranks must be a multiple of that of nodes")
        return
    per_node = topology.world_size // number
    for name in job.launch.within_node:
        # What is no group is said elsewhere.
        if name in GROUPS and not stays_in_node(topology, name, per_node):
            size = group_size(topology, name)
            message = f"groups of {size} ranks ({name}) would reach beyond a node of {per_node}"
            others = [other for other in job.launch.within_node if other != name]
            allowed = f"launch.within_node=[{','.join(others)}] allows it"
            yield Problem("launch.nnodes", message, f"use fewer nodes, or a smaller {name}; {allowed}")
