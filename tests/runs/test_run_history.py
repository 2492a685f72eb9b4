"""What has happened to a run is read back, whatever a crash has left of a line."""

from __future__ import annotations

from megaplug.runs.history import append_event, read_events


def test_events_come_back_in_their_order(tmp_path):
    file = tmp_path / "events.jsonl"
    assert read_events(file) == []
    append_event(file, {"event": "start", "iteration": 0})
    append_event(file, {"event": "end", "reason": "f\u00fcnf\nlines"})
    assert read_events(file) == [
        {"event": "start", "iteration": 0},
        {"event": "end", "reason": "f\u00fcnf\nlines"},
    ]


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    file = tmp_path / "events.jsonl"
    append_event(file, {"event": "start"})
    whole = file.read_bytes()
    for length in range(1, len(whole)):
        file.write_bytes(whole + whole[:length])
        append_event(file, {"event": "end"})
        kept = read_events(file)
        assert kept[0] == {"event": "start"} and kept[-1] == {"event": "end"}
        # All but the end of the line may have been there.
        assert len(kept) == (3 if length == len(whole) - 1 else 2)
