"""Campaigns that are done in several sittings."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.kill_campaign import Kill, Run, report
from benchmarks.sittings import Asked, Record, from_command_line

KILL = Kill("any", "a rank", "training", 0.25, 4, 6)


def sitting(path: Path, number: int) -> list[Run]:
    """Runs with one kill each, until there are so many with those of the record."""
    record = Record(path, seed=1)
    runs = [Run.of_fields(line["run"]) for line in record.lines]

    def one(at: int) -> Run:
        runs.append(Run(at, 2, async_save=True, kills=[KILL], starts=2))
        return runs[-1]

    asked = Asked(path.parent, number, [2], record=record)
    asked.go_through(one, lambda: len(runs) >= number)
    return runs


def test_another_sitting_goes_on_after_the_runs_of_the_one_before(tmp_path):
    path = tmp_path / "kills.jsonl"
    first = sitting(path, 3)
    both = sitting(path, 7)
    assert sorted(run.number for run in both) == list(range(7))
    assert [asdict(run) for run in both[:3]] == [asdict(run) for run in first]
    assert report(both)["kills"] == 7 and report(both)["starts"] == 14
    assert sitting(path, 7) == both, "nothing is left to do"


def test_a_line_that_was_cut_off_is_forgotten_and_its_run_made_again(tmp_path):
    path = tmp_path / "kills.jsonl"
    sitting(path, 3)
    path.write_bytes(path.read_bytes()[:-9])
    assert sorted(run.number for run in sitting(path, 3)) == [0, 1, 2]
    assert len(Record(path, 1).lines) == 3
    assert Record(path, 1).sums()["sittings"] in (1, 2)  # both began in the same second, or not


def test_sittings_share_a_folder_and_the_failed_keep_their_own_in_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"

    def sit(failure: str) -> int:
        def campaign(asked: Asked, before: list[Run]) -> list[Run]:
            (asked.place / "undisturbed1").mkdir()
            return [Run(0, 1, async_save=True, kills=[KILL], failure=failure)]

        monkeypatch.setattr(sys, "argv", ["kill_campaign.py", "--folder", str(folder)])
        return from_command_line("kills", 1, "1", Run, campaign, report, "")

    assert [sit("it was lost"), sit(""), sit("it was lost")] == [1, 0, 1]
    assert len(list(folder.glob("kills-*/undisturbed1"))) == len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has runs of --seed 1"),
        ("{}\n", "is no record of a campaign"),
        ("kills\n", "is no record of a campaign"),
    ],
)
def test_what_is_no_record_of_this_campaign_is_left_as_it_is(content, said, tmp_path):
    path = tmp_path / "kills.jsonl"
    if content is None:
        sitting(path, 1)
    else:
        path.write_text(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said):
        Record(path, seed=2)
    assert path.read_bytes() == before
