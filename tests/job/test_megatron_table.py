"""The table of Megatron's arguments says what the installed parser says."""

from __future__ import annotations

import pytest

from megaplug.job.megatron_table import TABLE_FILE, load_table


def test_the_shipped_table_is_that_of_the_installed_megatron() -> None:
    from megaplug.runtime.arguments_table import render_table

    message = "run python -m megaplug.runtime.arguments_table"
    assert TABLE_FILE.read_text() == render_table(), message


@pytest.mark.parametrize(
    ("dest", "value", "words"),
    [
        ("num_layers", 4, ["--num-layers", "4"]),
        ("num_layers", None, []),
        ("swiglu", True, ["--swiglu"]),
        ("swiglu", False, []),
        ("add_bias_linear", False, ["--disable-bias-linear"]),
        ("add_bias_linear", True, []),
        ("apply_rope_fusion", False, ["--no-rope-fusion"]),
        ("yarn_correction_range_round_to_int", False, ["--no-yarn-correction-range-round-to-int"]),
        ("lr", 1e-5, ["--lr", "1e-05"]),
        ("train_data_path", ["a", "b"], ["--train-data-path", "a", "b"]),
        ("recompute_modules", ["mlp"], ["--recompute-modules", "mlp"]),
        ("lr_warmup_init", -0.5, ["--lr-warmup-init", "-0.5"]),
        ("wandb_exp_name", "-x", ["--wandb-exp-name=-x"]),
    ],
)
def test_a_value_becomes_words(dest: str, value: object, words: list[str]) -> None:
    assert load_table()[dest].render(value) == words


@pytest.mark.parametrize(
    ("dest", "value"),
    [
        ("num_layers", "four"),
        ("num_layers", 4.5),
        ("num_layers", True),
        ("num_layers", [4]),
        ("swiglu", "yes"),
        ("lr", "high"),
        ("normalization", "BatchNorm"),
        ("recompute_modules", []),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(dest: str, value: object) -> None:
    argument = load_table()[dest]
    assert argument.fault(value)
    with pytest.raises(ValueError, match=dest):
        argument.render(value)
