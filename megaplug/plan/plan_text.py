"""A plan on one screen, for a person who may never have used Megatron; see `glossary` for its words."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields

from megaplug.plan.memory import StageMemory
from megaplug.plan.plan import DAY, Plan, StagePlan
from megaplug.plan.units import GIB, digits, gib, in_words, mib, money, percent, short, span

WIDTH = 92
# Stages that have a column of their own; more are shown by the first, the fullest and the last.
_COLUMNS = 8
_LABEL = 15
# A bubble below which nothing is proposed.
_LITTLE = 0.05
_ON_CPU = "on the CPU"

PARTS = tuple(field.name for field in fields(StageMemory) if field.name not in ("stage", "on_cpu"))
"""The parts of a rank's memory, in order."""

TIMES = {
    "compute": "computing",
    "tp": "tensor-parallel traffic",
    "cp": "context-parallel traffic",
    "ep": "tokens to experts",
    "pp": "between stages",
    "bubble": "pipeline bubble",
    "dp": "gradients and weights",
    "optimizer": "optimizer",
}
"""The parts of a step's time, by their names in `StepTime`."""


def plan_text(plan: Plan) -> str:
    """The plan in about 24 lines of at most `WIDTH` characters."""
    return "\n".join(
        [
            *_head(plan),
            "",
            *labelled(_size_rows(plan)),
            "",
            *_memory_table(plan),
            "",
            *_time_lines(plan),
            *labelled(_cost_rows(plan)),
        ]
    )


def rank_memory(plan: Plan) -> str:
    """What the fullest rank holds, in a line."""
    memory = plan.fullest.memory
    unit, of_unit = _memory_unit(plan)
    parts = [f"{name} {of_unit(getattr(memory, name))}" for name in PARTS if getattr(memory, name)]
    if memory.on_cpu:
        parts.append(f"and on the CPU {of_unit(memory.on_cpu)}")
    where = f" of stage {plan.fullest.stage}" if len(plan.stages) > 1 else ""
    return f"{of_unit(memory.total)} {unit} a rank{where} (modelled; {', '.join(parts)})"


def short_rows(plan: Plan) -> list[tuple[str, str]]:
    """The plan in a few rows, for the header of a run."""
    fits = f"{gib(plan.cluster.usable_memory)} GiB usable on {plan.cluster.name}"
    rows = [("memory", f"{rank_memory(plan)}; {fits}")]
    if plan.time is not None:
        speed = f"{short(plan.tokens_per_second or 0)} tokens/s, MFU {percent(plan.mfu['causal'])} causal"
        bubble = f"bubble {percent(plan.time.bubble / plan.time.total)}, " if len(plan.stages) > 1 else ""
        rows.append(("step time", f"{_step(plan)}; {bubble}{speed}"))
        if plan.seconds is not None:
            rows.append(("duration", _duration(plan)))
    return rows


def verdict(plan: Plan) -> str:
    """One line: whether it works, and how close it is."""
    spare, unit = plan.spare_memory, _unit(plan)
    of = f"{gib(plan.fullest.memory.total)} of {gib(plan.cluster.usable_memory)} GiB usable on a {unit}"
    if spare < 0:
        return f"DOES NOT FIT: {of}, {gib(-spare)} GiB too much"
    if plan.problems:
        return "IMPOSSIBLE: " + plan.problems[0].message
    return f"works: {of}, {gib(spare)} GiB to spare"


def _head(plan: Plan) -> list[str]:
    job, cluster = plan.workload, plan.cluster
    unit = _unit(plan) + ("s" if plan.world_size > 1 else "")
    nodes = f" in {plan.num_nodes:,} nodes of {cluster.gpus_per_node}" if plan.num_nodes > 1 else ""
    device = f"{plan.world_size:,} {cluster.name} {unit}{nodes}"
    return [f"{device}: {job.topology.label}, {job.precision.compute}", verdict(plan)]


def _size_rows(plan: Plan) -> list[tuple[str, str]]:
    job = plan.workload
    largest = max(plan.stages, key=lambda stage: stage.parameters)
    active = f", {in_words(plan.active)} active in a token" if plan.active != plan.parameters else ""
    ranks = f"; a rank holds {in_words(largest.parameters)}"
    if len(plan.stages) > 1:
        ranks += " at most"
    many = job.num_microbatches
    microbatches = _microbatches(many)
    each = f" on each of {job.topology.dp:,} replicas" if job.topology.dp > 1 else ""
    rows = [
        ("parameters", f"{in_words(plan.parameters)}{active}{ranks} (counted)"),
        (
            "batch",
            f"{job.batch.global_batch_size:,} sequences of {job.shape.seq_length:,} tokens a step: "
            f"{microbatches} of {job.batch.micro_batch_size:,}{each}",
        ),
    ]
    return [*rows, ("pipeline", _pipeline(plan))] if len(plan.stages) > 1 else rows


def _pipeline(plan: Plan) -> str:
    """What of a step is waiting, and the batch with which that is little."""
    job = plan.workload
    many = job.num_microbatches
    text = (
        f"{_microbatches(many)} in {job.topology.pp} stages: if all stages were equal, "
        f"{percent(plan.bubble)} of a step would be bubble (waiting)"
    )
    if plan.bubble <= _LITTLE:
        return text
    enough = plan.microbatches_for(_LITTLE)
    batch = enough * job.batch.micro_batch_size * job.topology.dp
    return f"{text}; 5 % takes {enough:,} microbatches: train.global_batch_size={batch}"


def _memory_table(plan: Plan) -> list[str]:
    groups = _shown(_groups(plan.stages), plan.fullest)
    shown = [max(group, key=lambda stage: stage.memory.total) for group in groups]
    unit, of_unit = _memory_unit(plan)
    rows: list[tuple[str, list[str]]] = []
    title = f"{unit} of a rank (modelled)"
    if len(plan.stages) > 1:
        grouped = "; of stages in one column the fullest" if any(len(group) > 1 for group in groups) else ""
        title = f"{unit} of a rank of each pipeline stage (modelled{grouped})"
        rows = [("stage", [_name(group) for group in groups]), ("layers", [str(s.layers) for s in shown])]
    for part in (*PARTS, "total", "on_cpu"):
        values = [getattr(stage.memory, part) for stage in shown]
        if any(values):
            rows.append((_ON_CPU if part == "on_cpu" else part, [of_unit(v) if v else "-" for v in values]))
    width = max(len(value) for _, values in rows for value in values) + 2
    lines = [f"{'memory':<{_LABEL}}{title}"]
    for name, values in rows:
        lines.append(f"  {name:<{_LABEL - 2}}" + "".join(f"{value:>{width}}" for value in values))
    return lines


def _name(group: Sequence[StagePlan]) -> str:
    return str(group[0].stage) if len(group) == 1 else f"{group[0].stage}-{group[-1].stage}"


def _groups(stages: Sequence[StagePlan]) -> list[list[StagePlan]]:
    """Neighbours that hold the same layers and weights; their activations may differ."""
    groups: list[list[StagePlan]] = []
    for stage in stages:
        last = groups[-1][-1] if groups else None
        same = last is not None and (last.layers, last.parameters) == (stage.layers, stage.parameters)
        if same and len(stages) > _COLUMNS:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _shown(groups: list[list[StagePlan]], fullest: StagePlan) -> list[list[StagePlan]]:
    """At most as many as have room: the first ones, the fullest, the last ones."""
    if len(groups) <= _COLUMNS:
        return groups
    middle = [group for group in groups[4:-3] if fullest in group]
    return [*groups[:4], *middle, *groups[-3:]]


def _time_lines(plan: Plan) -> list[str]:
    if plan.time is None:
        return [f"{'time':<{_LABEL}}not known: {plan.no_time}"]
    total = plan.time.total
    lines = [f"{'time':<{_LABEL}}{_step(plan)}"]
    parts = [(words, getattr(plan.time, name)) for name, words in TIMES.items()]
    cells = [
        f"{words} {span(seconds)} ({percent(seconds / total)})" for words, seconds in parts if seconds > 0
    ]
    # A part is not broken, and a line does not begin with a bar.
    joined = " ".join(cell.replace(" ", "\0") + "\0|" for cell in cells)
    text = textwrap.wrap(joined, WIDTH - _LABEL, break_on_hyphens=False, break_long_words=False)
    return lines + [f"{'':<{_LABEL}}{line.replace(chr(0), ' ').removesuffix(' |')}" for line in text]


def _step(plan: Plan) -> str:
    time = plan.time
    assert time is not None
    error = f" ± {100 * time.error:.0f} %" if time.error is not None else ", error not known"
    return f"{span(time.total)} a step{error} (modelled)"


def _duration(plan: Plan) -> str:
    assert plan.tokens is not None and plan.seconds is not None and plan.steps is not None
    steps = "1 step" if plan.steps == 1 else f"{plan.steps:,} steps"
    text = f"{in_words(plan.tokens)} tokens, {steps}: {span(plan.seconds)}"
    if plan.seconds >= DAY:
        text += f", {in_words(plan.gpu_hours or 0)} GPU-hours"
    if plan.dollars is not None:
        text += f", {money(plan.dollars)}"
    return f"{text} (modelled)"


def _cost_rows(plan: Plan) -> list[tuple[str, str]]:
    if plan.time is None or plan.tokens_per_second is None:
        return []
    rate, flops, mfu = plan.tokens_per_second, plan.flops_per_gpu, plan.mfu
    each = f" ({short(rate / plan.world_size)} a GPU)" if plan.world_size > 1 else ""
    rows = [
        ("speed", f"{short(rate)} tokens/s{each}, {digits(flops['causal'] / 1e12)} TFLOP/s a GPU (causal)"),
        (
            "MFU",
            f"{percent(mfu['causal'])} causal, {percent(mfu['full'])} full square, of the "
            f"{digits(plan.peak_flops / 1e12)} TFLOP/s peak in {plan.workload.precision.peak_format}",
        ),
    ]
    if plan.tokens is None:
        rows.append(("training", "add tokens=1T to see days, GPU-hours and money"))
    else:
        rows.append(("training", _duration(plan)))
        if plan.dollars is None:
            rows.append(("", "add cluster.price_per_gpu_hour=2.5 to see the money"))
    return rows


def _microbatches(many: int) -> str:
    return f"{many:,} microbatches" if many > 1 else "one microbatch"


def _memory_unit(plan: Plan) -> tuple[str, Callable[[float], str]]:
    return ("MiB", mib) if plan.fullest.memory.total < GIB else ("GiB", gib)


def _unit(plan: Plan) -> str:
    return "GPU" if plan.cluster.device == "cuda" else "core"


def labelled(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Labels and values in two columns of `WIDTH` characters together."""
    lines = []
    for label, value in rows:
        text = textwrap.wrap(value, WIDTH - _LABEL, break_on_hyphens=False) or [""]
        lines += [f"{label:<{_LABEL}}{text[0]}", *(f"{'':<{_LABEL}}{line}" for line in text[1:])]
    return lines
