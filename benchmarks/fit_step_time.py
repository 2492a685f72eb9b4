"""Fits the constants of the step-time model on published measurements, and says how wrong it is on others.

    python benchmarks/fit_step_time.py [--only NAME ...] [--check] [--help]

Writes ``megaplug/plan/step_time/constants/<name>.json``: values, the rows they were fitted on, the error on
the rows of the same set that they were not fitted on. Nothing is drawn anew from run to run: the same tables
give the same files. ``--check`` writes nothing and repeats each fit with other rows: how much the choice
matters.

A100: ten numbers on 360 of the 1,440 rows of vTrain, drawn with seed 0. Others take most numbers from there
or from ``step_time_sets.NEWER`` and fit one to three on at most three rows: those of the smallest, the middle
and the largest model by FLOPs a token, or, where a set has dense models and models with experts, the largest
dense one with the smallest and the largest with experts. Least are absolute errors of the logarithm of time,
so that one odd row among three does not bend the rest, and a little for every fitted number that leaves where
it began.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.minimize import nelder_mead
from benchmarks.published.record import Measured
from benchmarks.published.tables import all_measured
from benchmarks.step_time_sets import SETS, VTRAIN_SET, Prior, SetOfConstants
from megaplug.plan.cluster import cluster_preset
from megaplug.plan.step_time import Constants, Terms, rates_of, stack, step_parts, terms_of
from megaplug.plan.step_time.constants import FOLDER

SEED = 0
# What a fitted number costs that is as far from its start as its prior says, in mean error of log time.
PULL = 0.02


@dataclass
class Rows:
    """The rows of a set: all on one machine in one number format, their numbers stacked."""

    measured: list[Measured]
    terms: Terms
    seconds: np.ndarray

    @classmethod
    def of(cls, measured: list[Measured]) -> Rows:
        """Counts the workloads' numbers; what they lack of what was trained is taken off the seconds."""
        terms = stack([terms_of(row.workload) for row in measured])
        return cls(measured, terms, np.array([row.seconds / row.beyond_workload for row in measured]))

    def part(self, indices: Sequence[int]) -> Rows:
        """Some of the rows."""
        chosen = np.array(indices, int)
        terms = Terms(**{field.name: getattr(self.terms, field.name)[chosen] for field in fields(Terms)})
        return Rows([self.measured[i] for i in chosen], terms, self.seconds[chosen])

    def ratios(self, constants: Constants) -> np.ndarray:
        """Modelled over published seconds."""
        first = self.measured[0]
        rates = rates_of(cluster_preset(first.cluster), first.workload.precision.compute, constants)
        moe = any(row.workload.shape.is_moe for row in self.measured)
        return np.asarray(sum(step_parts(self.terms, rates, moe=moe).values())) / self.seconds


def fitted(rows: Rows, free: dict[str, Prior], base: Constants, evaluations: int = 400) -> Constants:
    """The constants with which the rows' times are nearest."""
    # One row tells one number, which must take up all that is different from where it begins.
    widths = np.array([width for _, width, _ in free.values()]) * (3 if len(rows.measured) == 1 else 1)

    def constants(x: np.ndarray) -> Constants:
        values = {
            name: min(start * float(np.exp(width * move)), most)
            for (name, (start, _, most)), width, move in zip(free.items(), widths, x, strict=True)
        }
        return replace(base, **values)

    def cost(x: np.ndarray) -> float:
        errors = np.log(rows.ratios(constants(x)))
        spread = float(np.mean(np.abs(errors))) + 0.5 * float(np.sqrt(np.mean(errors**2)))
        return spread + PULL * float(np.mean(x**2))

    best = constants(nelder_mead(cost, np.zeros(len(widths)), step=0.5, evaluations=evaluations))
    return replace(best, **{name: float(f"{getattr(best, name):.4g}") for name in free})


def spread_out(measured: Sequence[Measured], one: SetOfConstants) -> list[int]:
    """The rows to fit on, whatever was measured: the models that differ most, by FLOPs a token.

    The smallest, the middle and the largest; of dense models and of those with experts the largest dense one,
    and the smallest and the largest with experts. Fewer where none would be left to judge by.
    """
    open_to_it = [i for i, row in enumerate(measured) if row.table not in one.judged_only]
    order = sorted(open_to_it, key=lambda i: (measured[i].flops_per_token, i))
    count = min(one.most, max(1, len(order) - 1))
    experts = [i for i in order if measured[i].workload.shape.is_moe]
    plain = [i for i in order if i not in experts]
    if count == 3 and plain and len(experts) > 1:
        return sorted((plain[-1], experts[0], experts[-1]))
    places = {1: [len(order) // 2], 2: [0, -1], 3: [0, len(order) // 2, -1]}[count]
    return sorted(order[place] for place in places)


def statistics(ratios: np.ndarray) -> dict[str, float | int]:
    """Of the absolute relative errors."""
    errors = np.abs(ratios - 1)
    return {
        "mean": round(float(errors.mean()), 4),
        "median": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
        "max": round(float(errors.max()), 4),
        "n": len(errors),
    }


def made(one: SetOfConstants, rows: Rows, chosen: Sequence[int], base: Constants) -> dict[str, Any]:
    """A set as its file has it."""
    free = dict(list(one.free.items())[: len(chosen)])
    constants = fitted(rows.part(chosen), free, replace(base, **{k: v[0] for k, v in one.free.items()}))
    others = [i for i in range(len(rows.measured)) if i not in set(chosen)]
    names: dict[str, list[str]] = {}
    for i in chosen:
        names.setdefault(rows.measured[i].table, []).append(rows.measured[i].row_id)
    kept = [field.name for field in fields(Constants) if field.name not in ("error", "name", "note")]
    ratios = rows.ratios(constants)
    far = {
        rows.measured[i].row_id: round(float(ratios[i] - 1), 3) for i in others if abs(ratios[i] - 1) > 0.15
    }
    return {
        "values": {key: getattr(constants, key) for key in kept},
        "fitted": list(one.free),
        "covers": list(one.covers),
        "fitted_rows": names,
        "how": "benchmarks/fit_step_time.py, 2026-11-21; errors are modelled / published - 1",
        "fit_error": statistics(ratios[list(chosen)]),
        "held_out": statistics(ratios[others]) if others else {},
        "outliers": far if len(far) <= 20 else {"rows beyond 15 %": len(far)},
    }


def base_of(one: SetOfConstants, a100: dict[str, Any] | None) -> Constants:
    """What is not fitted: A100's numbers, and over them the set's own."""
    values = dict(a100["values"]) if a100 else {}
    return replace(Constants(), **(values | one.base))


def main() -> None:
    """Fits, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names of sets (A100's is fitted all the same)")
    parser.add_argument("--check", action="store_true", help="repeat with other rows, write nothing")
    arguments = parser.parse_args()
    table = all_measured()
    rows = Rows.of([row for row in table if VTRAIN_SET.has(row)])

    def drawn(seed: int) -> list[int]:
        order = np.random.default_rng(seed).permutation(len(rows.measured))
        return sorted(int(i) for i in order[: VTRAIN_SET.most])

    a100 = made(VTRAIN_SET, rows, drawn(SEED), base_of(VTRAIN_SET, None))
    show(VTRAIN_SET.name, a100)
    if arguments.check:
        for seed in range(1, 5):
            again = made(VTRAIN_SET, rows, drawn(seed), base_of(VTRAIN_SET, None))
            show(f"  seed {seed}", again)
    else:
        write(VTRAIN_SET.name, a100)
    for one in SETS:
        mine = [row for row in table if one.has(row)]
        # A single row would leave none to judge by.
        if len(mine) < 2 or (arguments.only and one.name not in arguments.only):
            continue
        rows = Rows.of(mine)
        base = base_of(one, a100)
        found = made(one, rows, spread_out(mine, one), base)
        show(one.name, found)
        if not arguments.check:
            write(one.name, found)
        elif len(mine) > one.most:
            means = []
            for seed in range(10):
                order = np.random.default_rng(seed).permutation(len(mine))[: one.most]
                means.append(made(one, rows, [int(i) for i in order], base)["held_out"]["mean"])
            print(f"    other rows: {np.mean(means):.1%} on average, {min(means):.1%} to {max(means):.1%}")


def show(name: str, record: dict[str, Any]) -> None:
    """A set in two lines."""
    held = record["held_out"]
    shown = " ".join(f"{key} {value:.1%}" for key, value in held.items() if key != "n")
    print(f"{name:<28} on others ({held.get('n', 0)}): {shown or '-'}; fit {record['fit_error']['mean']:.1%}")
    print("    " + ", ".join(f"{key} {record['values'][key]:.4g}" for key in record["fitted"]), flush=True)


def write(name: str, record: dict[str, Any]) -> None:
    """The set's file."""
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
