"""Does many tasks at once, one process a core, and gives their results in the order of the tasks.

The children are plain Python without torch. They end with the process that started them, whatever ends it:
the kernel kills them when their parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import megaplug
from megaplug.data.tasks import Desk, Tell, tokenizer_values
from megaplug.errors import UserError
from megaplug.job.schema import TokenizerConfig

_AHEAD = 8  # tasks a child may be ahead of the one whose result is waited for
_PIPE_BYTES = 1 << 20


class Crew(Protocol):
    """Who does the tasks."""

    def results(self, tasks: Iterable[Mapping[str, Any]], tell: Tell) -> Iterator[dict[str, Any]]:
        """The result of every task, in their order.

        Args:
            tasks: As `megaplug.data.tasks` knows them.
            tell: Is told numbers of bytes done.

        Raises:
            UserError: What a task raised.
            OSError: The disk refused.
        """


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def crew(size: int, tokenizer: TokenizerConfig) -> Iterator[Crew]:
    """A crew of so many processes; one works in this process.

    Args:
        size: Processes.
        tokenizer: What they tokenize with.

    Raises:
        UserError: The machine refuses to start so many.
    """
    if size <= 1:
        desk = Desk(0, tokenizer)
        try:
            yield _Alone(desk)
        finally:
            desk.close()
        return
    children: list[_Child] = []
    try:
        for number in range(size):
            children.append(_Child(number, tokenizer))
        yield _Many(children)
    finally:
        for child in children:
            child.end()


class _Alone:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def results(self, tasks: Iterable[Mapping[str, Any]], tell: Tell) -> Iterator[dict[str, Any]]:
        for task in tasks:
            yield self._desk.do(task, tell)


class _Many:
    def __init__(self, children: list[_Child]) -> None:
        self._children = children

    def results(self, tasks: Iterable[Mapping[str, Any]], tell: Tell) -> Iterator[dict[str, Any]]:
        waiting = enumerate(tasks)
        done: dict[int, dict[str, Any]] = {}
        idle, busy = list(self._children), dict[_Child, int]()
        wanted, more = 0, True
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.answers, selectors.EVENT_READ, child)
            while more or busy or done:
                # None runs so far ahead that results heap up.
                while more and idle and len(done) < _AHEAD * len(self._children):
                    number, task = next(waiting, (-1, None))
                    if task is None:
                        more = False
                        break
                    child = idle.pop()
                    child.give(task)
                    busy[child] = number
                if busy:
                    for key, _ in selector.select():
                        answer = key.data.listen(tell)
                        if answer is not None:
                            done[busy.pop(key.data)] = answer
                            idle.append(key.data)
                while wanted in done:
                    yield done.pop(wanted)
                    wanted += 1


class _Child:
    """One process, and what it said that is not yet a whole line."""

    def __init__(self, number: int, tokenizer: TokenizerConfig) -> None:
        # An empty path is the folder that one stands in: whose files are no modules here, as -P has it.
        others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        paths = [str(Path(megaplug.__file__).parents[1]), *others]
        alone = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **alone, "PYTHONPATH": os.pathsep.join(paths)}
        pipe = subprocess.PIPE
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
        command = [sys.executable, "-P", "-m", "megaplug.data.worker", str(number), str(os.getpid())]
        try:
            self._process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=self._log)
        except OSError as error:
            self._log.close()
            raise UserError(
                f"data.path: process {number + 1} that tokenizes cannot be started: {error.strerror}",
                hint="give it fewer cores, for example with taskset -c 0, or raise the limit (ulimit -u)",
                exit_code=1,
            ) from error
        self._heard = bytearray()
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        self.give(tokenizer_values(tokenizer))

    def give(self, message: Mapping[str, Any]) -> None:
        """Sends a line."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            self._died()

    def listen(self, tell: Tell) -> dict[str, Any] | None:
        """Reads what has come; gives the result if it is there."""
        data = os.read(self.answers.fileno(), _PIPE_BYTES)
        if not data:
            self._died()
        self._heard += data
        if b"\n" not in data:
            return None
        lines = self._heard.split(b"\n")
        self._heard = lines.pop()
        answer = None
        for line in lines:
            word, value = json.loads(bytes(line))
            if word == "read":
                tell(value)
            elif word == "error":
                raise UserError(value["message"], hint=value["hint"])
            elif word == "errno":
                raise OSError(value, os.strerror(value))
            else:
                answer = value
        return answer

    def end(self) -> None:
        """Ends it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _died(self) -> None:
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read()[-4000:].decode(errors="replace")
        if code == -9:
            raise UserError(
                "data.path: a process that tokenizes was killed, probably for want of memory",
                hint="give the machine more memory, or cut large documents into several",
                exit_code=1,
            )
        raise RuntimeError(f"a process that tokenizes ended with {code}:\n{tail}")
