"""Every legal configuration of a space, found by algebra: rules are asked for sizes, not for configurations.

A rule of ``topology/rules.py`` looks at few dimensions, so it is asked once for each of their values; what is
left to each mesh is that sizes multiply to the world. A test compares with asking `violations` of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaplug.plan.search.space import Layout, Space, divisors, layouts
from megaplug.topology import Topology
from megaplug.topology.rules import expert_problems, schedule_problems, sequence_problems, tensor_problems
from megaplug.topology.stages import layer_problems

NAMES = ("tp", "cp", "dp", "ep", "etp", "micro_batch_size")
Mesh = tuple[int, int, int, int, int, bool]
"""Sizes of tp, cp, dp, ep and etp, and sequence parallelism."""


@dataclass(frozen=True)
class Family:
    """Configurations that differ in sizes only: all of one pipeline, with or without sequence parallelism.

    Attributes:
        pp: Stages.
        vpp: Virtual stages, None without interleaving.
        layout: How layers are dealt out.
        sequence_parallel: Of all of them.
        sizes: By name (`NAMES`) a value for each configuration.
    """

    pp: int
    vpp: int | None
    layout: Layout
    sequence_parallel: bool
    sizes: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.sizes["tp"])

    def topology(self, world_size: int, **sizes: int) -> Topology:
        """The mesh of one configuration, or of all of them if sizes are columns."""
        layout = self.layout
        return Topology(
            tp=sizes["tp"],
            pp=self.pp,
            vpp=self.vpp,
            cp=sizes["cp"],
            ep=sizes["ep"],
            etp=sizes["etp"],
            dp=sizes["dp"],
            world_size=world_size,
            sequence_parallel=self.sequence_parallel,
            decoder_first_pipeline_num_layers=layout.first,
            decoder_last_pipeline_num_layers=layout.last,
            account_for_embedding_in_pipeline_split=layout.embedding,
            account_for_loss_in_pipeline_split=layout.loss,
        )


@dataclass(frozen=True)
class Legal:
    """What of a space is legal.

    Attributes:
        families: The configurations, each to be combined with every choice of recomputation.
        num_meshes: Pairs of grids, (tp, pp, cp, dp) and (etp, ep, pp), of which they are.
        rules: What was asked.
    """

    families: list[Family]
    num_meshes: int
    rules: Rules

    @property
    def num_configurations(self) -> int:
        """Without the choices of recomputation."""
        return sum(len(family) for family in self.families)


def legal(space: Space) -> Legal:
    """All that is legal in a space."""
    rules = Rules(space)
    families: list[Family] = []
    num_meshes = 0
    for pp in rules.pps:
        pipelines = list(rules.pipelines(pp))
        meshes = list(rules.meshes(pp)) if pipelines else []
        used: set[int] = set()
        for with_sp in (False, True):
            rows = [number for number, mesh in enumerate(meshes) if mesh[5] is with_sp]
            table = np.array([meshes[row][:5] for row in rows], dtype=np.int64).reshape(-1, 5)
            for layout, vpp in pipelines:
                family, held = _family(space, rules, (pp, vpp, layout), table, with_sp)
                used |= {rows[row] for row in held}
                families += [family] if len(family) else []
        num_meshes += len(used)
    return Legal(families, num_meshes, rules)


def _family(
    space: Space,
    rules: Rules,
    pipeline: tuple[int, int | None, Layout],
    meshes: NDArray[np.int64],
    with_sp: bool,
) -> tuple[Family, NDArray[np.intp]]:
    """Meshes with every size of a microbatch that the schedule takes, and which of the meshes there are."""
    pp, vpp, layout = pipeline
    parts, held = [], []
    for size in space.micro_batches:
        fits = [dp for dp in set(meshes[:, 2].tolist()) if rules.schedule_fits(pp, vpp, dp, size)]
        rows = np.flatnonzero(np.isin(meshes[:, 2], fits))
        parts.append(np.column_stack([meshes[rows], np.full(len(rows), size)]))
        held.append(rows)
    table = np.concatenate(parts) if parts else np.empty((0, len(NAMES)), dtype=np.int64)
    sizes = {name: table[:, number] for number, name in enumerate(NAMES)}
    return Family(pp, vpp, layout, with_sp, sizes), np.unique(np.concatenate(held)) if held else np.empty(
        0, int
    )


class Rules:
    """The rules, each asked for the sizes that it looks at.

    Attributes:
        pps: Numbers of stages that divide the ranks.
        cuts: By tp, those sizes of cp that cut the sequence, and whether sequence parallelism does, too.
        experts: By tp, pairs of ep and etp.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.shape = space.shape
        self.world_size = space.world_size
        sizes = divisors(space.world_size)
        self.pps = [pp for pp in space.sizes("pp", sizes) if pp >= 1 and self.world_size % pp == 0]
        self.cps = space.sizes("cp", sizes)
        # (tp, sequence parallelism) of what tensor parallelism divides
        self.tps = [
            (tp, with_sp)
            for tp in space.sizes("tp", sizes)
            for with_sp in self._with_sp(tp)
            if not any(tensor_problems(self._single(tp=tp, sequence_parallel=with_sp), self.shape))
        ]
        self.cuts = {tp: self._cuts(tp) for tp in {tp for tp, _ in self.tps}}
        self.experts = {tp: self._experts(tp, sizes) for tp in self.cuts}
        self._schedules: dict[tuple[int, int | None, int, int], bool] = {}

    def meshes(self, pp: int) -> Iterator[Mesh]:
        """All that a number of stages leaves to the other dimensions."""
        of_stage = self.world_size // pp
        wanted_dp = self.space.fixed.get("dp")
        for tp, cuts in self.cuts.items():
            experts = [pair for pair in self.experts[tp] if of_stage % (pair[0] * pair[1]) == 0]
            for cp, with_sp in cuts:
                dp, rest = divmod(of_stage, tp * cp)
                if rest == 0 and dp >= 1 and (wanted_dp is None or dp == wanted_dp):
                    for ep, etp in experts:
                        yield tp, cp, dp, ep, etp, with_sp

    def pipelines(self, pp: int) -> Iterator[tuple[Layout, int | None]]:
        """Every way of dealing the layers out to stages and to virtual stages."""
        num_layers = self.shape.num_layers
        fixed = self.space.layout
        for layout in layouts(num_layers, pp) if fixed is None else [fixed]:
            for vpp in self._vpps(pp):
                mesh = replace(
                    self._single(pp=pp, vpp=vpp),
                    decoder_first_pipeline_num_layers=layout.first,
                    decoder_last_pipeline_num_layers=layout.last,
                    account_for_embedding_in_pipeline_split=layout.embedding,
                    account_for_loss_in_pipeline_split=layout.loss,
                )
                if not layer_problems(mesh, num_layers):
                    yield layout, vpp

    def schedule_fits(self, pp: int, vpp: int | None, dp: int, micro_batch_size: int) -> bool:
        """Whether the batch can be cut so, and the pipeline can run it."""
        key = (pp, vpp, dp, micro_batch_size)
        if key not in self._schedules:
            mesh = self._single(pp=pp, vpp=vpp, dp=dp)
            batch = self.space.batch(micro_batch_size)
            self._schedules[key] = not any(schedule_problems(mesh, batch, self.space.overlap_p2p_comm))
        return self._schedules[key]

    def _vpps(self, pp: int) -> list[int | None]:
        if "vpp" in self.space.fixed:
            return [self.space.fixed["vpp"] or None]
        most = -(-(self.shape.num_layers + 2) // pp)
        return [None, *(range(2, most + 1) if pp > 1 else ())]

    def _with_sp(self, tp: int) -> list[bool]:
        wanted = self.space.sequence_parallel
        return [False, True] if wanted is None and tp > 1 else [bool(wanted)]

    def _cuts(self, tp: int) -> list[tuple[int, bool]]:
        """Sizes of cp, with sequence parallelism where the sequence can be cut for it, else without."""
        found = []
        for cp in self.cps:
            fits = [
                with_sp
                for other, with_sp in self.tps
                if other == tp
                and not any(
                    sequence_problems(self._single(tp=tp, cp=cp, sequence_parallel=with_sp), self.shape)
                )
            ]
            if fits:
                found.append((cp, max(fits)))
        return found

    def _experts(self, tp: int, sizes: list[int]) -> list[tuple[int, int]]:
        """Pairs of ep and etp; without experts etp follows tp."""
        etps = self.space.sizes("etp", sizes if self.shape.is_moe else [tp])
        found = []
        for ep in self.space.sizes("ep", sizes if self.shape.is_moe else [1]):
            for etp in etps:
                mesh = self._single(tp=tp, ep=ep, etp=etp, sequence_parallel=tp > 1)
                if not any(expert_problems(mesh, self.shape)):
                    found.append((ep, etp))
        return found

    def _single(self, *, tp: int = 1, etp: int | None = None, **sizes: Any) -> Topology:
        """A mesh that says something only of the given dimensions."""
        values = {"pp": 1, "vpp": None, "cp": 1, "ep": 1, "dp": 1} | sizes
        world_size = tp * values["pp"] * values["cp"] * values["dp"]
        return Topology(tp=tp, etp=etp or tp, world_size=world_size, **values)
