"""A damaged checkpoint as a person meets it: the same command names it and goes on from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_command import Live, newest_whole, only_run
from small_checkpoints import COMMON, craft_object
from small_jobs import SMALL, SmallJobs, state


@pytest.mark.slow
def test_the_same_command_names_what_is_damaged_and_goes_on(small_jobs: SmallJobs, tmp_path: Path) -> None:
    places = [f"data.path={small_jobs.corpus}", f"data.cache_dir={small_jobs.root / 'cache'}"]
    words = [*SMALL, *places, f"runs_dir={tmp_path / 'runs'}", "train.iters=8", "checkpoint.save_interval=2"]
    with Live([*words, "train.stop_at=6", "checkpoint.keep=4"]) as live:
        assert live.end() == 0, live.stderr()
    folder = only_run(tmp_path / "runs")
    shard = folder.checkpoints / "iter_0000006" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    craft_object(folder.checkpoints / "iter_0000004", COMMON, tmp_path / "ran")
    with Live(words) as live:
        assert live.end() == 0, live.stderr()
    flipped, crafted = [event["text"] for event in live.of("note")][:2]
    assert "checkpoint 6 is not whole (__0_0.distcp has other bytes than were saved)" in flipped
    assert f"checkpoint 4 is not whole (__0_0.distcp: {COMMON} would import _io.open)" in crafted
    assert live.of("header")[0]["resumes"] == "from step 2" and not (tmp_path / "ran").exists()
    assert (state(folder).status, newest_whole(folder)) == ("finished", 8)
