"""What stands in a rank's log at which level."""

from __future__ import annotations

import pytest
from small_jobs import SmallJobs, curve


@pytest.mark.parametrize(
    ("level", "reports", "warns"),
    [
        ("info", True, True),
        pytest.param("warning", False, True, marks=pytest.mark.slow),
        ("error", False, False),
    ],
)
def test_a_log_holds_what_is_serious_enough(
    level: str, reports: bool, warns: bool, small_jobs: SmallJobs
) -> None:
    before = set((small_jobs.root / "ranks").glob("*")) if (small_jobs.root / "ranks").exists() else set()
    folder = small_jobs.run(["lr=constant", "train.iters=1", f"name=level_{level}", f"logging.level={level}"])
    (ranks,) = set((small_jobs.root / "ranks").glob("*")) - before
    log = (ranks / "rank0.log").read_text()
    assert ("iteration        1/" in log) == reports
    assert ("megaplug: device cpu" in log) == reports
    assert ("INFO:" in log) == reports
    assert ("UserWarning" in log) == warns
    assert len(curve(folder)) == 1
