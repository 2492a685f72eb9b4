"""Events over a pipe, and the watchdog."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys

from megaplug.runs.events import MAX_LINE, EventWriter, parse_event


def test_an_event_arrives_as_it_was_sent():
    reader, writer = os.pipe()
    EventWriter(writer).write("step", iteration=3, loss=float("inf"))
    event = parse_event(os.read(reader, 65536))
    assert event.pop("time") > 0
    assert event == {"event": "step", "iteration": 3, "loss": float("inf")}
    os.close(reader)
    EventWriter(writer).write("step", iteration=4)  # nobody reads any more: no error
    os.close(writer)


def test_without_a_pipe_nothing_happens(monkeypatch):
    EventWriter(None).write("step", iteration=1)
    monkeypatch.delenv("MEGAPLUG_EVENTS_FD", raising=False)
    assert EventWriter.from_environment().fd is None


def test_a_long_text_loses_its_middle_and_stays_one_atomic_line():
    reader, writer = os.pipe()
    EventWriter(writer).write("end", status="failed", reason="begin" + "é" * 9000 + "finish")
    line = os.read(reader, 65536)
    assert len(line) <= MAX_LINE and line.endswith(b"\n")
    reason = json.loads(line)["reason"]
    assert reason.startswith("begin") and reason.endswith("finish")
    os.close(reader)
    os.close(writer)


def test_stray_output_is_no_event():
    assert [parse_event(line) for line in (b"", b"hello", b"[1]", b'{"a": 1}', b'{"event": 3}', b"\xff")] == [
        None
    ] * 6


_RANK = """
import os, signal, subprocess, sys
from megaplug.runs import watchdog
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
watchdog.start(int(sys.argv[1]))
print(child.pid, flush=True)
signal.pause()
"""


def test_the_watchdog_kills_the_group_when_the_pipe_closes():
    reader, writer = os.pipe()
    rank = subprocess.Popen(
        [sys.executable, "-c", _RANK, str(reader)], pass_fds=[reader], stdout=subprocess.PIPE, process_group=0
    )
    try:
        rank.stdout.readline()
        os.close(reader)
        assert rank.poll() is None
        os.close(writer)
        assert rank.wait(timeout=10) == -signal.SIGKILL
        assert select.select([rank.stdout], [], [], 10)[0], "the child, which shares the pipe, still lives"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.communicate()


def test_the_watchdog_kills_itself_alone_in_somebody_else_s_group():
    # The rank's parent is in the same group, and outlives it to say so.
    parent = (
        "import os, subprocess, sys; r, w = os.pipe();"
        "p = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(r)], pass_fds=[r],"
        "stdout=subprocess.PIPE);"
        "child = int(p.stdout.readline()); os.close(w); print(p.wait()); os.kill(child, 9)"
    )
    run = subprocess.run(
        [sys.executable, "-c", parent, _RANK], capture_output=True, text=True, timeout=20, process_group=0
    )
    assert run.stdout.strip() == "-9"
