"""The answer of a search for a person, and for a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaplug.job.schema import Job
from megaplug.plan.cluster import Cluster
from megaplug.plan.plan import make_plan
from megaplug.plan.search.answer import BY_TIME, Answer, Row
from megaplug.plan.search.chosen import words
from megaplug.plan.workload import Recompute

GIB = 1024**3
_NAMES = ("", "step s", "tokens/s", "MFU", "GiB", "bubble", "layout", "batch", "computed again")


def answer_text(answer: Answer, job: Job, cluster: Cluster, command: str) -> str:
    """The table, what stands below it, and the words that reproduce each row.

    Args:
        answer: What was found; it has rows.
        job: The job that was asked about.
        cluster: The machines.
        command: What the words of a row are typed after.
    """
    others = [row for row in answer.front if not _among(row, answer.rows)]
    lines = [heading(answer, job, cluster), ""]
    lines += _table(answer.rows, cluster)
    if any(row.on_front for row in answer.rows):
        lines.append("*  none that fits needs less memory and less time")
    if any(row.near_first for row in answer.rows[1:]):
        lines.append(
            f"~  within the error of the first ({_percent(answer.error)}): measure before you choose"
        )
    lines += ["", f"To start one: {command} and", *_numbered(answer.rows, job, 1)]
    if others:
        start = len(answer.rows) + 1
        rest = answer.num_front - len(answer.front)
        more = f", {rest} more with still less memory" if rest else ""
        lines += ["", f"Slower, with less memory (the rest of the Pareto front{more}):"]
        lines += [*_table(others, cluster, start), *_numbered(others, job, start)]
    return "\n".join(lines)


def heading(answer: Answer, job: Job, cluster: Cluster) -> str:
    """What was searched and how well its order is known."""
    workload = answer.rows[0].workload
    error = "its error is not known" if answer.error is None else f"mean error {_percent(answer.error)}"
    how = f"{answer.ranked_by}, {error}" if answer.ranked_by == BY_TIME else answer.ranked_by
    unit = "GPUs" if cluster.device == "cuda" else "cores"
    lines = [
        f"{job.model.name} on {workload.topology.world_size:,} {unit} of {cluster.name}, "
        f"{workload.batch.global_batch_size:,} sequences of {workload.shape.seq_length:,} tokens a step",
        f"{answer.num_legal:,} legal configurations ({answer.num_meshes:,} meshes of {answer.num_grids:,} "
        f"pairs of grids), {answer.num_fit:,} fit into {cluster.usable_memory / GIB:.1f} GiB; "
        f"{answer.seconds:.1f} s",
        f"ordered by {how}; memory is modelled, too",
    ]
    if answer.note:
        lines.append(answer.note)
    if answer.refused:
        lines.append(f"{answer.refused} better ones are left out: other keys of the job forbid them")
    return "\n".join(lines)


def mfu(row: Row, cluster: Cluster) -> float | None:
    """Model FLOP/s (causal) as a part of the peak; None where no time is modelled."""
    return make_plan(row.workload, cluster).mfu.get("causal")


def bubble(row: Row) -> float | None:
    """The part of a step in which a stage waits for the others."""
    return None if row.time is None else row.time.bubble / row.time.total


def answer_json(answer: Answer, job: Job, cluster: Cluster) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "model": job.model.name,
        "cluster": cluster.name,
        "ranked_by": answer.ranked_by,
        "time_error": answer.error,
        "note": answer.note,
        "grids": answer.num_grids,
        "meshes": answer.num_meshes,
        "configurations_legal": answer.num_legal,
        "configurations_that_fit": answer.num_fit,
        "left_out": answer.refused,
        "search_seconds": answer.seconds,
        "flops": "causal",
        "rows": [_row_json(row, job, cluster) for row in answer.rows],
        "pareto_front_size": answer.num_front,
        "pareto_front": [_row_json(row, job, cluster) for row in answer.front],
    }


def _row_json(row: Row, job: Job, cluster: Cluster) -> dict[str, Any]:
    topology = row.workload.topology
    return {
        "overrides": words(row.workload, job),
        "layout": layout(row),
        "micro_batch_size": row.workload.batch.micro_batch_size,
        "recompute": recompute(row.workload.recompute),
        "world_size": topology.world_size,
        "step_seconds_modelled": None if row.time is None else row.time.total,
        "tokens_per_second_modelled": row.tokens_per_second,
        "mfu_causal_modelled": mfu(row, cluster),
        "bubble_modelled": bubble(row),
        "memory_bytes_per_rank_modelled": row.memory.total,
        "fullest_stage": row.memory.stage,
        "on_pareto_front": row.on_front,
        "within_the_error_of_the_first": row.near_first,
    }


def layout(row: Row) -> str:
    """The mesh in a few letters, with what is uneven about its stages."""
    topology = row.workload.topology
    text = topology.label if row.workload.shape.is_moe else topology.label.replace(f" ETP{topology.tp}", "")
    counts = topology.layers_of_stage(row.workload.shape.num_layers)
    if len(set(counts)) > 1:
        first, last = counts[0], counts[-1]
        text += f" ({first},{counts[1]}..,{last})" if len(counts) > 2 else f" ({first},{last})"
    return text


def recompute(choice: Recompute) -> str:
    """What is computed again, in a word or two."""
    return "+".join(choice.modules) if choice.modules else choice.granularity or "nothing"


def _among(row: Row, rows: Sequence[Row]) -> bool:
    return any(row.workload == other.workload for other in rows)


def _table(rows: Sequence[Row], cluster: Cluster, start: int = 1) -> list[str]:
    cells = [_NAMES, *(_cells(row, number, cluster) for number, row in enumerate(rows, start))]
    used = [column for column in range(len(_NAMES)) if any(cell[column] for cell in cells[1:])]
    widths = [max(len(cell[column]) for cell in cells) for column in used]
    left = {0, 6, 8}
    return [
        "  ".join(
            cell[column].ljust(width) if column in left else cell[column].rjust(width)
            for column, width in zip(used, widths, strict=True)
        ).rstrip()
        for cell in cells
    ]


def _cells(row: Row, number: int, cluster: Cluster) -> tuple[str, ...]:
    mark = ("*" if row.on_front else "") + ("~" if row.near_first and number > 1 else "")
    rate, share, waits = row.tokens_per_second, mfu(row, cluster), bubble(row)
    return (
        f"{number}{mark}",
        ""
        if row.time is None
        else f"{row.time.total:,.3g}"
        if row.time.total < 100
        else f"{row.time.total:,.0f}",
        "" if rate is None else f"{rate:,.0f}",
        "" if share is None else _percent(share),
        f"{row.memory.total / GIB:.2f}",
        "" if waits is None else _percent(waits),
        layout(row),
        str(row.workload.batch.micro_batch_size),
        recompute(row.workload.recompute),
    )


def _numbered(rows: Sequence[Row], job: Job, start: int) -> list[str]:
    return [f"{number:3}  {' '.join(words(row.workload, job))}" for number, row in enumerate(rows, start)]


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.1f} %"
