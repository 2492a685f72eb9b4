"""Renews the tables of docs/long_context.md: what attention over long sequences costs and reaches.

    python benchmarks/long_context_page.py [--check] [--help]

The modelled table is what ``megaplug.layers.attention.describe`` answers for each row below; the measured one
is what ``benchmarks/context_parallel_memory.py`` left in ``benchmarks/results``. ``--check`` writes nothing
and ends with 1 where the page is another.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megaplug.layers.attention.describe import Sizes, describe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "long_context.md"
MEASURED = ROOT / "benchmarks" / "results" / "context_parallel_memory.json"
KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Row:
    """One case of the modelled table; a layer of llama3_8b's heads in bf16, one sequence."""

    what: str
    num_tokens: int
    num_ranks: int
    segments: tuple[int, ...]
    rates: tuple[int, ...]
    layout: str = "contiguous"


def _powers(first: int, factor: int, count: int) -> tuple[int, ...]:
    return tuple(first * factor**power for power in range(count))


SEED = (64 * KIB, 128 * KIB, 256 * KIB), (1, 2, 4)
ROWS = (
    Row("dense ring", 128 * KIB, 8, (128 * KIB,), (1,), "zigzag"),
    Row("8K to 128K, rates 1 to 16", 128 * KIB, 8, _powers(8 * KIB, 2, 5), _powers(1, 2, 5)),
    Row("the same", 128 * KIB, 8, _powers(8 * KIB, 2, 5), _powers(1, 2, 5), "zigzag"),
    Row("dense ring", MIB, 8, (MIB,), (1,), "zigzag"),
    Row("64K, 128K, 256K, rates 1, 2, 4", MIB, 8, *SEED),
    Row("8K, 32K, 128K, 1M, rates 1, 2, 4, 8", MIB, 8, (8 * KIB, 32 * KIB, 128 * KIB, MIB), (1, 2, 4, 8)),
    Row("16K to 1M, rates 1 to 64", MIB, 64, _powers(16 * KIB, 2, 7), _powers(1, 2, 7)),
    Row("**the guide's: 64K, 128K, 256K, rates 1, 2, 4**", 3814 * 256 * KIB, 3814, *SEED),
    Row("64K to 1G by 4, rates 1 to 16,384", GIB, 4096, _powers(64 * KIB, 4, 8), _powers(1, 4, 8)),
)


def modelled() -> Iterator[str]:
    """The lines of the modelled table."""
    yield (
        "| segments x rates | tokens | ranks | layout | TFLOP of a rank | dense / dilated "
        "| received: mean, largest | kept | sees | tokens in each branch | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in ROWS:
        sizes = Sizes(row.num_tokens, 32, 8, 128)
        found = describe(sizes, row.segments, row.rates, num_ranks=row.num_ranks, layout=row.layout)
        received = found["received_bytes"]
        cells = [
            row.what,
            tokens(row.num_tokens),
            f"{row.num_ranks:,}",
            row.layout,
            f"{found['forward_flops'] / row.num_ranks / 1e12:,.1f}",
            f"{found['dense_over_dilated']:,.2f}",
            f"{size(received['mean'])}, {size(received['largest'])}" if received["largest"] else "**0**",
            size(found["saved_bytes"]),
            tokens(found["receptive_field"]),
            ", ".join(share(each) for each in found["coverage"]),
            "modelled",
        ]
        yield f"| {' | '.join(cells)} |"


def measured(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the measured table, and where it was measured."""
    yield (
        "| attention | layout | block_size | ranks | peak of a rank | of one rank's "
        "| received forward: counted | described | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in report["results"]:
        cells = [
            row["attention"],
            row["layout"],
            str(row["block_size"] or ""),
            str(row["ranks"]),
            size(max(row["peak_bytes"])),
            f"1 / {row['one_over']:.2f}",
            size(max(row["received_bytes"])),
            size(row["described_bytes"]),
            "measured",
        ]
        yield f"| {' | '.join(cells)} |"


def tokens(number: int) -> str:
    """In units of 1,024, where they go in."""
    for unit, name in ((GIB, "G"), (MIB, "M"), (KIB, "K")):
        if number % unit == 0:
            return f"{number // unit:,}{name}"
    return f"{number:,}"


def size(number: float) -> str:
    """Bytes for people."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,.0f}"


def share(part: float) -> str:
    """A share as all, a percentage, or a ratio where that would be 0."""
    if part == 1:
        return "all"
    return f"{part:.0%}" if part >= 0.01 else f"1 in {round(1 / part):,}"


def renewed(text: str) -> str:
    """The page with the tables of today."""
    tables = {"modelled": list(modelled())}
    if MEASURED.exists():
        tables["measured"] = list(measured(json.loads(MEASURED.read_text())))
    for name, lines in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        body = "\n".join(lines)
        text, count = re.subn(
            re.escape(begin) + ".*?" + re.escape(end), lambda _, b=begin, t=body, e=end: f"{b}\n{t}\n\n{e}",
            text, flags=re.DOTALL,
        )  # fmt: skip
        assert count == 1, f"the page has {count} tables {name!r}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compare or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    before = PAGE.read_text(encoding="utf-8")
    after = renewed(before)
    if options.check:
        print("the page is that of today" if before == after else "the page is another")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
