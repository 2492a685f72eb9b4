"""One line of the doctor's report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# ok: as it should be; absent: optional and not here; warning: it trains, but not as it should;
# broken: it cannot train.
Status = Literal["ok", "absent", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        name: What was looked at.
        value: What was found, with its numbers and units.
        status: Whether that is well.
        cure: What to do about it; empty only if nothing need be done.
    """

    name: str
    value: str
    status: Status = "ok"
    cure: str = ""


def can_train(findings: Iterable[Finding]) -> bool:
    """Whether nothing that was found keeps a run from training."""
    return all(finding.status != "broken" for finding in findings)
