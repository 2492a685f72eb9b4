"""Which layers a pipeline stage holds, even, uneven and interleaved.

Follows ``get_num_layers_to_build`` and ``get_transformer_layer_offset`` of Megatron-core 0.19 (in
``core/transformer/transformer_block.py`` and ``transformer_layer.py``).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from megaplug.errors import Problem, UserError

if TYPE_CHECKING:
    from megaplug.topology.mesh import Topology

FIRST = "topology.decoder_first_pipeline_num_layers"
LAST = "topology.decoder_last_pipeline_num_layers"
EMBEDDING = "account_for_embedding_in_pipeline_split"
LOSS = "account_for_loss_in_pipeline_split"


def layer_problems(topology: Topology, num_layers: int) -> list[Problem]:
    """Whether the layers can be dealt out to the stages, and to their virtual stages."""
    if topology.pipeline_layout is not None:
        return _layout_problems(topology, topology.pipeline_layout, num_layers)
    first, last = topology.decoder_first_pipeline_num_layers, topology.decoder_last_pipeline_num_layers
    if first is None and last is None:
        return _even_problems(topology, num_layers)
    return _uneven_problems(topology, num_layers)


def layers_of_stage(topology: Topology, num_layers: int) -> list[int]:
    """How many transformer layers each pipeline stage holds, first stage first.

    Raises:
        UserError: If the layers cannot be dealt out so.
    """
    problems = layer_problems(topology, num_layers)
    if problems:
        raise UserError.from_problems(problems)
    pp = topology.pp
    if topology.pipeline_layout is not None:
        return [sum(topology.pipeline_layout[stage::pp]) for stage in range(pp)]
    first, last = topology.decoder_first_pipeline_num_layers, topology.decoder_last_pipeline_num_layers
    named = (first is not None) + (last is not None)
    middle = num_layers - (first or 0) - (last or 0) + _extra(topology)
    counts = [middle // (pp - named) if pp > named else 0] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    counts[0] -= topology.account_for_embedding_in_pipeline_split
    counts[-1] -= topology.account_for_loss_in_pipeline_split
    return counts


def layer_ids(topology: Topology, num_layers: int, stage: int) -> list[list[int]]:
    """The layers (from 0) that a stage holds, one list for each of its virtual stages.

    Raises:
        UserError: If the layers cannot be dealt out so.
    """
    chunks, vpp = [], topology.vpp or 1
    if topology.pipeline_layout is not None:
        layers_of_stage(topology, num_layers)
        ends = list(accumulate(topology.pipeline_layout, initial=0))
        return [
            list(range(*ends[chunk : chunk + 2])) for chunk in range(stage, topology.pp * vpp, topology.pp)
        ]
    padded = layers_of_stage(topology, num_layers)
    padded[0] += topology.account_for_embedding_in_pipeline_split
    padded[-1] += topology.account_for_loss_in_pipeline_split
    start = 0
    for chunk in range(vpp):
        for holder, count in enumerate(padded):
            size = count // vpp
            if holder == 0 and chunk == 0:
                size -= topology.account_for_embedding_in_pipeline_split
            if holder == topology.pp - 1 and chunk == vpp - 1:
                size -= topology.account_for_loss_in_pipeline_split
            if holder == stage:
                chunks.append(list(range(start, start + size)))
            start += size
    return chunks


def _layout_problems(topology: Topology, layout: tuple[int, ...], num_layers: int) -> list[Problem]:
    chunks = topology.pp * (topology.vpp or 1)
    if len(layout) == chunks and sum(layout) == num_layers and min(layout) >= 0:
        return []
    return [
        Problem(
            "topology.pipeline_layout",
            f"{len(layout)} stages with {sum(layout)} layers are named for {chunks} (pp {topology.pp} x vpp "
            f"{topology.vpp or 1}) and a model of {num_layers}",
            "name the layers of every stage",
        )
    ]


def _extra(topology: Topology) -> int:
    return topology.account_for_embedding_in_pipeline_split + topology.account_for_loss_in_pipeline_split


def _even_problems(topology: Topology, num_layers: int) -> list[Problem]:
    pp, vpp, extra = topology.pp, topology.vpp or 1, _extra(topology)
    shown = f"{num_layers} layers" + (f" + {extra} for embedding and loss" if extra else "")
    if (num_layers + extra) % pp:
        return [
            Problem(
                "topology.pp",
                f"{shown} cannot be dealt out evenly to {pp} stages: {num_layers + extra} / {pp} leaves "
                f"{(num_layers + extra) % pp}",
                _layout_hint(pp, num_layers, extra),
            )
        ]
    per_stage = (num_layers + extra) // pp
    if pp > 1 and per_stage % vpp:
        fits = [size for size in range(2, per_stage + 1) if per_stage % size == 0]
        return [
            Problem(
                "topology.vpp",
                f"{shown} on {pp} stages are {per_stage} a stage, which {vpp} virtual stages do not divide",
                f"virtual stages that fit: {_listed(fits) or 'none'}",
            )
        ]
    return []


def _uneven_problems(topology: Topology, num_layers: int) -> list[Problem]:
    pp, vpp = topology.pp, topology.vpp or 1
    named = {
        key: count
        for key, count in (
            (FIRST, topology.decoder_first_pipeline_num_layers),
            (LAST, topology.decoder_last_pipeline_num_layers),
        )
        if count is not None
    }
    problems = [
        Problem(key, f"must be at least 1, but is {count}") for key, count in named.items() if count < 1
    ]
    if _extra(topology):
        problems.append(
            Problem(
                next(iter(named)),
                "cannot be set together with account_for_{embedding,loss}_in_pipeline_split",
                "use one way or the other to make stages uneven",
            )
        )
    stages, rest = pp - len(named), num_layers - sum(named.values())
    given = " and ".join(f"{key.split('_')[1]} {count}" for key, count in named.items())
    key = next(iter(named))
    if stages < 0:
        # Megatron reads the last stage's count alone.
        by_accident = named[LAST] == num_layers
        problems.append(
            Problem(
                key,
                f"first and last stage are named, but there is only pp {pp}"
                + ("; Megatron accepts it and leaves the first one's count unread" if by_accident else ""),
                "set topology.pp=2",
                megatron_accepts=by_accident,
            )
        )
    elif rest < 0 or (rest > 0) != (stages > 0) or (stages and rest % stages):
        problems.append(
            Problem(
                key,
                f"with {given} on their stages, {rest} of {num_layers} layers remain for {stages} others"
                + (f", {rest} / {stages} leaves {rest % stages}" if stages and rest > 0 else ""),
                _named_hint(pp, num_layers, tuple(named.values())),
            )
        )
    else:
        counts = {**named, **({"": rest // stages} if stages else {})}
        odd = {name: count for name, count in counts.items() if count % vpp}
        problems += [
            Problem(
                name or "topology.vpp", f"{count} layers on a stage, which {vpp} virtual stages do not divide"
            )
            for name, count in odd.items()
        ]
        if vpp > 1 and len(named) == 2 and pp == 2:
            problems.append(
                Problem(
                    "topology.vpp",
                    "with pp 2, first and last counts and virtual stages together Megatron-core 0.19 divides "
                    "by zero (get_transformer_layer_offset has no middle stage to count)",
                    f"give only {FIRST}; the other stage holds the rest",
                )
            )
    return problems


def _named_hint(pp: int, num_layers: int, named: tuple[int, ...]) -> str:
    """Pipeline sizes with which what first and last stage leave is shared evenly by the others."""
    rest = num_layers - sum(named)
    if rest < 0:
        return f"the named stages hold more than all {num_layers} layers: give them fewer"
    shares = [size for size in range(1, rest + 1) if rest % size == 0] if rest else [0]
    sizes = [size + len(named) for size in shares]
    return f"pipeline sizes that fit: {_nearest(sizes, pp)}"


def _nearest(sizes: list[int], pp: int) -> str:
    return _listed([size for size in sizes if size < pp][-3:] + [size for size in sizes if size > pp][:2])


def _layout_hint(pp: int, num_layers: int, extra: int) -> str:
    """Pipeline sizes that divide the layers, and uneven stages for the size that was asked for."""
    fits = [size for size in range(1, num_layers + extra + 1) if (num_layers + extra) % size == 0]
    hints = [f"pipeline sizes that fit: {_nearest(fits, pp)}"]
    if extra == 0:
        hints += _uneven_hints(pp, num_layers)
    return "; ".join(hints)


def uneven_layout(pp: int, num_layers: int) -> dict[str, int | bool]:
    """Uneven stages for layers that ``pp`` stages cannot share evenly, under the field names of a topology.

    Embedding and loss count as layers where that makes the shares even; otherwise first and last stage hold
    equally many or, where that cannot be, the last one fewer (it has the loss besides); both at least half of
    what the others do and no more.

    Returns:
        Nothing where neither works, or where the shares are even already.
    """
    if num_layers % pp == 0:
        return {}
    both = {EMBEDDING: True, LOSS: True}
    for flags in (both, {LOSS: True}) if pp > 1 else ():
        padded = num_layers + len(flags)
        if padded % pp == 0 and padded > pp:
            return dict(flags)
    for end in range(num_layers // 2, 0, -1) if pp > 2 else ():
        middle, rest = divmod(num_layers - 2 * end, pp - 2)
        if rest == 0 and end <= middle <= 2 * end:
            return _ends(end, end)
    for middle in range(-(-num_layers // pp), num_layers) if pp > 2 else ():
        ends = num_layers - (pp - 2) * middle
        if 2 * -(-middle // 2) <= ends <= 2 * middle:
            return _ends(-(-ends // 2), ends // 2)
    return {}


def _ends(first: int, last: int) -> dict[str, int | bool]:
    return {FIRST.split(".")[1]: first, LAST.split(".")[1]: last}


def _uneven_hints(pp: int, num_layers: int) -> list[str]:
    layout = uneven_layout(pp, num_layers)
    if not layout:
        return []
    typed = " and ".join(f"topology.{key}={str(value).lower()}" for key, value in layout.items())
    if LOSS in layout:
        padded = num_layers + len(layout)
        return [f"with {typed} it is {padded} = {pp} x {padded // pp}"]
    return [f"uneven: {typed} leave {pp - 2} stages of {(num_layers - sum(layout.values())) // (pp - 2)}"]


def _listed(sizes: list[int]) -> str:
    return ", ".join(str(size) for size in sizes)
