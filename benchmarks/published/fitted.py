"""Which stored constants a published row is judged with, and whether they were fitted on it.

A set in ``megaplug/plan/step_time/constants`` may say so itself, beside its values::

    "covers": [{"cluster": "h100", "precision": "fp8", "family": "nemo"}],
    "fitted_rows": {"nemo2407": ["line 4: GPT3-175B on 128"]}

``covers`` lists attributes of `Measured` that a row must have, any one of the lists being enough;
``fitted_rows`` names rows by table. A row that no set covers is judged as a user's job would be: with
`constants_for` its cluster and number format.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.published.record import Measured
from megaplug.plan.cluster import Cluster
from megaplug.plan.step_time import Constants, constants_for, load_constants
from megaplug.plan.step_time.constants import constants_names, stored_constants


@cache
def _stored() -> dict[str, dict[str, Any]]:
    return {name: stored_constants(name) for name in constants_names()}


def set_of(measured: Measured, cluster: Cluster) -> Constants:
    """The constants of a row.

    Raises:
        ValueError: More than one set covers it.
    """
    names = [
        name
        for name, record in _stored().items()
        if any(_has(measured, wanted) for wanted in record.get("covers", []))
    ]
    if len(names) > 1:
        raise ValueError(f"{measured.table} {measured.row_id} is covered by {' and '.join(names)}")
    if names:
        return load_constants(names[0])
    return constants_for(cluster, measured.workload.precision.compute)


def is_fitted(measured: Measured, constants: Constants) -> bool:
    """Whether the constants were fitted on this row."""
    rows = _stored().get(constants.name, {}).get("fitted_rows", {})
    return measured.row_id in rows.get(measured.table, [])


def _has(measured: Measured, wanted: dict[str, str]) -> bool:
    return all(getattr(measured, key) == value for key, value in wanted.items())
