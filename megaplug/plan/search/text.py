"""The answer of a search for a person."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megaplug.job.schema import Job
from megaplug.plan.cluster import Cluster
from megaplug.plan.search.answer import BY_TIME, Answer, Row
from megaplug.plan.search.chosen import words
from megaplug.plan.units import GIB, gib, percent, short, span
from megaplug.plan.workload import Recompute, Workload

_COLUMNS = (
    "",
    "step s",
    "tokens/s",
    "MFU",
    "GiB",
    "bubble",
    "training",
    "US dollars",
    "layout",
    "batch",
    "computed again",
)
_LEFT = {"", "layout", "computed again"}
# Rules that are named; the others are counted together.
_RULES = 4


def answer_text(answer: Answer, job: Job, cluster: Cluster, command: str, typed: Collection[str]) -> str:
    """The table, what stands below it, and the words that reproduce each row.

    Args:
        answer: What was found; it has rows.
        job: The job that was asked about.
        cluster: The machines.
        command: What the words of a row are typed after.
        typed: The words in it, which are not repeated.
    """
    lines = [*_heading(answer, job, cluster), "", *_considered(answer, cluster), ""]
    lines += _table(answer.rows, 1)
    if any(row.on_front for row in answer.rows):
        lines.append("*  none that fits needs less memory and less time: the Pareto front")
    if any(row.near_first for row in answer.rows[1:]):
        error = percent(answer.error or 0.0)
        lines.append(f"~  within the error of the first ({error}): measure before you choose")
    nodes = _nodes(answer.rows[0], cluster)
    where = f" on {nodes}" if nodes else ""
    lines += ["", f"To start one{where}: {command} and", *_numbered(answer.rows, job, 1, typed)]
    if rest := [row for row in answer.front if row not in answer.rows]:
        shown = spread(rest, len(answer.rows))
        start = len(answer.rows) + 1
        some = "all" if len(shown) == len(rest) else f"{len(shown)} of {len(rest)}"
        lines += ["", f"Slower, with less memory ({some} others of the Pareto front):"]
        lines += [*_table(shown, start), *_numbered(shown, job, start, typed)]
    return "\n".join(lines)


def _heading(answer: Answer, job: Job, cluster: Cluster) -> list[str]:
    """What was asked, and how well the order is known."""
    workload = answer.rows[0].workload
    error = "its error is not known" if answer.error is None else f"mean error {percent(answer.error)}"
    how = f"{answer.ranked_by}, {error}" if answer.ranked_by == BY_TIME else answer.ranked_by
    nodes = _nodes(answer.rows[0], cluster)
    lines = [
        f"{job.model.name} on {workload.topology.world_size:,} {unit(cluster)} of {cluster.name}"
        f"{f' ({nodes})' if nodes else ''}, {workload.precision.compute}, "
        f"{workload.batch.global_batch_size:,} sequences of {workload.shape.seq_length:,} tokens a step",
        f"ordered by {how}; memory is modelled, too",
    ]
    return [*lines, answer.note] if answer.note else lines


def _considered(answer: Answer, cluster: Cluster) -> list[str]:
    """How many there are, which rules forbid how many, and how many do not fit."""
    tally, space = answer.tally, answer.space
    sizes = "TP x PP x CP x DP, with EP x ETP for the experts" if space.shape.is_moe else "TP x PP x CP x DP"
    lines = [f"{tally.num_grids:,} ways to cut {space.world_size:,} ranks into {sizes}"]
    rules = list(tally.broken.items())
    lines += [f"  {-count:<+8,}{rule}" for rule, count in rules[:_RULES]]
    if others := sum(count for _, count in rules[_RULES:]):
        lines.append(f"  {-others:<+8,}other rules")
    sizes = ", ".join(map(str, space.micro_batches))
    again = len(space.recomputes)
    lines += [
        f"{tally.num_legal:,} are legal: {answer.num_legal:,} configurations with their pipelines, "
        f"microbatches of {sizes}, and {again} choice{'s' * (again > 1)} of what is computed again",
        f"{answer.num_fit:,} of them fit into {gib(cluster.usable_memory)} GiB ({answer.seconds:.1f} s)",
    ]
    for reason, count in answer.refused.items():
        lines.append(f"  {-count:<+8,}of the best, left out: {reason.splitlines()[0]}")
    if answer.gave_up:
        lines.append("  so many that the search stopped there: better ones may be left")
    return lines


def unit(cluster: Cluster) -> str:
    """What ranks run on."""
    return "GPUs" if cluster.device == "cuda" else "cores"


def _nodes(row: Row, cluster: Cluster) -> str:
    several = row.plan.num_nodes > 1
    return f"{row.plan.num_nodes:,} nodes of {cluster.gpus_per_node}" if several else ""


def layout(workload: Workload) -> str:
    """The mesh in a few letters, with what is uneven about its stages."""
    topology = workload.topology
    text = topology.label if workload.shape.is_moe else topology.label.replace(f" ETP{topology.tp}", "")
    counts = topology.layers_of_stage(workload.shape.num_layers)
    if len(set(counts)) > 1:
        first, last = counts[0], counts[-1]
        text += f" ({first},{counts[1]}..,{last})" if len(counts) > 2 else f" ({first},{last})"
    return text


def recompute(choice: Recompute) -> str:
    """What is computed again, in a word or two."""
    return "+".join(choice.modules) if choice.modules else choice.granularity or "nothing"


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """So many of them at most, evenly spread, the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[(number + 1) * len(rows) // most - 1] for number in range(most)]


def _table(rows: Sequence[Row], start: int) -> list[str]:
    cells = [_COLUMNS, *(_cells(row, number) for number, row in enumerate(rows, start))]
    used = [column for column in range(len(_COLUMNS)) if any(cell[column] for cell in cells[1:])]
    widths = [max(len(cell[column]) for cell in cells) for column in used]
    return [
        "  ".join(
            cell[column].ljust(width) if _COLUMNS[column] in _LEFT else cell[column].rjust(width)
            for column, width in zip(used, widths, strict=True)
        ).rstrip()
        for cell in cells
    ]


def _cells(row: Row, number: int) -> tuple[str, ...]:
    plan, time = row.plan, row.time
    mark = ("*" if row.on_front else "") + ("~" if row.near_first and number > 1 else "")
    timed = ("", "", "", "")
    if time is not None and plan.tokens_per_second is not None:
        seconds = f"{time.total:,.3g}" if time.total < 100 else f"{time.total:,.0f}"
        timed = (
            seconds,
            f"{plan.tokens_per_second:,.0f}",
            percent(plan.mfu["causal"]),
            percent(time.bubble / time.total),
        )
    return (
        f"{number}{mark}",
        *timed[:3],
        f"{row.memory.total / GIB:,.2f}",
        timed[3],
        "" if plan.seconds is None else span(plan.seconds),
        "" if plan.dollars is None else short(plan.dollars),
        layout(row.workload),
        str(row.workload.batch.micro_batch_size),
        recompute(row.workload.recompute),
    )


def _numbered(rows: Sequence[Row], job: Job, start: int, typed: Collection[str]) -> list[str]:
    return [
        f"{number:3}  {' '.join(word for word in words(row.workload, job) if word not in typed)}"
        for number, row in enumerate(rows, start)
    ]
