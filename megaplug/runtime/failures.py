"""The last words of a rank that cannot go on: what failed, at which step, with how much memory."""

from __future__ import annotations

import re
from types import TracebackType

import torch

from megaplug.errors import UserError
from megaplug.runs.events import EventWriter
from megaplug.runtime import causes
from megaplug.runtime.metrics import MetricsRecorder
from megaplug.runtime.rerun import Findings
from megaplug.runtime.stopwatch import data_wait
from megaplug.runtime.writers import OTHER_RANK

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|out of memory")
_REQUESTED = re.compile(r"tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_NAN = re.compile(r"found (NaN|Inf) in ((?:the loss|local grad norm)[^']*)")
# How gloo and NCCL say that a peer is gone.
_PEER = re.compile(
    OTHER_RANK + r"|gloo/transport|Connection (closed|reset) by peer|remote process exited|Broken pipe"
)


class LastWords:
    """Tells the supervisor of an exception that leaves ``with``, before anything is torn down.

    Args:
        events: Where the supervisor listens.
        recorder: Knows the step.
        findings: Know why Megatron's rerun state machine has ended the run.
    """

    def __init__(self, events: EventWriter, recorder: MetricsRecorder, findings: Findings) -> None:
        self._events = events
        self._recorder = recorder
        self._findings = findings

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            return
        found = kind_of(error)
        reason = reason_of(error, found, self._recorder.step_in_progress)
        rejected = self._findings.of_exit(error.code) if isinstance(error, SystemExit) else None
        if rejected is not None:
            found, reason = rejected.kind, rejected.text
        self._events.write(
            "end",
            status="failed",
            kind=found,
            reason=reason,
            iteration=self._recorder.iteration,
            peak=torch.cuda.max_memory_allocated(),
            requested=_requested(error),
        )


def kind_of(error: BaseException) -> str:
    """What has failed.

    ``disk`` (takes nothing more), ``memory``, ``data``, ``nan``, ``helper`` (a process of this rank's own is
    gone), ``peer`` (another rank is), ``exit`` or ``error``.
    """
    text = str(error)
    if causes.refused_by_disk(error):
        return "disk"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY.search(text):
        return "memory"
    if data_wait.note in getattr(error, "__notes__", ()):
        return "data"
    if _NAN.search(text):
        return "nan"
    if causes.helper_gone(error):
        return "helper"
    if isinstance(error, torch.distributed.DistBackendError) or _PEER.search(text):
        return "peer"
    return "exit" if isinstance(error, SystemExit) else "error"


def reason_of(error: BaseException, kind: str, step: int | None) -> str:
    """One line for a person.

    Args:
        error: What was raised.
        kind: From `kind_of`.
        step: The training step that was being computed; None before the first.
    """
    at = "before the first step" if step is None else f"at step {step}"
    text = str(error).strip()
    named = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    if isinstance(error, UserError):
        named = error.message
    if kind in ("disk", "helper"):
        what = causes.refused_by_disk(error) if kind == "disk" else causes.HELPER_GONE
        # Of which checkpoint it is `writers.told_of` says where it can.
        saved = re.search(r"checkpoint of (step [0-9]+)", named)
        if saved and kind == "helper":
            return named  # says whose
        if saved:
            return f"{what} while saving {saved[1]}"
        return f"{what} {at}" + (", while saving" if causes.while_saving(error) else "")
    if kind == "memory":
        requested = _requested(error)
        return f"out of memory {at}" + (f", allocating {requested / 2**20:,.0f} MiB" if requested else "")
    if kind == "data":
        return f"the data loader failed {at}: {named}"
    if kind == "nan":
        found = _NAN.search(text)
        assert found is not None
        return f"{found[1]} in {found[2].strip()} {at}"
    if kind == "peer":
        return f"lost its connection to another rank {at}"
    if kind == "exit":
        return f"Megatron left {at} with {text or 0}; the last lines of this log say why"
    return f"{named} ({at})"


def _requested(error: BaseException) -> int:
    """Bytes of the allocation that failed; 0 where the message does not say."""
    found = _REQUESTED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0
