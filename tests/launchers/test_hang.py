"""Ranks that get nothing more done: found, named, shown where they stand, and ended."""

from __future__ import annotations

import pytest

from megaplug.launchers.hang import Limits
from megaplug.launchers.supervisor import Patience
from megaplug.runs.state import read_state

_TRAINS = """
from megaplug.runtime import heartbeat
from megaplug.runtime.heartbeat import here as whereabouts
heartbeat.BEAT_S = 0.2
heartbeat.start_from_environment()
(here / f"pid{rank}").write_text(str(os.getpid()))
# What a rank that waits for others looks like: its innermost frame is one of torch's collectives.
place = here / f"rank{rank}" / "torch" / "distributed"
place.mkdir(parents=True)
(place / "waiting.py").write_text("import signal\\ndef all_reduce():\\n    while True: signal.pause()\\n")
sys.path.insert(0, str(place))
import re
import waiting
whereabouts.iteration = 7
whereabouts.at("training")
"""
_HANGS = {
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "a loop in Python": "while True: pass",
    "C code that keeps the interpreter": "re._compile('(a+)+b', 0).match('a' * 64)",
}


def _patience(**limits: float) -> Patience:
    return Patience(report_s=0.5, teardown_s=0.5, limits=Limits(**limits))


@pytest.mark.parametrize("how", _HANGS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rank_that_hangs_is_named_and_the_stacks_of_all_that_can_are_written(
    job, is_alive, how, world_size
):
    script = (
        f"{_TRAINS}\ndef culprit():\n    {_HANGS[how]}\nculprit() if rank == 1 else waiting.all_reduce()\n"
    )
    outcome = job.run(script, world_size, patience=_patience(hang_s=3.0))
    assert (outcome.status, outcome.rank, outcome.exit_code, outcome.kind) == ("failed", 1, 1, "hang")
    assert outcome.reason.startswith("rank 1 hangs: training after step 7, it has got nothing done for ")
    assert "watch.hang_s" in outcome.hint and "(it was 3)" in outcome.hint
    where = "it is stopped" if how == "stopped" else "it stands in culprit (<string>:"
    assert where in outcome.reason
    state = read_state(job.folder.state_file)
    assert (state.status, state.rank, state.reason) == ("failed", 1, outcome.reason)
    assert len(job.pids()) == world_size and not any(map(is_alive, job.pids()))
    for rank in range(world_size):
        text = job.folder.stack_file(rank).read_text()
        expected = "in all_reduce" if rank != 1 else "no stack" if how == "stopped" else "in culprit"
        assert f"rank {rank}: training, 7 steps done" in text and expected in text
    others = (
        {2: "(rank 0)", 4: "(ranks 0, 2, 3)"} if how == "stopped" else {2: "(ranks 0, 1)", 4: "(ranks 0, 1, "}
    )
    assert others[world_size] in outcome.hint


def test_a_rank_alone_can_hang_too(job, is_alive):
    outcome = job.run(_TRAINS + "while True: pass", patience=_patience(hang_s=2.0))
    assert (outcome.rank, outcome.kind) == (0, "hang")
    assert not any(map(is_alive, job.pids()))


def test_where_all_wait_the_one_that_has_done_least_is_named(job):
    outcome = job.run(
        _TRAINS + "whereabouts.did(8 - (rank == 2)); waiting.all_reduce()",
        3,
        patience=_patience(hang_s=2.0),
    )
    assert outcome.rank == 2 and "all ranks wait for each other" in outcome.reason


def test_whoever_waits_for_a_rank_that_saves_does_not_hang(job):
    outcome = job.run(
        _TRAINS
        + """
pipe = here / "saved"
if rank == 0:
    with whereabouts.during("saving"):
        begun = time.monotonic()
        while time.monotonic() < begun + 6.0: pass
    pipe.touch()
while not pipe.exists(): os.sched_yield()
events.write("end", status="finished", iteration=7)
""",
        2,
        patience=_patience(hang_s=2.0, save_s=120.0),
    )
    assert outcome.status == "finished"


def test_what_takes_long_and_says_what_it_does_is_left_alone(job):
    outcome = job.run(
        _TRAINS
        + """
begun = time.monotonic()
for phase in ("first step", "saving", "building the model"):
    whereabouts.at(phase)
    while time.monotonic() < begun + 3.0: pass
    begun = time.monotonic()
events.write("end", status="finished", iteration=7)
""",
        patience=_patience(hang_s=1.0),
    )
    assert outcome.status == "finished"


def test_a_rank_that_was_never_heard_of_hangs_as_well(job):
    outcome = job.run("signal.pause()", 2, patience=_patience(start_s=2.0))
    assert outcome.reason.startswith("rank 0 hangs: starting, it has got nothing done for ")
    assert outcome.reason.endswith("it gives no stack")
    assert "watch.start_s" in outcome.hint


def test_a_stack_that_comes_slowly_is_waited_for_to_its_end(job):
    outcome = job.run(
        _TRAINS
        + """
from megaplug.runs.events import STACK_FD, STACK_SIGNAL
def slowly(*_):
    fd = int(os.environ[STACK_FD])
    os.write(fd, b'Current thread 0x1 (most recent call first):\\n  File "here.py", line 1 in begun\\n')
    begun = time.monotonic()
    while time.monotonic() < begun + 1.0: pass
    os.write(fd, b'  File "here.py", line 2 in <module>\\n')
signal.signal(STACK_SIGNAL, slowly)
while True: signal.pause()
""",
        patience=_patience(hang_s=2.0),
    )
    assert "it stands in begun (here.py:1)" in outcome.reason
    assert "in <module>" in job.folder.stack_file(0).read_text()
