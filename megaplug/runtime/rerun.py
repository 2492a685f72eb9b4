"""What Megatron's rerun state machine finds: told as it happens, and who is at fault when it ends the run.

With ``resilience.rerun_mode=validate_results`` a step whose result is rejected (NaN, Inf) is computed again,
in place. Another result means a passing fault: exit code 17, and a fresh start from the last checkpoint. The
same one is to be computed on another device: Megatron saves the step before, with the batch, and leaves with
16; the ranks that are started next compute that step once more, and leave with 17 and the answer.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from megaplug.runs.events import EventWriter
from megaplug.runtime.metrics import MetricsRecorder

# By what Megatron writes of its validations (RerunValidationStatus of megatron.core.rerun_state_machine).
_KINDS = {
    "first_rerun_not_reproducible": "transient",
    "first_rerun_reproducible": "unexplained",
    "second_rerun_not_reproducible": "persistent",
    "second_rerun_reproducible": "reproducible",
}
_SAYS = {
    "transient": "computed again it was {result}: a passing fault of device {device} of {node}",
    "unexplained": "computed again it was the same: another device must tell whether this one is at fault",
    "persistent": "on this device it is {result}: device {device} of {node} computes wrongly",
    "reproducible": "another device computes the same: it is no fault of a device, but of data, model or "
    "learning rate",
}
_CODES = (16, 17)


@dataclass(frozen=True)
class Finding:
    """A result that was rejected in this rank, and what became of it.

    Attributes:
        kind: ``transient``, ``unexplained``, ``persistent`` or ``reproducible``.
        text: For a person, without the rank.
    """

    kind: str
    text: str


class Findings:
    """Follows the rerun state machine of this rank.

    Args:
        events: Where the supervisor listens.
        recorder: Knows the step; the machine's own count is one ahead, or behind after a restart.
    """

    def __init__(self, events: EventWriter, recorder: MetricsRecorder) -> None:
        self._recorder = recorder
        self.last: Finding | None = None
        self._events = events

    def watch(self, training: Any) -> None:
        """Listen to what Megatron would write to its tracker file.

        Args:
            training: ``megatron.training.training``.
        """
        from megatron.core.rerun_state_machine import RerunStateMachine

        real_log, real_train = RerunStateMachine._log_validation_error_to_file, training.train

        @functools.wraps(real_log)
        def log(machine: Any, status: Any, result: Any, message: str) -> None:
            real_log(machine, status, result, message)
            self._take(machine, status.value, result, message)

        @functools.wraps(real_train)
        def train(*args: Any, **kwargs: Any) -> Any:
            if training.get_args().iteration > 0:
                # Megatron accepts any result of the first step, since there may be no state to save before
                # it. A run that goes on has one, and the first step is the one that has just failed.
                training.get_rerun_state_machine().first_iteration_complete = True
            return real_train(*args, **kwargs)

        RerunStateMachine._log_validation_error_to_file = log
        training.train = train

    def of_exit(self, code: object) -> Finding | None:
        """What this rank knows of Megatron's leaving with a code; None where it has nothing to do with it."""
        if code not in _CODES:
            return None
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        machine = get_rerun_state_machine()
        if machine.restart_again_requested:
            where = f"device {machine.suspicious_device} of {machine.suspicious_node}"
            what = _what(machine.failed_validation_call.caller.message, machine.initial_result)
            step = self._recorder.step_in_progress
            return Finding(
                "unexplained", f"{what} at step {step:,}: it was computed on {where} again, no other"
            )
        if self.last is not None:
            return self.last
        return Finding("peer", "left because of a result of another rank")

    def _take(self, machine: Any, status: str, result: Any, message: str) -> None:
        step, what = self._recorder.step_in_progress, _what(message, result)
        if status == "rerun_disabled":
            # What ends the run says so itself.
            if not message.startswith("found "):
                self._note(f"{what} at step {step:,}")
            return
        if status == "initial_run":
            self._note(f"{what} at step {step:,}: the step is computed again")
            return
        kind = _KINDS[status]
        first = _what(message, machine.initial_result)
        node, device = os.uname().nodename, torch.cuda.current_device()
        if kind == "persistent":
            node, device = machine.suspicious_node, machine.suspicious_device
        says = _SAYS[kind].format(result=_number(result), node=node, device=device)
        self.last = Finding(kind, f"{first} at step {step:,}: {says}")
        self._note(self.last.text)

    def _note(self, text: str) -> None:
        self._events.write("note", text=f"rank {os.environ['RANK']}: {text}")


def _what(message: str, result: Any) -> str:
    """``NaN in the loss``, ``spiky loss 12.3``."""
    return message.removeprefix("found ") if message.startswith("found ") else f"{message} {_number(result)}"


def _number(result: Any) -> str:
    return f"{float(result.detach() if isinstance(result, torch.Tensor) else result):.6g}"
