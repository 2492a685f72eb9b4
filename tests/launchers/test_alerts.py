"""A command and a webhook are told what has happened; whatever they do is no more than a line."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaplug.launchers import alerts
from megaplug.launchers.alerts import Alerts

EVENT = {
    "event": "failure",
    "run": "tiny-0",
    "reason": "rank 1 \"hangs\" 'here'\n$(x)",
    "rank": 1,
    "hint": None,
}


class Hook:
    """An HTTP server that keeps what was posted and answers as it is told."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, dict]] = []
        self.answers = 200
        self.waits = threading.Event()
        self.waits.set()
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.posted.append((self.headers["Content-Type"], json.loads(body)))
                hook.waits.wait(20.0)
                with contextlib.suppress(BrokenPipeError):
                    self.send_response(hook.answers)
                    self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret-token"


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.waits.set()
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture
def gone(is_alive):
    def wait(pids: list[int]) -> bool:
        """Whether processes that were killed are gone, as soon as the kernel is through with them."""
        deadline = time.monotonic() + 5.0
        while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.005)
        return not any(is_alive(pid) for pid in pids)

    return wait


def told(*events: dict, **config) -> list[str]:
    """The lines that come of sending some events."""
    given = {"command": None, "webhook": None, "on": ["failure", "end"], "timeout_s": 10.0, **config}
    with Alerts(**given) as sender:
        for event in events:
            sender.send(event)
        return sender.finish()


def test_a_command_gets_the_event_on_its_stdin_and_in_its_environment(tmp_path):
    place = tmp_path / "told"
    command = f'cat > {place}; printf %s "$MEGAPLUG_ALERT_REASON|$MEGAPLUG_ALERT_RANK" > {place}.env'
    assert told(EVENT, command=command) == []
    assert json.loads(place.read_text()) == EVENT
    assert Path(f"{place}.env").read_text() == f"{EVENT['reason']}|1"


def test_a_webhook_gets_the_event_as_json(hook):
    assert told(EVENT, {**EVENT, "event": "end"}, webhook=hook.url) == []
    assert hook.posted == [("application/json", EVENT), ("application/json", {**EVENT, "event": "end"})]


def test_only_the_events_that_were_asked_for_are_sent(hook):
    assert told(EVENT, {**EVENT, "event": "restart"}, webhook=hook.url, on=["restart"]) == []
    assert [event["event"] for _, event in hook.posted] == ["restart"]


def test_a_command_that_cannot_be_told_keeps_the_webhook_from_nothing(hook, monkeypatch):
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    last = {**EVENT, "event": "end"}
    said = told(EVENT, last, command="true", webhook=hook.url)
    assert said == [
        f"alerts.command failed at {kind}: No space left on device" for kind in ("failure", "end")
    ]
    assert [event for _, event in hook.posted] == [EVENT, last]


def test_a_webhook_that_answers_in_no_language_of_the_web_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/secret-token"
        said = told(EVENT, {**EVENT, "event": "end"}, webhook=url)
        assert said == [f"alerts.webhook failed at {kind}: BadStatusLine" for kind in ("failure", "end")]
        thread.join()


def test_a_command_that_fails_is_one_line_with_its_last_words():
    assert told(EVENT, command="echo first; echo no such room >&2; exit 3") == [
        "alerts.command failed at failure: exit code 3: no such room"
    ]


def test_a_command_that_hangs_is_ended():
    assert told(EVENT, command="sleep 300", timeout_s=0.3) == [
        "alerts.command failed at failure: it was ended after 0.3 s (alerts.timeout_s)"
    ]


def test_all_that_a_command_has_started_ends_with_it(tmp_path, gone, monkeypatch):
    place = tmp_path / "pids"

    def ends(*_: object) -> bool:
        """Its time is over as soon as it has started everything."""
        deadline = time.monotonic() + 20.0
        while not place.exists() or len(place.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return False

    monkeypatch.setattr(alerts, "_ends", ends)
    (line,) = told(EVENT, command=f"sleep 300 & echo $! > {place}; echo $$ >> {place}; wait")
    assert "it was ended" in line
    assert gone([int(pid) for pid in place.read_text().split()])


def test_what_a_command_leaves_behind_ends_with_it(tmp_path, gone):
    place = tmp_path / "pid"
    assert told(EVENT, command=f"sleep 300 > /dev/null & echo $! > {place}") == []
    assert gone([int(place.read_text())])


@pytest.mark.parametrize("answers", [404, 500])
def test_a_webhook_that_refuses_is_one_line_without_its_address_and_is_asked_once(hook, answers):
    hook.answers = answers
    (line,) = told(EVENT, webhook=hook.url)
    assert line.startswith(f"alerts.webhook failed at failure: the answer was {answers}")
    assert "secret-token" not in line and "127.0.0.1" not in line
    assert len(hook.posted) == 1


def test_a_webhook_that_does_not_answer_is_given_up(hook):
    hook.waits.clear()
    (line,) = told(EVENT, webhook=hook.url, timeout_s=0.5)
    assert "no answer within" in line and "secret-token" not in line
    assert len(hook.posted) <= 1  # as soon as the server has read it


def test_a_webhook_where_nobody_listens_is_one_line(hook):
    hook.server.server_close()
    # A port of a socket that is closed.
    (line,) = told(EVENT, webhook="http://127.0.0.1:9/secret-token", timeout_s=2.0)
    assert line.startswith("alerts.webhook failed at failure: ") and "secret-token" not in line


def test_whoever_sends_does_not_wait(hook):
    hook.waits.clear()
    with Alerts(None, hook.url, ["failure"], 20.0) as sender:
        began = time.monotonic()
        for _ in range(3):
            sender.send(EVENT)
        assert time.monotonic() - began < 5.0
        hook.waits.set()
        assert sender.finish() == []
    assert len(hook.posted) == 3


def test_a_command_ends_with_a_launcher_that_is_killed(tmp_path, gone):
    place = tmp_path / "pids"
    script = (
        "import os, signal, time; from pathlib import Path; from megaplug.launchers.alerts import Alerts\n"
        f"alerts = Alerts('echo $$ > {place}.new; mv {place}.new {place}; sleep 300', None, ['end'], 300.0)\n"
        "alerts.send({'event': 'end'})\n"
        f"while not Path('{place}').exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert gone([int(place.read_text())])


def test_a_command_that_still_runs_at_an_exception_is_ended(tmp_path, gone):
    place = tmp_path / "pid"
    with (
        pytest.raises(KeyboardInterrupt),
        Alerts(f"echo $$ > {place}; sleep 300", None, ["end"], 300.0) as alerts,
    ):
        alerts.send({"event": "end"})
        deadline = time.monotonic() + 5.0
        while not (place.exists() and place.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert gone([int(place.read_text())])
