"""How a rank stops, with forked ranks: validations that are cut, saves that are not doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import SmallJobs, curve, state, steps, validations

from megaplug.runs.checkpoints import list_checkpoints

JOB = ["train.iters=8", "train.eval_interval=4", "train.eval_iters=3", "lr=constant"]


def _at(name: str, times: int, rank: int = 0) -> None:
    """SIGTERM to this process in the given call of one of Megatron's functions, on one rank alone."""
    from megatron.training import training

    holder = training.ft_integration if name.startswith("on_") else training
    real, calls = getattr(holder, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == times and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    setattr(holder, name, counted)


def in_second_batch_of_validation() -> None:
    _at("on_eval_step_start", 2, rank=1)


def in_second_validation() -> None:
    _at("on_eval_step_start", 5)


def in_the_last_validation() -> None:
    _at("on_eval_step_start", 8)


def while_it_saves() -> None:
    _at("save_checkpoint", 1)


@pytest.fixture(scope="module")
def undisturbed(small_jobs: SmallJobs) -> list[tuple[float, float]]:
    folder = small_jobs.run(["name=never_stopped", *JOB])
    assert [step for step, _ in validations(folder)] == [4, 8]
    return [*curve(folder), *validations(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "reached", "validated", "layout"),
    [
        (in_second_batch_of_validation, 4, [], ["topology.dp=2"]),
        (in_second_validation, 8, [4], []),
        (in_the_last_validation, 8, [4, 8], []),
    ],
    ids=["the first, and one rank is told", "the one after the last step", "the last of all"],
)
def test_a_validation_that_is_cut_is_made_whole_by_the_next_start(
    small_jobs: SmallJobs, undisturbed, plant, reached, validated, layout
) -> None:
    words = [f"name={plant.__name__}", *JOB, *layout]
    folder = small_jobs.run(words, plant=plant)
    found = state(folder)
    assert (found.status, found.reason, found.iteration) == ("stopped", "signal", reached)
    assert found.saved_iteration == reached
    assert [step for step, _ in validations(folder)] == validated
    small_jobs.run(words)
    assert state(folder).status == "finished"
    tolerance = 1e-4 if layout else 0.0  # two ranks add up in another order
    assert [*curve(folder), *validations(folder)] == [
        pytest.approx(one, abs=tolerance, rel=0) for one in undisturbed
    ]


@pytest.mark.slow
def test_a_signal_during_a_save_ends_the_run_after_it(small_jobs: SmallJobs) -> None:
    words = ["name=while_it_saves", "train.iters=8", "checkpoint.save_interval=3"]
    folder = small_jobs.run(words, plant=while_it_saves)
    assert [found.iteration for found in list_checkpoints(folder.checkpoints)] == [3]
    assert state(folder).saved_iteration == 3 and len(steps(folder)) == 3


HELPER = """
import os, signal, socket, sys
from megaplug.runtime import stopping
stopping.begin()
ours, its = socket.socketpair()
child = os.fork()
if not child:
    its.send(b"begun")
    its.recv(3)
    os._exit(7)
ours.recv(5)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    os.kill(child, number)
ours.send(b"end")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_what_a_rank_forks_leaves_signals_to_it_and_it_ends_at_once_where_nothing_is_to_be_saved(
    name: str,
) -> None:
    """SLURM sends a signal to every process of a step."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", HELPER, name], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("7\n", "")
    assert done.returncode == -signal.Signals[name]
