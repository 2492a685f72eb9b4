"""Which set of constants a cluster gets: its own, or that of the nearest generation, and then it is said."""

from __future__ import annotations

from dataclasses import replace

from megaplug.plan.cluster import Cluster
from megaplug.plan.step_time.constants import Constants, constants_names, load_constants
from megaplug.plan.workload import Workload

#: What is fitted apart from each other; others follow bf16.
FORMATS = {"fp8": "fp8", "mxfp8": "fp8", "nvfp4": "nvfp4"}
#: Formats that nothing was published in: those of bf16 with the format's own peak.
UNMEASURED = ("fp32", "tf32")
#: The set that plans are made with, of those of a GPU and format: the newest software whose rows have dense
#: models too. On A100 that of whole jobs on many nodes: vTrain's, of one node, computes faster than any job
#: with flash attention was seen to. On B200 in bf16 only GPT-OSS was published, on B300 only models with
#: experts: no measure for others, so that they get the nearest generation's.
CHOSEN = {
    ("a100", "bf16"): "a100_bf16_megatron-2021",
    ("h100", "bf16"): "h100_bf16_core-0.8",
    ("h100", "fp8"): "h100_fp8_bridge-26.04",
    ("b200", "fp8"): "b200_fp8_bridge-25.11",
    ("gb200", "bf16"): "gb200_bf16_bridge-25.11",
    ("gb200", "fp8"): "gb200_fp8_bridge-26.04",
    ("gb200", "nvfp4"): "gb200_nvfp4_bridge-26.04",
    ("gb300", "bf16"): "gb300_bf16_bridge-25.11",
    ("gb300", "fp8"): "gb300_fp8_bridge-26.04",
    ("gb300", "nvfp4"): "gb300_nvfp4_bridge-26.04",
}
#: Generations in order of age: where there is no set, the nearest one's is taken, and that is said.
GENERATIONS = ("a100", "h100", "h200", "b200", "gb200", "b300", "gb300")


def constants_for(cluster: Cluster, compute: str) -> Constants:
    """The constants of a cluster in a number format, or the nearest generation's with a note and no error.

    Args:
        cluster: The machines; ``Cluster.constants`` names a set in full, or begins with a GPU generation.
        compute: What matrix products are computed in.
    """
    if cluster.constants in constants_names():
        return load_constants(cluster.constants)
    format_ = FORMATS.get(compute, "bf16")
    generation = next((known for known in GENERATIONS if cluster.constants.startswith(known)), "")
    own = CHOSEN.get((generation, format_))
    if own is not None and compute not in UNMEASURED:
        return load_constants(own)
    nearest = CHOSEN[min(CHOSEN, key=lambda key: _distance(key, generation, format_))]
    note = (
        f"no step time was measured on {cluster.constants} in {compute}: modelled with the constants "
        f"{nearest}, whose error there is not known"
    )
    return replace(load_constants(nearest), error=None, note=note)


def constants_of(workload: Workload, cluster: Cluster) -> Constants:
    """Those of a job's number format: without an error where its attention is in no published step time."""
    found = constants_for(cluster, workload.precision.compute)
    attention = workload.core_attention
    untimed = attention.counted_apart if attention else ()
    if found.error is None or not untimed:
        return found
    note = (
        f"no step time was measured with attention={' or '.join(untimed)}: modelled with the constants "
        f"{found.name} of dense attention, whose error there is not known"
    )
    return replace(found, error=None, note=note)


def _distance(key: tuple[str, str], generation: str, format_: str) -> tuple[int, int]:
    """How far a set is from what is asked for: another number format, then generations apart."""
    wanted = GENERATIONS.index(generation) if generation else GENERATIONS.index("h100")
    return int(key[1] != format_), abs(GENERATIONS.index(key[0]) - wanted)
