"""What watches a run is asked for before it starts: receivers of figures, profiles, log levels."""

from __future__ import annotations

import importlib.util

import pytest
from job_factory import FOLDER, resolved, small_job

from megaplug.job.checks import check
from megaplug.job.compose import compose_job
from megaplug.job.translate import megatron_arguments


@pytest.mark.parametrize(
    ("word", "kind"), [("profile=true", "torch"), ("profile=false", "none"), ("profile=nsys", "nsys")]
)
def test_a_profile_is_asked_for_as_people_type_it(word: str, kind: str) -> None:
    assert compose_job([word]).profile.kind == kind


@pytest.mark.parametrize(
    ("words", "key", "part"),
    [
        (["profile=true", "profile.ranks=[0,2]", "topology=tp2"], "profile.ranks", "its ranks are 0 to 1"),
        (["profile=true", "profile.ranks=[]"], "profile.ranks", "names no rank"),
        (["profile=true", "train.iters=4"], "profile.wait", "nothing would be recorded"),
        (["profile=nsys", "device=cpu"], "profile", "nsys records a GPU"),
        (["profile=nsys", "profile.repeat=2"], "profile.repeat", "nsys writes one report"),
        (["profile=true", "profile.active=0"], "profile.active", "must be above 0"),
        (["profile=true", "profile.wait=-1"], "profile.wait", "must not be negative"),
        (["logging.level=loud"], "logging.level", "known: "),
        (["logging.peak_tflops=0"], "logging.peak_tflops", "must be above 0"),
        (["megatron.profile=true"], "megatron.profile", "profile=nsys"),
    ],
)
def test_what_cannot_be_is_said_before_the_start(words: list[str], key: str, part: str) -> None:
    device = "cpu" if "device=cpu" in words else None
    found = [str(problem) for problem in check(small_job(*words), device=device) if problem.key == key]
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize(
    ("word", "package"),
    [("logging.wandb_project=mine", "wandb"), ("logging.mlflow_tracking_uri=there", "mlflow")],
)
def test_a_missing_package_is_one_line_with_what_installs_it(
    word: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    assert check(small_job()) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    (problem,) = check(small_job(word))
    assert problem.key == word.partition("=")[0]
    assert package in problem.message and problem.hint == f"pip install 'megaplug[{package}]'"


def test_megatron_is_told_its_level_and_its_ranges() -> None:
    plain = megatron_arguments(*resolved("logging.level=warning"), FOLDER)
    assert plain[plain.index("--logging-level") + 1] == "30"
    assert "--profile" not in plain
    ranges = megatron_arguments(*resolved("profile=nsys", "profile.wait=5"), FOLDER)
    assert {"--profile", "--nvtx-ranges"} <= set(ranges)
    assert ranges[ranges.index("--profile-step-start") + 1] == "6"
    assert ranges[ranges.index("--profile-step-end") + 1] == "8"
    # The torch profiler is megaplug's own: Megatron's has no memory and no repetition.
    assert "--profile" not in megatron_arguments(*resolved("profile=true"), FOLDER)
