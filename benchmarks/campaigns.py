"""What campaigns against live runs share: a small job, and its command as a process with all its children.

The job has dropout, a blend of two small sources that it goes through several times, validation, and saves
every other step: whatever does not come back exactly after a restart is seen in its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.run_figures import only_run  # noqa: E402
from megaplug.runs.folder import RunFolder  # noqa: E402

# Every process of a command inherits it, whatever it does with its name, its parent or its group.
_MARK = "MEGAPLUG_CAMPAIGN"
LAYOUTS = {
    1: ["train.micro_batch_size=4"],
    2: ["train.micro_batch_size=2", "topology.dp=2"],
    4: ["train.micro_batch_size=2", "topology.tp=2", "topology.pp=2"],
}
Event = dict[str, Any]


def write_texts(folder: Path) -> Path:
    """Two small sources of sentences, always the same."""
    chance = random.Random(7)
    words = {
        "cats": ["the cat", "a kitten", "fish", "milk"],
        "birds": ["my bird", "a gull", "rain", "the sea"],
    }
    for name, nouns in words.items():
        (folder / name).mkdir(parents=True)
        for number in range(8):
            said = [f"{chance.choice(nouns)} sees {chance.choice(nouns)}." for _ in range(40)]
            (folder / name / f"{number}.txt").write_text(" ".join(said))
    return folder


def small_job(place: Path, world_size: int, iters: int = 40, save_interval: int = 2) -> list[str]:
    """The words of the job, but for where its runs are; the first call writes its texts.

    Args:
        place: A folder for texts and their tokens.
        world_size: 1, 2 (data parallel) or 4 (tensor and pipeline parallel).
        iters: Its steps.
        save_interval: Steps between two saves.
    """
    texts = place / "texts"
    if not texts.exists():
        write_texts(texts)
    return [
        "name=campaign",
        "device=cpu",
        "launch.output=json",
        *("model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.seq_length=64"),
        *("model.num_attention_heads=4", "model.num_query_groups=2", "model.hidden_dropout=0.1"),
        *("attention=local", "model.attention_dropout=0.1"),
        *("train.global_batch_size=4", f"train.iters={iters}", "lr=cosine", "lr.lr=1e-3"),
        *("train.eval_iters=1", f"train.eval_interval={max(1, iters // 5)}"),
        f"checkpoint.save_interval={save_interval}",
        f"data.path={{cats:{{path:{texts}/cats,weight:0.7}},birds:{{path:{texts}/birds,weight:0.3}}}}",
        f"data.cache_dir={place / 'cache'}",
        "data.split='80,20,0'",
        *LAYOUTS[world_size],
    ]


class Command:
    """``python launch/train.py`` as a process that reports as JSON.

    Args:
        words: Its overrides, ``launch.output=json`` among them.
        runs_dir: Where its run's folder is.
        environment: Beside this process's own.
    """

    def __init__(
        self, words: Sequence[str], runs_dir: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.events: list[Event] = []
        self.runs_dir = runs_dir
        self._mark = f"{_MARK}={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "train.py"), *words, f"runs_dir={runs_dir}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A campaign in a shell's background ignores Ctrl-C, and its commands would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.errors = ""
        self._ranks: dict[int, int] = {}
        self._seen = {self.process.pid}
        reads = (self._read, self._read_errors)
        self._readers = [threading.Thread(target=read, daemon=True) for read in reads]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                self.events.append({**json.loads(line), "heard": time.monotonic()})

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()

    def of(self, kind: str) -> list[Event]:
        """The events of a kind that have been heard so far."""
        return [event for event in self.events if event["event"] == kind]

    def wait_for(self, holds: Callable[[], bool], seconds: float = 300.0, poll_s: float = 0.01) -> bool:
        """Until something holds, asked again and again; False if the command has ended before that.

        Raises:
            TimeoutError: Neither has happened.
        """
        deadline = time.monotonic() + seconds
        while not holds():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"neither that nor the command's end in {seconds:.0f} s")
            time.sleep(poll_s)
        return True

    def ranks(self) -> dict[int, int]:
        """The process ids of the ranks that have been started, by number; they may have ended since."""
        if self.process.poll() is None:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            with contextlib.suppress(OSError):
                for pid in map(int, children.read_text().split()):
                    # Between fork and exec it still is the launcher.
                    number = _environment(pid).get("RANK")
                    if pid not in self._ranks.values() and number is not None:
                        self._ranks[int(number)] = pid
        return dict(self._ranks)

    def end(self, seconds: float = 300.0) -> int:
        """Wait for its end, hear what it has said last, and return its exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
        return code

    def living(self) -> list[int]:
        """Every process that this command has brought into the world and that lives, itself included."""
        name, _, value = self._mark.partition("=")
        numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        self._seen |= {pid for pid in numbers if _environment(pid).get(name) == value}
        # One that was seen counts until all that it held is let go: its environment goes before its files.
        return self._left()

    def _left(self) -> list[int]:
        return [pid for pid in self._seen if _lives(pid)]

    def await_nobody(self, seconds: float) -> float:
        """Until none of its processes lives; the seconds that took.

        Raises:
            TimeoutError: Some do still.
        """
        began = time.monotonic()
        while left := self._left() or self.living():
            self.process.poll()
            if time.monotonic() - began > seconds:
                told = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left}
                raise TimeoutError(f"processes still live after {seconds:.0f} s: {told}")
            time.sleep(0.01)
        return time.monotonic() - began

    def close(self) -> None:
        """Leave nothing behind."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.end(30.0)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def folder(self) -> RunFolder | None:
        """The run's folder, once there is one."""
        return only_run(self.runs_dir)


def _environment(pid: int) -> dict[str, str]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in content.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def _lives(pid: int) -> bool:
    """Whether any thread of it does: the first may be a zombie while another still closes their files."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not select.select([fd], [], [], 0)[0]
    finally:
        os.close(fd)


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name comes, by name."""
    return dict(sorted(Counter(names).items()))
