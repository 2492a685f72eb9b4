"""Two grids over the same ranks: the attention mesh (tp, cp, dp, pp) and the expert mesh (etp, ep, edp, pp).

Megatron's default order ``tp-cp-ep-dp-pp`` makes ``tp`` the fastest dimension and ``pp`` the slowest:
``rank = tp + TP*(cp + CP*(dp + DP*pp))`` and ``rank = etp + ETP*(ep + EP*(edp + EDP*pp))``
(``megatron/core/parallel_state.py``, ``RankGenerator``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from megaplug.errors import Problem
from megaplug.topology.stages import layers_of_stage


class TopologyRequest(Protocol):
    """What a user asks for; ``None`` where it is to follow from the rest."""

    tp: int
    pp: int
    vpp: int | None
    dp: int | None
    cp: int
    ep: int
    etp: int | None
    sequence_parallel: bool | None
    world_size: int | None
    decoder_first_pipeline_num_layers: int | None
    decoder_last_pipeline_num_layers: int | None
    account_for_embedding_in_pipeline_split: bool
    account_for_loss_in_pipeline_split: bool


@dataclass(frozen=True)
class Topology:
    """A mesh with every size known. ``dp`` is 0 where ``resolve`` found that no data-parallel size fits.

    ``vpp`` is the number of virtual stages of a pipeline rank, ``None`` without interleaving.
    """

    tp: int
    pp: int
    vpp: int | None
    cp: int
    ep: int
    etp: int
    dp: int
    world_size: int
    sequence_parallel: bool = False
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False

    @property
    def pipeline_layout(self) -> tuple[int, ...] | None:
        """The layers of each virtual stage where they are named one by one; see `LaidOutTopology`."""
        return None

    @property
    def expert_dp(self) -> int:
        """Data-parallel size of the expert mesh."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def label(self) -> str:
        """The sizes above one in a few letters, such as ``TP2 PP2 DP1``."""
        sizes = [("TP", self.tp), ("PP", self.pp), ("VPP", self.vpp or 1), ("CP", self.cp), ("EP", self.ep)]
        shown = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.etp != self.tp:
            shown.append(f"ETP{self.etp}")
        return " ".join([*shown, f"DP{self.dp}"])

    @property
    def dense_sizes(self) -> dict[str, int]:
        """The attention mesh, its fastest dimension first."""
        return {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}

    @property
    def expert_sizes(self) -> dict[str, int]:
        """The expert mesh, its fastest dimension first."""
        return {"etp": self.etp, "ep": self.ep, "expert_dp": self.expert_dp, "pp": self.pp}

    def layers_of_stage(self, num_layers: int) -> list[int]:
        """How many transformer layers each pipeline stage holds; see `stages.layers_of_stage`."""
        return layers_of_stage(self, num_layers)


@dataclass(frozen=True)
class LaidOutTopology(Topology):
    """A mesh whose (virtual) stages are dealt out one by one.

    ``layout`` has their layers in the model's order, as Megatron's ``--pipeline-model-parallel-layout`` gives
    them. No job of ours can ask for it; published runs did.
    """

    layout: tuple[int, ...] = ()

    @property
    def pipeline_layout(self) -> tuple[int, ...]:
        """The layers of each virtual stage."""
        return self.layout


def resolve(request: TopologyRequest) -> tuple[Topology | None, list[Problem]]:
    """Fills in what follows from the rest: ``dp``, the world size, ``etp``, sequence parallelism.

    Where neither ``dp`` nor the world size is given, ``dp`` is the smallest for which the expert mesh fits
    too (1 without experts). Sequence parallelism follows ``tp > 1``. One virtual stage is no interleaving.

    Args:
        request: Any object with the fields of ``job.schema.TopologyConfig``.

    Returns:
        The topology, or ``None`` if a size is below one, and what is wrong with the request. A topology whose
        sizes do not multiply to its world size is returned all the same, so that `violations` can name the
        other problems too and `nearest_legal` can start from it; its ``dp`` is 0 if none fits.
    """
    optional = {"vpp", "dp", "etp", "world_size"}
    sizes = {key: getattr(request, key) for key in ("tp", "pp", "vpp", "dp", "cp", "ep", "etp", "world_size")}
    problems = [
        Problem(f"topology.{key}", f"must be at least 1, but is {size}", _positive_hint(key, optional))
        for key, size in sizes.items()
        if size is not None and size < 1
    ]
    if problems:
        return None, problems
    tp, pp, cp, ep, dp, world_size = (sizes[key] for key in ("tp", "pp", "cp", "ep", "dp", "world_size"))
    etp = sizes["etp"] or tp
    replica = tp * pp * cp
    if world_size is None:
        dp = dp or math.lcm(tp * cp, etp * ep) // (tp * cp)
        world_size = replica * dp
    elif world_size % replica:
        problems.append(_indivisible(tp, pp, cp, dp, world_size))
        dp = 0
    elif dp is None:
        dp = world_size // replica
    elif dp * replica != world_size:
        problems.append(_wrong_product(tp, pp, cp, dp, world_size))
        dp = world_size // replica
    sequence_parallel = request.sequence_parallel
    topology = Topology(
        tp=tp,
        pp=pp,
        vpp=None if sizes["vpp"] == 1 else sizes["vpp"],
        cp=cp,
        ep=ep,
        etp=etp,
        dp=dp,
        world_size=world_size,
        sequence_parallel=tp > 1 if sequence_parallel is None else sequence_parallel,
        decoder_first_pipeline_num_layers=request.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=request.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=request.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=request.account_for_loss_in_pipeline_split,
    )
    return topology, problems


def mesh_problems(topology: Topology) -> list[Problem]:
    """Whether both grids cover the ranks: rules 1 and 2 of ``initialize_model_parallel``."""
    problems = []
    tp, pp, cp, world_size = topology.tp, topology.pp, topology.cp, topology.world_size
    if topology.dp and topology.dp * tp * pp * cp != world_size:
        problems.append(_wrong_product(tp, pp, cp, topology.dp, world_size))
    block = topology.etp * topology.ep * pp
    follows_dense = topology.etp * topology.ep == tp and world_size % (tp * pp)
    if world_size % block and not follows_dense:
        step = math.lcm(block, tp * pp * cp)
        whose = "" if topology.etp != tp else " (etp follows tp where it is not given)"
        fits = [f"a world size that is a multiple of {step}"]
        if topology.etp > 1 and world_size % (topology.ep * pp) == 0:
            fits.append("topology.etp=1")
        sizes = [size for size in range(1, topology.ep) if world_size % (topology.etp * size * pp) == 0]
        if sizes:
            fits.append(f"topology.ep={sizes[-1]}")
        problems.append(
            Problem(
                "topology.ep",
                f"the expert mesh etp {topology.etp} x ep {topology.ep} x pp {pp} = {block} does not divide "
                f"the world size {world_size}{whose}",
                "what would fit: " + ", or ".join(fits),
            )
        )
    return problems


def _positive_hint(key: str, optional: set[str]) -> str:
    return f"leave it out (topology.{key}=null) to let it follow from the others" if key in optional else ""


def _indivisible(tp: int, pp: int, cp: int, dp: int | None, world_size: int) -> Problem:
    replica = tp * pp * cp
    below, above = world_size // replica * replica, -(-world_size // replica) * replica
    fits = " or ".join(str(size) for size in (below, above) if size)
    given = "" if dp is None else f" (with dp {dp} it would be {replica * dp})"
    return Problem(
        "topology.world_size",
        f"tp {tp} x pp {pp} x cp {cp} = {replica} does not divide the world size {world_size}{given}",
        f"use a multiple of {replica}, such as topology.world_size={fits}, or smaller tp, pp, cp",
    )


def _wrong_product(tp: int, pp: int, cp: int, dp: int, world_size: int) -> Problem:
    replica = tp * pp * cp
    fits = f"topology.dp={world_size // replica} or " if world_size % replica == 0 else ""
    return Problem(
        "topology.world_size",
        f"tp {tp} x pp {pp} x cp {cp} x dp {dp} = {replica * dp}, but the world size is {world_size}",
        f"use {fits}topology.world_size={replica * dp}, or give only one of the two",
    )
