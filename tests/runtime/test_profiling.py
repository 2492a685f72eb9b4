"""A profile is of the steps and ranks that were asked for, and changes nothing."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from known_values import note, noted
from small_jobs import SmallJobs, curve

WORDS = ["lr=constant", "topology.dp=2", "train.iters=7"]
# Steps 1 to 3 are left out, 4 warms up, 5 and 6 are recorded.
PROFILE = ["profile=true", "profile.ranks=[1]", "profile.with_stack=true"]
AT_ONCE = ["profile.wait=0", "profile.warmup=0", "profile.active=1"]


def note_what_is_in_place(folder: str) -> None:
    """Who stands around Megatron's step when the training loop begins."""
    from megatron.training import training

    real_train, real_step = training.train, training.train_step

    def train(*args: Any, **kwargs: Any) -> Any:
        inner = training.train_step
        names = []
        while inner is not real_step:
            names.append(inner.__code__.co_qualname)
            inner = next(cell.cell_contents for cell in inner.__closure__ if callable(cell.cell_contents))
        note(folder, around=names)
        return real_train(*args, **kwargs)

    training.train = train


@pytest.fixture(scope="module")
def profiled(small_jobs: SmallJobs) -> Any:
    return small_jobs.run([*WORDS, "name=profiled", *PROFILE])


@pytest.fixture(scope="module")
def trace(profiled: Any) -> dict[str, Any]:
    (file,) = profiled.profile.iterdir()
    assert file.name == "rank1_to_step6.pt.trace.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))


def test_the_trace_has_the_steps_that_were_asked_for_and_no_other(trace: dict[str, Any]) -> None:
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [name for name in names if name.startswith("megaplug: step")] == [
        "megaplug: step 5",
        "megaplug: step 6",
    ]
    assert names.count("megaplug: forward of a micro-batch") == 2 * 4
    assert trace["distributedInfo"]["rank"] == 1


def test_the_trace_has_operators_shapes_stacks_and_memory(trace: dict[str, Any]) -> None:
    events = trace["traceEvents"]
    products = [event for event in events if event["name"] == "aten::mm"]
    assert products and all(event["args"]["Input Dims"] for event in products)
    assert [event for event in events if event["name"] == "[memory]"]
    assert [event for event in events if event.get("cat") == "python_function"]


def test_a_profiled_run_computes_the_same_and_is_the_same_run(profiled: Any, small_jobs: SmallJobs) -> None:
    plain = small_jobs.run([*WORDS, "name=unprofiled"])
    assert curve(plain) == curve(profiled)
    assert plain.name.rpartition("-")[2] == profiled.name.rpartition("-")[2]
    assert not plain.profile.exists()


def test_without_a_profile_nothing_stands_in_between(small_jobs: SmallJobs, tmp_path: Path) -> None:
    plant = functools.partial(note_what_is_in_place, str(tmp_path))
    words = ["lr=constant", "train.iters=1"]
    small_jobs.run([*words, "name=looked_at"], plant=plant)
    (plain,) = noted(tmp_path)
    small_jobs.run([*words, "name=looked_at_profile", "profile=true", *AT_ONCE], plant=plant)
    _, with_profile = noted(tmp_path)
    assert plain["around"] == [
        "watch.<locals>.train_step",
        "RankFigures.watch.<locals>.train_step",
        "Stopping._watch_steps.<locals>.train_step",
    ]
    assert with_profile["around"] == [*plain["around"], "_Trace.watch.<locals>.train_step"]
