"""Each repair of Megatron has a run that fails without it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from ranks import RanksFailed, run_ranks
from small_jobs import SmallJobs, curve, state, steps

from megaplug.runtime.repairs import REPAIRS

TWO_STEPS = ["train.iters=4", "lr=constant"]


def test_a_new_optimizer_cannot_say_what_it_would_load(small_jobs: SmallJobs) -> None:
    words = [*TWO_STEPS, "name=unprimed"]
    small_jobs.run([*words, "train.stop_at=2"])
    with pytest.raises(RanksFailed, match=r"assert len\(steps\) == 1"):
        small_jobs.run(words, skip_repairs=frozenset({"adam-state-before-first-step"}))
    assert len(curve(small_jobs.run(words))) == 4


def test_loading_adam_raises_where_step_is_taken_for_state(small_jobs: SmallJobs) -> None:
    words = [*TWO_STEPS, "name=step_as_state"]
    small_jobs.run([*words, "train.stop_at=2"])
    with pytest.raises(RanksFailed, match="KeyError: 'step'"):
        small_jobs.run(words, skip_repairs=frozenset({"adam-step-is-not-loaded-as-state"}))
    assert len(curve(small_jobs.run(words))) == 4


@pytest.mark.slow
def test_a_state_goes_on_under_another_learning_rate(small_jobs: SmallJobs) -> None:
    """As the summary of a run with a NaN proposes."""
    stopped = small_jobs.run([*TWO_STEPS, "name=rate", "train.stop_at=2"])
    words = [*TWO_STEPS, "name=half_rate", f"load={stopped.path}", "load_state=all", "lr.lr=1e-3"]
    with pytest.raises(RanksFailed, match="KeyError"):
        small_jobs.run(words, skip_repairs=frozenset({"another-learning-rate"}))
    lines = steps(small_jobs.run(words))
    assert [(line["iteration"], line["lr"]) for line in lines] == [(3, 1e-3), (4, 1e-3)]


@pytest.mark.slow
def test_a_run_with_a_stage_without_experts_is_continued(small_jobs: SmallJobs) -> None:
    """Rank 0 has an optimizer for experts and no expert; what it says of its steps is what is saved."""
    layout = ["moe=small", "moe.moe_layer_freq='[0,0,1,1]'", "topology.pp=2", "topology.ep=2"]
    words = [*TWO_STEPS, "name=no_experts", *layout, "topology.dp=2"]
    small_jobs.run([*words, "train.stop_at=2"])
    assert len(curve(small_jobs.run(words))) == 4


@pytest.mark.slow
def test_a_run_on_a_blend_that_was_killed_after_its_last_save_is_finished(small_jobs: SmallJobs) -> None:
    """A blend has as many samples as the run sees, where a source alone has more; none for no validation."""
    blend = ",".join(f"{name}:{{path:{small_jobs.corpus}/0{name}.txt,weight:0.5}}" for name in "12")
    words = [*TWO_STEPS, "model.num_layers=2", f"data.path={{{blend}}}", "name=all_seen"]
    before = curve(small_jobs.run(words))
    with pytest.raises(RanksFailed, match="no samples left to consume: 32, 32"):
        small_jobs.run(words, skip_repairs=frozenset({"all-samples-may-have-been-seen"}))
    folder = small_jobs.run(words)
    assert (state(folder).status, curve(folder)) == ("finished", before)


def samples_that_are_left(repaired: bool) -> list[list[list[int]]]:
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from megaplug.runtime import repairs

    if repaired:
        repairs.apply()
    return [
        list(MegatronPretrainingSampler(total, seen, 4, 0, 1)) for total, seen in ((8, 4), (8, 8), (0, 0))
    ]


def test_of_samples_that_were_all_seen_none_are_left(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="no samples left to consume: 8, 8"):
        run_ranks(1, samples_that_are_left, False, folder=tmp_path / "stock")
    found = run_ranks(1, samples_that_are_left, True, folder=tmp_path / "repaired")
    assert found == [[[[4, 5, 6, 7]], [], []]]


def die_in_the_index() -> None:
    """The process is killed when half of the last of its three files is written."""
    import os
    import signal

    from numpy.lib import format

    real, written = format.write_array, []

    def write_array(file: object, *args: object, **kwargs: object) -> None:
        written.append(file)
        if len(written) == 3:
            file.write(b"\x93NUMPY half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        real(file, *args, **kwargs)

    format.write_array = write_array


@pytest.mark.slow
def test_a_run_that_was_killed_while_the_index_of_its_data_was_written_starts_again(
    small_jobs: SmallJobs,
) -> None:
    words = [*TWO_STEPS, "model.num_layers=2"]
    stock = frozenset({"index-files-are-whole"})
    with pytest.raises(RanksFailed):
        small_jobs.run([*words, "name=torn_index"], plant=die_in_the_index, skip_repairs=stock)
    with pytest.raises(RanksFailed, match="gpt_dataset"):
        small_jobs.run([*words, "name=torn_index"], skip_repairs=stock)
    with pytest.raises(RanksFailed):
        small_jobs.run([*words, "name=whole_index"], plant=die_in_the_index)
    folder = small_jobs.run([*words, "name=whole_index"])
    assert len(curve(folder)) == 4
    assert not [path for path in folder.index_cache.iterdir() if path.name.startswith(".")]


def count_compilers(repaired: bool) -> int:
    from megatron.core.datasets import utils

    from megaplug.runtime import repairs

    if repaired:
        repairs.apply()
    with mock.patch.object(subprocess, "run", return_value=mock.Mock(returncode=0)) as run:
        utils.compile_helpers()
    return run.call_count


def test_stock_megatron_runs_make_for_helpers_that_are_compiled_already(tmp_path: Path) -> None:
    assert run_ranks(1, count_compilers, False, folder=tmp_path / "stock") == [1]
    assert run_ranks(1, count_compilers, True, folder=tmp_path / "repaired") == [0]


def rope_scaling_factor(job_file: str, skip: frozenset[str]) -> float:
    import sys

    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    from megaplug.job.freeze import read_frozen
    from megaplug.runtime import cpu, repairs

    cpu.install()
    repairs.apply(skip)
    sys.argv = ["megaplug", *read_frozen(Path(job_file)).megatron_args]
    return argument_utils.gpt_config_from_args(parse_and_validate_args()).rope_scaling_factor


def test_stock_megatron_scales_rope_by_eight_whatever_is_asked(small_jobs: SmallJobs, tmp_path: Path) -> None:
    folder, _ = small_jobs.freeze(
        ["name=rope", "model.use_rope_scaling=true", "model.rope_scaling_factor=32"]
    )
    job_file, stock = str(folder.job_file), frozenset({"rope-scaling-factor"})
    assert run_ranks(1, rope_scaling_factor, job_file, stock, folder=tmp_path / "stock") == [8.0]
    assert run_ranks(1, rope_scaling_factor, job_file, frozenset(), folder=tmp_path / "repaired") == [32.0]


def test_every_repair_is_in_the_document_on_plain_megatron() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "plain_megatron.md"
    named = set(re.findall(r"^\| `([\w-]+)` \|", document.read_text(), re.MULTILINE))
    assert named == {repair.name for repair in REPAIRS}, f"{document}: its table of repairs is not current"


def samples_left(repaired: bool) -> list[list[int]]:
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from megaplug.runtime import repairs

    if repaired:
        repairs.apply()
    sizes = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1}
    return list(MegatronPretrainingSampler(total_samples=4, consumed_samples=4, **sizes))


def test_stock_megatron_cannot_start_where_all_samples_are_taken(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="no samples left to consume"):
        run_ranks(1, samples_left, False, folder=tmp_path / "stock")
    assert run_ranks(1, samples_left, True, folder=tmp_path / "repaired") == [[]]
