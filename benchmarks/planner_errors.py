"""How wrong the step-time model is on every published measurement, and how well it ranks.

    python benchmarks/planner_errors.py [--tables sc21 bridge] [--out benchmarks/results] [--help]

Prints and writes ``planner_errors.json``, and ``predicted_against_measured.png`` with all points (its numbers
beside it), those that constants were fitted on marked as such. Errors are modelled over published, less 1.
Nothing is measured here: the measurements are those of ``benchmarks/published``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.published import bridge
from benchmarks.published.ranking import kendall_tau, regret
from benchmarks.published.record import Measured
from benchmarks.published.tables import TABLES

SMALLEST_GROUP = 3  # candidates; of two, tau is 1 or -1


@dataclass(frozen=True)
class Compared:
    """A measurement beside what the model says.

    Attributes:
        measured: The published row.
        predicted: Seconds of a step.
        fitted: Whether the constants were fitted on this row.
        constants: Name of the set of constants.
    """

    measured: Measured
    predicted: float
    fitted: bool
    constants: str

    @property
    def error(self) -> float:
        """Relative and signed: 0.1 is a step predicted a tenth too long."""
        return self.predicted / self.measured.seconds - 1


# Seconds of a step, whether the row was fitted on, name of the constants.
Model = Callable[[Measured], tuple[float, bool, str]]


def compare(measured: Iterable[Measured], model: Model) -> list[Compared]:
    """Every measurement beside the model's time."""
    return [Compared(one, *model(one)) for one in measured]


def statistics_of(compared: Sequence[Compared]) -> dict[str, float | int]:
    """Mean, median, p90 and maximum of the absolute relative errors, and the mean of the signed ones."""
    errors = sorted(abs(one.error) for one in compared)
    return {
        "rows": len(errors),
        "mean": statistics.fmean(errors),
        "median": statistics.median(errors),
        "p90": percentile(errors, 0.9),
        "max": errors[-1],
        "bias": statistics.fmean(one.error for one in compared),
    }


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value that a part of the ordered ones does not exceed, between two of them where it falls there."""
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def by_table(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """For each table the errors on all rows and on those that nothing was fitted on."""
    return _grouped(compared, lambda one: one.measured.table)


def by_constants(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """For each set of constants: a GPU generation, a number format, a software generation."""
    return _grouped(compared, lambda one: one.constants)


def by_kind(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """For each GPU, precision as published, software (see `Measured.family`) and kind of model."""

    def name(one: Compared) -> str:
        kind = "MoE" if one.measured.workload.shape.is_moe else "dense"
        return " ".join((one.measured.cluster, one.measured.precision, one.measured.family, kind))

    return _grouped(compared, name)


def _grouped(compared: Sequence[Compared], key: Callable[[Compared], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Compared]] = defaultdict(list)
    for one in compared:
        groups[key(one)].append(one)
    found = {}
    for name, members in groups.items():
        others = [one for one in members if not one.fitted]
        found[name] = {
            "constants": sorted({one.constants for one in members}),
            "fitted_on": sum(one.fitted for one in members),
            "all": statistics_of(members),
            "not_fitted": statistics_of(others) if others else None,
        }
    return found


def ranking(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """Tau and regret among the ways to run one model on as many GPUs with one batch, in one software.

    Returns:
        For each table with such groups of three or more: how many groups and candidates, mean tau, mean and
        worst regret, and the groups by name.
    """
    groups: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for one in compared:
        workload, row = one.measured.workload, one.measured
        sizes = f"{workload.topology.world_size} GPUs, batch {workload.batch.global_batch_size}"
        name = f"{row.model} s{workload.shape.seq_length} {row.cluster} {row.software}, {sizes}"
        groups[row.table, name].append(one)
    tables: dict[str, dict[str, Any]] = {}
    for (table, name), members in groups.items():
        if len(members) < SMALLEST_GROUP:
            continue
        times = [one.predicted for one in members], [one.measured.seconds for one in members]
        found = tables.setdefault(table, {"groups": {}})["groups"]
        found[name] = {"candidates": len(members), "tau": kendall_tau(*times), "regret": regret(*times)}
    for table in tables.values():
        members = list(table["groups"].values())
        taus = [group["tau"] for group in members if group["tau"] is not None]
        table |= {
            "candidates": sum(group["candidates"] for group in members),
            "mean_tau": statistics.fmean(taus) if taus else None,
            "mean_regret": statistics.fmean(group["regret"] for group in members),
            "max_regret": max(group["regret"] for group in members),
        }
    return tables


def report(compared: Sequence[Compared]) -> dict[str, Any]:
    """All of it, as the JSON file has it."""
    return {
        "what": "modelled step times against published ones; error = modelled / published - 1",
        "tables": by_table(compared),
        "constants": by_constants(compared),
        "kinds": by_kind(compared),
        "ranking": ranking(compared),
        "left_out": bridge.left_out(),
        "assumed": {
            table: sorted(
                {word for one in compared if one.measured.table == table for word in one.measured.assumed}
            )
            for table in by_table(compared)
        },
    }


def printed(found: dict[str, Any]) -> str:
    """The report as a person reads it."""
    lines = []
    titles = {
        "tables": "by table",
        "constants": "by set of constants",
        "kinds": "by GPU, precision and software",
    }
    for key, title in titles.items():
        lines += [f"{title}: absolute relative error on rows that nothing was fitted on", HEADER]
        for name, group in found[key].items():
            numbers = group["not_fitted"]
            shown = _numbers(numbers) if numbers else "(every row was fitted on)"
            lines.append(f"  {name:<46} {group['fitted_on']:>6}  {shown}")
        lines.append("")
    lines.append("ranking within one model, GPU count and batch (three candidates or more)")
    for name, table in found["ranking"].items():
        shown = "none" if table["mean_tau"] is None else f"{table['mean_tau']:.2f}"
        size = f"{len(table['groups']):>4} groups {table['candidates']:>6} candidates"
        cost = f"regret {table['mean_regret']:.1%}, at worst {table['max_regret']:.1%}"
        lines.append(f"  {name:<12} {size}   tau {shown} on average   {cost}")
    lines += ["", f"left out: {len(found['left_out'])} rows of models that are not shipped"]
    return "\n".join(lines)


HEADER = f"  {'':<46} {'fitted':>6}  {'rows':>5} {'mean':>7} {'median':>7} {'p90':>7} {'max':>7} {'bias':>7}"


def _numbers(found: dict[str, float]) -> str:
    shares = " ".join(f"{found[key]:>7.1%}" for key in ("mean", "median", "p90", "max", "bias"))
    return f"{found['rows']:>5} {shares}"


def step_time_model() -> Model:
    """Our step-time model with its stored constants."""
    from benchmarks.published.fitted import is_fitted, set_of
    from megaplug.job.compose import compose_job
    from megaplug.plan.cluster import cluster_of
    from megaplug.plan.step_time import step_time

    clusters: dict[str, Any] = {}

    def model(measured: Measured) -> tuple[float, bool, str]:
        name = measured.cluster
        if name not in clusters:
            clusters[name] = cluster_of(compose_job([f"cluster={name}"]).cluster)
        constants = set_of(measured, clusters[name])
        seconds = step_time(measured.workload, clusters[name], constants).total * measured.beyond_workload
        return seconds, is_fitted(measured, constants), constants.name

    return model


def rounded(value: Any) -> Any:
    """The same with four decimals, in all that lies in it."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def draw(compared: Sequence[Compared], png: Path) -> Path:
    """Predicted against measured, all points."""
    from megaplug.plan.pictures.predicted import Point, draw_predicted

    points = [
        Point(
            one.measured.table,
            f"{one.measured.row_id}, {one.measured.workload.topology.label}, {one.constants}",
            measured=one.measured.seconds,
            predicted=one.predicted,
            fitted=one.fitted,
        )
        for one in compared
    ]
    return draw_predicted(points, png, title="Step times: modelled against published")


def main() -> None:
    """Compares, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=sorted(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = [measured for name in arguments.tables for measured in TABLES[name]()]
    compared = compare(rows, step_time_model())
    found = report(compared)
    print(printed(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "planner_errors.json"
    target.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")
    print(f"drew {draw(compared, arguments.out / 'predicted_against_measured.png')}")


if __name__ == "__main__":
    main()
