"""Keys of restarts, alerts, early stops and result checks: what they refuse, what reaches Megatron."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.checks_resilience import NVRX
from megaplug.job.compose import compose_job
from megaplug.job.translate import megatron_arguments


def said(*words: str, device: str | None = None) -> dict[str, str]:
    return {problem.key: str(problem) for problem in check(small_job(*words), device=device)}


@pytest.mark.parametrize(
    ("words", "key", "part"),
    [
        (["watch.max_restarts=-1"], "watch.max_restarts", "must not be negative"),
        (["alerts.timeout_s=0"], "alerts.timeout_s", "must be above 0"),
        (["alerts.events=[fail]"], "alerts.events", "failure"),
        (["alerts.webhook=https://hooks.example/T0/secret"], "alerts.webhook", "env:MEGAPLUG_WEBHOOK"),
        (["alerts.webhook=env:NOT_SET_ANYWHERE"], "alerts.webhook", "NOT_SET_ANYWHERE is not set"),
        (["alerts.command=''"], "alerts.command", "is empty"),
        (["train.early_stop_patience=0"], "train.early_stop_patience", "must be above 0"),
        (["train.early_stop_min_delta=-1"], "train.early_stop_min_delta", "must not be negative"),
        (
            ["train.early_stop_patience=2", "train.eval_iters=0"],
            "train.early_stop_patience",
            "train.eval_iters",
        ),
        (["resilience.rerun_mode=report_stats"], "resilience.rerun_mode", "validate_results"),
        (["resilience.error_injection_type=cosmic"], "resilience.error_injection_type", "transient_error"),
        (["resilience.error_injection_rate=5"], "resilience.error_injection_rate", "validate_results"),
        (["resilience.calc_ft_timeouts=true"], "resilience.calc_ft_timeouts", "enable_ft_package"),
        (["megatron.rerun_mode=disabled"], "megatron.rerun_mode", "resilience.rerun_mode=disabled"),
        (["megatron.inprocess_restart=true"], "megatron.inprocess_restart", "watch.max_restarts"),
    ],
)
def test_what_cannot_be_is_said_before_the_start(words, key, part):
    assert part in said(*words)[key]


def test_rejected_results_go_to_a_file_that_can_be(tmp_path):
    key = "resilience.result_rejected_tracker_filename"
    assert f"there is no folder {tmp_path / 'new'}" in said(f"{key}={tmp_path / 'new' / 'rejected'}")[key]
    assert f"{tmp_path} is a folder" in said(f"{key}={tmp_path}")[key]
    assert said(f"{key}={tmp_path / 'rejected'}") == {}


def test_no_message_holds_the_address(monkeypatch):
    monkeypatch.setenv("HOOK", "hooks.example/T0/secret")
    (message,) = said("alerts.webhook=env:HOOK").values()
    assert "http://" in message and "secret" not in message
    assert "secret" not in said("alerts.webhook=https://hooks.example/T0/secret")["alerts.webhook"]
    monkeypatch.setenv("HOOK", "https://hooks.example/T0/secret")
    assert said("alerts.webhook=env:HOOK") == {}


def test_stragglers_are_measured_on_a_gpu():
    assert "slowest_rank" in said("resilience.log_straggler=true", device="cpu")["resilience.log_straggler"]
    assert said("resilience.log_straggler=true") == {}


@pytest.mark.parametrize(
    ("installed", "part"), [(None, "which is not installed"), ("0.4.1", "0.4.1 is installed"), ("0.6.0", "")]
)
def test_nvrx_is_refused_by_name_where_it_is_not(installed, part, monkeypatch):
    real = importlib.util.find_spec
    found = real("json") if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == NVRX else real(name))
    monkeypatch.setattr(metadata, "version", lambda _: installed)
    problems = check(small_job("resilience.enable_ft_package=true", "launch=freeze"))
    assert [problem.hint for problem in problems] == (
        ["pip install 'nvidia-resiliency-ext>=0.6'"] if part else []
    )
    assert all(part in problem.message and problem.lacks == NVRX for problem in problems)


def test_nvrx_needs_its_own_launcher():
    with_ours = [str(problem) for problem in check(small_job("resilience.enable_ft_package=true"))]
    assert any("ft_launcher" in problem for problem in with_ours)
    frozen = [
        str(problem) for problem in check(small_job("resilience.enable_ft_package=true", "launch=freeze"))
    ]
    assert not any("ft_launcher" in problem for problem in frozen)


def test_megatron_is_told():
    plain = megatron_arguments(*resolved(), FOLDER)
    assert plain[plain.index("--rerun-mode") + 1] == "disabled"
    words = ["resilience.rerun_mode=validate_results", "resilience.check_for_spiky_loss=true"]
    words += ["resilience.check_for_nan_in_loss_and_grad=false", "train.early_stop_patience=3"]
    told = megatron_arguments(*resolved(*words), FOLDER)
    assert told[told.index("--rerun-mode") + 1] == "validate_results"
    assert {"--check-for-spiky-loss", "--no-check-for-nan-in-loss-and-grad"} <= set(told)
    assert not any("early" in word for word in told)


@pytest.mark.parametrize(
    "word",
    [
        "watch.max_restarts=3",
        "alerts.command=ls",
        "resilience.rerun_mode=validate_results",
        "resilience.check_for_large_grads=true",
        "train.early_stop_patience=3",
        "train.early_stop_min_delta=0.1",
    ],
)
def test_a_run_that_has_failed_can_go_on_with_it(word):
    from megaplug.job.identity import digest, identity

    assert digest(identity(*resolved(word))) == digest(identity(*resolved()))


def test_the_default_is_to_end():
    job = compose_job([])
    assert (job.watch.max_restarts, job.alerts.command, job.alerts.webhook) == (0, None, None)
    assert (job.train.early_stop_patience, job.resilience.rerun_mode) == (None, "disabled")
