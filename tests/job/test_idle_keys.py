"""Keys that are no mistake and yet do nothing, or less than they seem to, are named."""

from __future__ import annotations

import pytest
from job_factory import small_job

from megaplug.errors import UserError
from megaplug.job.idle import idle_notes

STEPS = ["train.iters=300", "train.eval_interval=50", "checkpoint.save_interval=50"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.early_stop_min_delta=0.1"], "train.early_stop_patience is null"),
        (["train.early_stop_patience=5"], "at step 300 at the earliest, and the last is 300"),
        (
            ["checkpoint.keep_every=40"],
            "keep_every=40 keeps no more than step 200 for good: saved is every 50 steps",
        ),
        (["checkpoint.keep_every=75"], "keep_every=75 keeps no more than steps 150, 300 for good"),
        (["checkpoint.keep_every=20", "train.iters=900"], "steps 100, 200, 300, ... for good"),
        (
            ["checkpoint.keep_every=7", "checkpoint.save_interval=null", "train.iters=350"],
            "step 350 for good",
        ),
        (["megatron.reset_position_ids=true"], "only learned_absolute reads these, not rope"),
        (["alerts.command=ls", "alerts.events=[]"], "alerts.command does nothing: alerts.events names none"),
    ],
)
def test_what_does_less_than_it_seems_to_is_noted(words, said):
    (note,) = idle_notes(small_job(*STEPS, *words))
    assert said in note


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train.early_stop_patience=4", "train.early_stop_min_delta=0.1"],
        ["checkpoint.keep_every=100"],
        ["checkpoint.keep_every=1"],
        ["alerts.events=[]"],
        ["alerts.command=ls"],
        ["megatron.reset_position_ids=true", "model.position_embedding_type=learned_absolute"],
    ],
)
def test_nothing_is_noted_of_what_does_as_it_says(words):
    assert idle_notes(small_job(*STEPS, *words)) == []


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("alerts.command=true", "\"alerts.command='true'\""),
        ("checkpoint.async_save=ture", "true"),
        ("checkpoint.async_save=maybe", "checkpoint.async_save=false, or checkpoint.async_save=null"),
        ("logging.tensorboard=maybe", "logging.tensorboard=true or logging.tensorboard=false"),
    ],
)
def test_a_value_of_the_wrong_kind_says_how_it_is_written(word, hint):
    with pytest.raises(UserError) as error:
        small_job(word)
    assert hint in str(error.value.hint or error.value)
