"""What is shown while a job runs, to the letter."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from megaplug.launchers.progress import PlainProgress, make_progress
from megaplug.launchers.rich_progress import RichProgress
from megaplug.launchers.screen import Header, Summary, count, duration
from megaplug.launchers.track import Track, event_text

_SUMMARY = Summary(
    status="finished",
    iteration=20,
    iters=20,
    loss=1.5,
    valid_loss=2.0,
    unigram_loss=3.25,
    tokens_per_second=12345.6,
    files=[("checkpoints", "runs/x/checkpoints")],
    next_command="python launch/train.py",
)


def _step(iteration, loss=2.0, seconds=2.0):
    return {
        "event": "step",
        "iteration": iteration,
        "loss": loss,
        "seconds": seconds,
        "tokens_per_second": 1024.0,
    }


def _play(progress):
    progress.header(Header([("model", "tiny"), ("tokens", "5,120")]))
    progress.event({"event": "phase", "name": "building the model", "rank": 0})
    progress.event({"event": "phase", "name": "building the model", "rank": 1})
    for iteration in range(1, 21):
        progress.event(_step(iteration, loss=3 - iteration / 10))
    progress.event({"event": "valid", "iteration": 20, "valid_loss": 2.0, "split": "valid"})
    progress.event({"event": "saved", "iteration": 20, "seconds": 0.25})
    progress.summary(_SUMMARY)


def test_plain_lines():
    stream = io.StringIO()
    _play(PlainProgress(Track(20), stream, clock=lambda: 0.0))
    assert stream.getvalue().splitlines() == [
        "  model   tiny",
        "  tokens  5,120",
        "building the model ...",
        "step  1/20  loss 2.9000",
        *(
            f"step {step:>2}/20  loss {3 - step / 10:.4f}  1.02k tokens/s  {2 * (20 - step)} s left"
            for step in range(2, 20, 2)
        ),
        "step 20/20  loss 1.0000  1.02k tokens/s",
        "step 20  validation loss 2.0000",
        "step 20  checkpoint saved in 0.25 s",
        "finished at step 20 of 20",
        "  training loss    1.5000 nats per token",
        "  validation loss  2.0000 (1.2500 below the 3.2500 of a unigram model of the same text)",
        "  throughput       12.3k tokens/s (measured)",
        "  checkpoints      runs/x/checkpoints",
        "  next             python launch/train.py",
    ]


def test_a_slow_run_shows_a_line_each_ten_seconds():
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(Track(10**6), stream, clock=lambda: now[0])
    for iteration in range(1, 31):
        progress.event(_step(iteration))
        now[0] += 1.0
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == [
        "step       1",
        "step      11",
        "step      21",
    ]


def test_json_lines_all_parse_and_hold_what_a_person_reads():
    stream = io.StringIO()
    progress = make_progress("auto", "json", 20, stream=stream)
    progress.event(_step(1, loss=float("nan")))
    _play(progress)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().splitlines()]
    assert lines[0]["loss"] is None and lines[1] == {"event": "header", "model": "tiny", "tokens": "5,120"}
    assert lines[-1]["event"] == "summary" and lines[-1]["files"] == {"checkpoints": "runs/x/checkpoints"}
    assert lines[-1]["valid_loss"] == 2.0 and lines[-1]["unigram_loss"] == 3.25


def test_none_shows_the_summary_alone():
    stream = io.StringIO()
    _play(make_progress("none", "text", 20, stream=stream))
    assert stream.getvalue().splitlines()[0] == "finished at step 20 of 20"


def test_auto_is_plain_where_there_is_no_terminal():
    assert type(make_progress("auto", "text", 20, stream=io.StringIO())) is PlainProgress


def test_rich_shows_the_line_and_keeps_what_matters():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    _play(RichProgress(Track(20), stream, console))
    text = stream.getvalue()
    assert "building the model" in text and "step 20/20" in text
    assert "step 20  checkpoint saved in 0.25 s" in text and "finished at step 20 of 20" in text
    assert text.rstrip().endswith("next             python launch/train.py")


def test_a_failed_rank_is_shown_with_its_number():
    summary = Summary(
        "failed", 3, 20, reason="rank 1 ended with exit code 3", rank=1, log_tail=["boom"], hint="mend it"
    )
    assert summary.lines() == [
        "rank 1 | boom",
        "failed at step 3 of 20: rank 1 ended with exit code 3",
        "  hint  mend it",
    ]


def test_a_model_worse_than_unigrams_is_told_so():
    assert "ABOVE" in "\n".join(Summary("finished", 1, 1, valid_loss=4.0, unigram_loss=3.0).lines())


def test_the_first_step_does_not_count_for_the_throughput():
    track = Track(10)
    track.take({"event": "step", "iteration": 1, "loss": 1.0, "seconds": 100.0, "tokens_per_second": 1.0})
    assert track.tokens_per_second is track.seconds_left is None
    track.take({"event": "step", "iteration": 2, "loss": 1.0, "seconds": 1.0, "tokens_per_second": 500.0})
    assert track.tokens_per_second == track.mean_tokens_per_second == 500.0
    assert track.seconds_left == 8.0


def test_numbers_for_people():
    assert [count(number) for number in (9.5, 950, 12345, 4.56e6, 7e9, 9.9999e11)] == [
        "9.5",
        "950",
        "12.3k",
        "4.56M",
        "7G",
        "1T",
    ]
    assert [duration(seconds) for seconds in (8.2, 185, 7620, 270000)] == [
        "8 s",
        "3:05 min",
        "2:07 h",
        "3.1 days",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_moving_line_is_one_line_on_any_terminal(width):
    track = Track(2200)
    track.take({"event": "phase", "name": "validating"})
    for iteration in (1, 2):
        step = {
            "event": "step",
            "iteration": iteration,
            "loss": 5.9546,
            "seconds": 0.3,
            "tokens_per_second": 7380.0,
        }
        track.take(step)
    track.phase = "validating"
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with console.capture() as capture:
        console.print(RichProgress(track, io.StringIO(), console)._line())
    assert capture.get().count("\n") == 1
    assert width < 120 or "left  validating" in capture.get()


def _line_of(track, width=100):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with console.capture() as capture:
        console.print(RichProgress(track, io.StringIO(), console)._line())
    return capture.get().strip()


def _stopping(name="SIGINT", **values):
    return {"event": "stopping", "signal": name, "grace_s": 120.0, "saves": True, **values}


@pytest.mark.parametrize("width", [60, 100])
def test_the_moving_line_says_what_a_stop_waits_for(width):
    track = Track(90)
    for iteration in (5, 6):
        track.take(_step(iteration))
    track.take(_stopping())
    shown = [_line_of(track, width)]
    for event in (
        _step(7),
        {"event": "phase", "name": "validating"},
        {"event": "saved", "iteration": 7, "seconds": 1.0},
    ):
        track.take(event)
        shown.append(_line_of(track, width))
    ends = [line.partition("step ")[2] for line in shown]
    if width == 100:
        assert ends == [
            " 6/90  stopping: the step is finished and saved ...",
            " 7/90  stopping: saving step 7 ...",
            " 7/90  stopping: saving step 7 ...",
            " 7/90  stopping: saved, waiting for the ranks to end ...",
        ]
    assert not any("left" in line or "\n" in line for line in shown)


def test_a_stop_in_a_validation_saves_the_step_before_it_unless_it_is_saved():
    track = Track(90)
    for iteration in (5, 6):
        track.take(_step(iteration))
    track.take({"event": "phase", "name": "validating"})
    track.take(_stopping())
    assert track.phase == "stopping: saving step 6"
    track = Track(6)
    for iteration in (5, 6):
        track.take(_step(iteration))
    track.take({"event": "saved", "iteration": 6, "seconds": 1.0})
    track.take({"event": "phase", "name": "validating"})
    track.take(_stopping())
    assert track.phase == "stopping: saved, waiting for the ranks to end"


def test_a_stop_before_the_first_step_saves_nothing():
    track = Track(90)
    track.take({"event": "phase", "name": "starting Megatron"})
    track.take(_stopping(saves=False))
    assert _line_of(track).endswith(" stopping ...")


def test_a_run_that_ends_before_its_last_step_is_not_shown_as_going_on():
    track = Track(90)
    for event in (
        _step(5),
        _step(6),
        {"event": "saved", "iteration": 6, "seconds": 1.0},
        {"event": "ending"},
    ):
        track.take(event)
    assert _line_of(track).endswith(" 6/90  waiting for the ranks to end ...")


def test_the_moving_line_says_that_a_run_is_ending():
    track, shown = Track(6), []
    for event in (
        _step(5),
        _step(6),
        {"event": "saved", "iteration": 6, "seconds": 1.0},
        {"event": "phase", "name": "validating"},
        {"event": "valid", "iteration": 6, "valid_loss": 2.0, "split": "test"},
    ):
        track.take(event)
        shown.append(_line_of(track).partition("step ")[2])
    assert shown[1:3] == ["6/6  saving step 6 ...", "6/6  ending ..."]
    assert shown[3].endswith("  validating") and shown[4] == "6/6  ending ..."


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (_stopping(), "Ctrl-C again ends at once"),
        (_stopping("SIGTERM"), "; Ctrl-C ends at once"),
        (_stopping("SIGUSR2", rank=1), "; Ctrl-C ends at once"),
    ],
)
def test_a_stop_says_how_long_it_may_take_and_what_cuts_it_short(event, said):
    text = event_text(event)
    assert text.endswith(said) and "within 2:00 min (launch.grace_s)" in text


def test_the_command_to_type_next_is_never_broken_into_lines():
    command = "python launch/train.py " + " ".join(f"train.option{number}=1" for number in range(9))
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with console.capture() as capture:
        RichProgress(Track(2), io.StringIO(), console).summary(
            Summary("finished", 2, 2, next_command=command)
        )
    assert command in capture.get()


def test_a_restart_is_numbered_as_in_the_summary_and_counted_in_its_row():
    event = {
        "event": "restart",
        "number": 2,
        "in_a_row": 1,
        "at_most": 3,
        "from_iteration": 5,
        "reason": "gone",
    }
    assert event_text(event) == "restart 2 (1 of 3 in a row), from step 5: gone"
