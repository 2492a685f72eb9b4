"""Seconds of one microbatch on every stage and chunk by the step-time model: what a timeline is made of."""

from __future__ import annotations

from megaplug.plan.cluster import Cluster
from megaplug.plan.schedule import Durations
from megaplug.plan.step_time import Constants, constants_for, layer_seconds, rates_of, terms_of
from megaplug.plan.step_time.pipeline import embedding_seconds, head_seconds
from megaplug.plan.workload import Workload
from megaplug.topology import layer_ids

FORWARD = 1 / 3
"""Part of the embedding's, the output layer's and a stage's fixed time that is forward."""


def chunk_seconds(
    workload: Workload, cluster: Cluster, constants: Constants | None = None
) -> tuple[Durations, Durations]:
    """Modelled seconds of a forward and of a backward pass, by stage, then by chunk.

    Args:
        workload: A legal job.
        cluster: Its machines.
        constants: Of the step-time model; the cluster's own if not given.

    Raises:
        UserError: The layers cannot be dealt out, or the cluster has no peak for the number format.
    """
    compute = workload.precision.compute
    terms = terms_of(workload)
    rates = rates_of(cluster, compute, constants or constants_for(cluster, compute))
    shape, topology = workload.shape, workload.topology
    layers = {has: layer_seconds(terms, rates, moe=has) for has in sorted(set(shape.moe_layers))}
    forward, backward = [], []
    for stage in range(topology.pp):
        chunks = layer_ids(topology, shape.num_layers, stage)
        ends = [rates.constants.microbatch_seconds / len(chunks)] * len(chunks)
        if stage == 0:
            ends[0] += float(embedding_seconds(terms, rates))
        if stage == topology.pp - 1:
            ends[-1] += float(head_seconds(terms, rates))
        of_chunk = [[layers[shape.moe_layers[layer]] for layer in chunk] for chunk in chunks]
        forward.append(
            [
                end * FORWARD + sum(float(layer.forward.total) for layer in chunk)
                for chunk, end in zip(of_chunk, ends, strict=True)
            ]
        )
        backward.append(
            [
                end * (1 - FORWARD) + sum(float(layer.backward.total) for layer in chunk)
                for chunk, end in zip(of_chunk, ends, strict=True)
            ]
        )
    return forward, backward
