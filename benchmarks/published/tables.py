"""All tables of published step times and throughputs by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.published import bridge, gpt, nemo
from benchmarks.published.record import Measured

TABLES: dict[str, Callable[[], list[Measured]]] = {
    "vtrain": gpt.vtrain,
    "sc21": gpt.sc21,
    "korthikanti": gpt.korthikanti,
    "readme_h100": gpt.readme_h100,
    "nemo2407": nemo.nemo2407,
    "nemo_long": nemo.nemo_long,
    "bridge": bridge.bridge,
}


def all_measured() -> list[Measured]:
    """Every measurement whose model we ship, table by table."""
    return [measured for read in TABLES.values() for measured in read()]
