"""Which set of constants a cluster gets: its own, or that of the nearest generation, and then it is said."""

from __future__ import annotations

from dataclasses import replace

from megaplug.plan.cluster import Cluster
from megaplug.plan.step_time.constants import GENERATIONS, Constants, constants_names, load_constants

#: What is fitted apart from each other, as the end of a set's name; others follow bf16.
FORMATS = {"fp8": "fp8", "mxfp8": "fp8", "nvfp4": "nvfp4"}


def constants_for(cluster: Cluster, compute: str) -> Constants:
    """The set ``<cluster.constants>_<format>``, or the nearest generation's with a note and no error.

    Args:
        cluster: The machines; ``Cluster.constants`` names the generation, or a set in full.
        compute: What matrix products are computed in.
    """
    names = constants_names()
    if cluster.constants in names:
        return load_constants(cluster.constants)
    suffix = FORMATS.get(compute, "bf16")
    generation = next((known for known in GENERATIONS if cluster.constants.startswith(known)), "")
    own = f"{generation}_{suffix}"
    if own in names:
        return load_constants(own)
    nearest = min(names, key=lambda name: _distance(name, generation, suffix))
    note = f"no constants of {cluster.constants} in {suffix}: those of {nearest}, with an unknown error"
    return replace(load_constants(nearest), error=None, note=note)


def _distance(name: str, generation: str, suffix: str) -> tuple[int, int, str]:
    """How far a set is from what is asked for: generations apart, then another number format."""
    of_set, _, format_ = name.partition("_")
    wanted = GENERATIONS.index(generation) if generation in GENERATIONS else 0
    found = GENERATIONS.index(of_set) if of_set in GENERATIONS else len(GENERATIONS)
    return abs(found - wanted), int(format_ != suffix), name
