"""Where the commands begin, so early that a signal is one line even while they are still being imported."""

from __future__ import annotations

import importlib
import os
import signal

_OTHERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def train() -> int:
    """``megaplug-train`` and ``launch/train.py``; returns the exit code."""
    return _command("train")


def plan() -> int:
    """``megaplug-plan`` and ``launch/plan.py``; returns the exit code."""
    return _command("plan")


def prepare() -> int:
    """``megaplug-prepare`` and ``launch/prepare.py``; returns the exit code."""
    return _command("prepare")


def checkpoint() -> int:
    """``megaplug-checkpoint`` and ``launch/checkpoint.py``; returns the exit code."""
    return _command("checkpoint")


def runs() -> int:
    """``megaplug-runs`` and ``launch/runs.py``; returns the exit code."""
    return _command("runs")


def _command(name: str) -> int:
    # Under nohup and in scripts' background it is ignored, and stays so.
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:
        signal.signal(signal.SIGINT, _leave)
    for number in _OTHERS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _leave)
    main = importlib.import_module(f"megaplug.commands.{name}").main
    if waiting:
        # From here on the command sees to it, and to the others; see `commands.cli.guarded`.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code: int = main()
    return code


def _leave(number: int, _: object) -> None:
    """Nothing has begun: there is nothing to clean up."""
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    os.write(2, f"interrupted{by}\n".encode())
    os._exit(128 + number)
