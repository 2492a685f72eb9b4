"""What Megatron's rerun machine writes of a rejected result, as a person reads it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import (
    Call,
    Caller,
    RerunMode,
    RerunStateMachine,
    RerunValidationStatus,
)

from megaplug.runs.events import EventWriter
from megaplug.runtime.rerun import Findings

NAN, INITIAL = torch.tensor(float("nan"), requires_grad=True), RerunValidationStatus.INITIAL_RUN


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    """A rank at step 4 with its machine, and what it says."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(RerunStateMachine, "_log_validation_error_to_file", lambda *_, **__: None)
    read, write = os.pipe()
    findings = Findings(EventWriter(write), SimpleNamespace(step_in_progress=4))  # type: ignore[arg-type]
    training = SimpleNamespace(train=lambda: None)
    findings.watch(training)
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)

    class Rank:
        def rejects(self, status: RerunValidationStatus, result: torch.Tensor, message: str) -> None:
            machine._log_validation_error_to_file(status=status, result=result, message=message)

        def leaves(self, code: object):
            return findings.of_exit(code)

        def said(self) -> list[str]:
            os.close(write)
            with os.fdopen(read) as lines:
                return [json.loads(line)["text"] for line in lines]

    found = Rank()
    found.machine, found.training = machine, training  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("status", "result", "code", "kind", "part"),
    [
        (
            "FIRST_RERUN_NOT_REPRODUCIBLE",
            2.5,
            17,
            "transient",
            "computed again it was 2.5: a passing fault of device 2",
        ),
        ("FIRST_RERUN_REPRODUCIBLE", float("nan"), 16, "unexplained", "computed again it was the same"),
        ("SECOND_RERUN_NOT_REPRODUCIBLE", 2.5, 17, "persistent", "device 7 of node3 computes wrongly"),
        ("SECOND_RERUN_REPRODUCIBLE", float("nan"), 17, "reproducible", "it is no fault of a device"),
    ],
)
def test_each_verdict_names_step_and_device(rank, status, result, code, kind, part):
    rank.machine.initial_result = NAN
    rank.machine.suspicious_node, rank.machine.suspicious_device = "node3", 7
    rank.rejects(RerunValidationStatus[status], torch.tensor(result), "found NaN in the loss")
    finding = rank.leaves(code)
    assert finding.kind == kind
    assert finding.text.startswith("NaN in the loss at step 4: ") and part in finding.text
    assert rank.said() == [f"rank 1: {finding.text}"]


def test_a_spiky_loss_is_told_and_is_no_reason_to_leave(rank):
    rank.rejects(INITIAL, torch.tensor(712.5), "spiky loss")
    rank.rejects(RerunValidationStatus.RERUN_DISABLED, torch.tensor(712.5), "spiky loss")
    rank.rejects(RerunValidationStatus.RERUN_DISABLED, NAN, "found NaN in the loss")  # which says so itself
    assert rank.said() == [
        "rank 1: spiky loss 712.5 at step 4: the step is computed again",
        "rank 1: spiky loss 712.5 at step 4",
    ]


def test_a_rank_that_has_seen_nothing_left_for_another(rank):
    assert rank.leaves(17).kind == "peer"
    assert rank.leaves(1) is None and rank.leaves("text") is None


def test_the_same_device_again_is_said(rank):
    machine = rank.machine
    machine.restart_again_requested = True
    machine.failed_validation_call, machine.initial_result = Call(Caller("found NaN in the loss", 1), 1), NAN
    machine.suspicious_node, machine.suspicious_device = "node3", 7
    finding = rank.leaves(16)
    assert finding.kind == "unexplained"
    assert finding.text == "NaN in the loss at step 4: it was computed on device 7 of node3 again, no other"


@pytest.mark.parametrize(("iteration", "complete"), [(0, False), (3, True)])
def test_the_first_step_of_a_run_that_goes_on_is_looked_at(rank, iteration, complete):
    rank.training.get_args = lambda: SimpleNamespace(iteration=iteration)
    rank.training.get_rerun_state_machine = lambda: rank.machine
    rank.training.train()
    assert rank.machine.first_iteration_complete is complete
