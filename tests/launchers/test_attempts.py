"""A job whose ranks fail is started again from its last checkpoint: fake ranks, real checkpoints, a lock."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from fake_runs import FakeRun

from megaplug.runs import checkpoints, metrics
from megaplug.runs.history import read_events
from megaplug.runs.state import read_state


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(tmp_path, monkeypatch)


def test_a_killed_rank_is_made_good_from_the_last_checkpoint(fake):
    course = fake.run("if turn < 2:\n    train(7 + turn); os.kill(os.getpid(), signal.SIGKILL)\n")
    assert (course.outcome.status, course.outcome.exit_code, course.outcome.iteration) == ("finished", 0, 12)
    assert fake.starts() == 3
    # What was measured beyond the checkpoint is measured again, by the ranks that went on.
    lines = metrics.read_metrics(fake.folder.metrics_file)
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [0.0] * 5 + [2.0] * 7
    killed = "rank 0 was killed by signal 9 (SIGKILL), probably by the kernel's out-of-memory killer"
    state = read_state(fake.folder.state_file)
    assert (state.status, state.num_restarts, state.restart_reasons) == ("finished", 2, (killed, killed))
    shown = [(e["number"], e["from_iteration"], e["iteration"], e["reason"]) for e in fake.of("restart")]
    assert shown == [(1, 5, 7, killed), (2, 5, 8, killed)]
    assert fake.history() == ["start", "failure", "restart", "failure", "restart", "end"]


def test_nothing_is_started_again_by_default(fake):
    course = fake.run("train(7); os.kill(os.getpid(), signal.SIGKILL)", max_restarts=0)
    assert (course.outcome.status, course.outcome.exit_code, course.why_no_more) == ("failed", 1, "")
    assert fake.starts() == 1 and fake.history() == ["start", "failure", "end"]
    assert read_state(fake.folder.state_file).num_restarts == 0


def test_it_is_tried_so_many_times_and_no_more(fake):
    course = fake.run("train(7); os.kill(os.getpid(), signal.SIGKILL)", max_restarts=2)
    assert course.outcome.status == "failed" and "watch.max_restarts" in course.why_no_more
    assert fake.starts() == 3 and read_state(fake.folder.state_file).num_restarts == 2


def test_the_count_begins_anew_with_a_checkpoint(fake):
    script = "if turn < 2:\n    train(began + 6); os.kill(os.getpid(), signal.SIGKILL)\n"
    course = fake.run(script, max_restarts=1)
    assert (course.outcome.status, fake.starts()) == ("finished", 3)
    assert [restart.from_iteration for restart in course.restarts.done] == [5, 10]


def test_a_hang_is_a_stall_and_is_started_again(fake):
    script = (
        "if turn == 0:\n    train(3)\n    events.write('beat', progress=1, iteration=3, phase='training')\n"
    )
    script += "    signal.pause()\n"
    course = fake.run(script, watch__hang_s=0.5)
    assert (course.outcome.status, fake.starts()) == ("finished", 2)
    assert fake.history() == ["start", "stall", "restart", "end"]
    assert "hangs" in course.restarts.reasons[0]


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time(fake):
    course = fake.run("train(7); fail('error')")
    assert fake.starts() == 2 and "the same failure" in course.why_no_more


def test_a_mistake_in_the_configuration_is_not_tried_again(fake):
    course = fake.run("sys.exit(2)")
    assert fake.starts() == 1 and "configuration" in course.why_no_more


def test_out_of_memory_without_a_step_is_not_tried_again(fake):
    course = fake.run("fail('memory')")
    assert fake.starts() == 1 and "memory" in course.why_no_more


def test_each_start_has_a_port_of_its_own_and_its_log_behind_the_last(fake):
    fake.run("if turn < 2:\n    train(3 + turn); os.kill(os.getpid(), signal.SIGKILL)\n", world_size=2)
    ports = (fake.place / "ports0").read_text().split()
    assert len(ports) == 3 == len(set(ports))
    log = fake.folder.log_file(1).read_text()
    assert [line for line in log.splitlines() if line.startswith("this is")] == [
        "this is start 0",
        "this is start 1",
        "this is start 2",
    ]


def test_what_is_to_be_computed_on_another_device_is(fake):
    script = "if turn == 0:\n    train(5)\n    fail('unexplained' if rank == 0 else 'peer')\n"
    assert fake.run(script, world_size=2).outcome.status == "finished"
    assert (fake.place / "devices0").read_text().split() == ["0", "1"]
    assert (fake.place / "devices1").read_text().split() == ["1", "0"]


def test_a_damaged_checkpoint_is_gone_back_behind(fake):
    spoil = "(folder / 'checkpoints' / 'iter_0000010' / 'shard').write_bytes(bytes(99))"
    course = fake.run(f"if turn == 0:\n    train(11); {spoil}; fail('error')\n")
    assert course.outcome.status == "finished" and course.restarts.done[0].from_iteration == 5
    assert any("checkpoint 10 is not whole" in event["text"] for event in fake.of("note"))


def test_a_checkpoint_that_is_saved_broken_again_and_again_is_no_progress(fake):
    spoil = "(folder / 'checkpoints' / 'iter_0000005' / 'shard').write_bytes(bytes(99))"
    course = fake.run(f"train(5); {spoil}; os.kill(os.getpid(), signal.SIGKILL)\n", max_restarts=2)
    assert fake.starts() == 3 and "watch.max_restarts" in course.why_no_more


def test_a_signal_ends_the_ranks_for_good(fake):
    script = f"train(3); os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    course = fake.run(script)
    assert (course.outcome.status, course.outcome.exit_code) == ("stopped", 143)
    assert fake.starts() == 1


def test_a_rank_that_fails_while_it_is_told_to_stop_is_not_started_again(fake):
    script = "signal.signal(signal.SIGTERM, lambda *_: fail('error')); train(3)\n"
    script += f"os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    course = fake.run(script)
    assert course.outcome.status == "failed" and "told to stop" in course.why_no_more
    assert fake.starts() == 1


def test_a_signal_between_two_starts_ends_the_run(fake, monkeypatch):
    real = checkpoints.repair

    def repair(directory: Path) -> checkpoints.RepairReport:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(directory)

    monkeypatch.setattr(checkpoints, "repair", repair)
    course = fake.run("train(7); os.kill(os.getpid(), signal.SIGKILL)")
    assert (course.outcome.status, course.outcome.exit_code) == ("stopped", 143)
    state = read_state(fake.folder.state_file)
    assert (state.status, state.reason) == ("stopped", "stopped by SIGTERM before it was started again")
    assert fake.starts() == 1


def test_what_is_saved_where_it_was_to_stop_is_not_started_again(fake):
    course = fake.run("train(5); os.kill(os.getpid(), signal.SIGKILL)", train__stop_at=5)
    assert fake.starts() == 1 and "train.stop_at" in course.why_no_more


def test_a_command_is_told_of_each_event_in_order(fake):
    place = fake.place / "told"
    fake.run(
        "if turn == 0:\n    train(7); os.kill(os.getpid(), signal.SIGKILL)\n",
        alerts__command=f"cat >> {place}",
        alerts__events=["start", "failure", "restart", "end"],
    )
    told = [json.loads(line) for line in place.read_text().splitlines()]
    assert [event["event"] for event in told] == ["start", "failure", "restart", "end"]
    assert told[1]["text"].startswith("run has failed at step 7 of 12: rank 0 was killed")
    assert told[2]["from_iteration"] == 5
    assert (told[3]["status"], told[3]["num_restarts"]) == ("finished", 1)


def test_a_hook_that_fails_or_hangs_changes_nothing(fake):
    course = fake.run("", alerts__command="exit 4", alerts__events=["start", "end"])
    assert (course.outcome.status, course.outcome.exit_code) == ("finished", 0)
    said = [e["text"] for e in fake.told if "alerts.command" in e.get("text", "")]
    assert said == [
        "alerts.command failed at start: exit code 4",
        "alerts.command failed at end: exit code 4",
    ]


def test_damaged_checkpoints_are_written_down_and_that_none_is_whole_is_told(fake):
    for step in (2, 4):
        (fake.folder.checkpoints / f"iter_{step:07d}").mkdir()
    hurt = (
        "if turn == 0:\n    train(7)\n"
        "    for one in (folder / 'checkpoints').glob('iter_*'):\n"
        "        (one / 'manifest.json').unlink(missing_ok=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    course = fake.run(hurt)
    assert course.outcome.status == "finished" and [one["from_iteration"] for one in fake.of("restart")] == [
        0
    ]
    (loud,) = [note["text"] for note in fake.of("note") if "ATTENTION" in note["text"]]
    assert "none of the 3 checkpoints is whole: the run STARTS FROM THE BEGINNING" in loud
    (damage,) = [event for event in read_events(fake.folder.events_file) if event["event"] == "damage"]
    assert [one["iteration"] for one in damage["set_aside"]] == [5, 4, 2] and damage["from_iteration"] == 0
    assert all(Path(one["path"]).is_dir() and "no manifest" in one["fault"] for one in damage["set_aside"])
