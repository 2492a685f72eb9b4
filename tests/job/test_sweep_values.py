"""What the words of a sweep name, by Hydra's own grammar."""

from __future__ import annotations

import pytest

from megaplug.errors import UserError
from megaplug.job.compose import compose_job, sweep_points


def test_a_sweep_has_a_point_for_every_combination() -> None:
    points = sweep_points(
        ["topology=tp2,pp2", "train.seed=range(1,4)", "megatron.num_workers=1,2", "train.iters=5"]
    )
    assert len(points) == 2 * 3 * 2
    assert points[0] == ["topology=tp2", "train.seed=1", "megatron.num_workers=1", "train.iters=5"]
    assert compose_job(points[0]).megatron["num_workers"] == 1


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("lr.lr=1e-3,2e-3", ["0.001", "0.002"]),
        ("lr.lr=choice(1e-3,2e-3)", ["0.001", "0.002"]),
        ("train.tokens=1e9,300B", ["1e9", "300B"]),
        ("train.seed=range(3)", ["0", "1", "2"]),
        ("train.seed=range(3,0,-1)", ["3", "2", "1"]),
        # As decimals, and without the end: in binary there would be 0.30000000000000004 and 0.4.
        ("lr.lr=range(0.1,0.4,0.1)", ["0.1", "0.2", "0.3"]),
        ("lr.lr=range(1e-3,4e-3,1e-3)", ["0.001", "0.002", "0.003"]),
        ("train.seed=sort(3,1,2)", ["1", "2", "3"]),
        ("model=glob(tiny_l*)", ["tiny_llama3_150m", "tiny_llama3_50m"]),
        ("model=glob([tiny_l*,tiny],exclude=*_5*)", ["tiny", "tiny_llama3_150m"]),
        ("profile=true,false", ["true", "false"]),
        ("train.early_stop_patience=null,3", ["null", "3"]),
        ("data.split='90,5,5','80,10,10'", ["'90,5,5'", "'80,10,10'"]),
    ],
)
def test_values_are_named_as_they_would_be_typed_one_by_one(word: str, values: list[str]) -> None:
    points = sweep_points([word])
    assert [point[0].partition("=")[2] for point in points] == values
    for point in points:
        compose_job(point)


@pytest.mark.parametrize(
    ("word", "said", "hint"),
    [
        ("lr.lr=interval(1e-4,1e-3)", "interval(1e-4,1e-3) has no single values", "range(START,STOP,STEP)"),
        ("topology=interval(0,1)", "interval(0,1) has no single values", "topology=A,B"),
        ("lr.lr=glob(*)", "this is no config group", "model=glob(tiny*)"),
        ("model=glob(lama*)", "glob(lama*) names nothing", "--help model"),
        ("train.seed=range(1,1)", "range(1,1) names nothing", "its end is not one"),
        ("train.seed=range(1,4,0)", "range(1,4,0) names nothing", "its end is not one"),
        ("topology=tp2,tp3", "there is no option 'tp3'", "topology.tp=3"),
        ("lr.lrr=range(1,4)", "there is no such key", "did you mean lr.lr?"),
    ],
)
@pytest.mark.parametrize("of", [sweep_points, compose_job])
def test_what_names_no_values_is_refused_with_what_does(of, word: str, said: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        of([word])
    assert said in caught.value.message and hint in caught.value.hint
