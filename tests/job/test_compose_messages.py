"""What a person reads after a slip of the keyboard: one message with a suggestion, not Hydra's words."""

from __future__ import annotations

import re
import shlex

import pytest

from megaplug.errors import UserError
from megaplug.job.checks import check
from megaplug.job.compose import compose_job, sweep_points


@pytest.mark.parametrize(
    ("word", "key", "meant"),
    [
        ("train.itres=3", "train.itres", "train.iters"),
        ("iters=3", "iters", "train.iters"),
        ("model.num_layer=3", "model.num_layer", "model.num_layers"),
        ("model=llama3_8", "model", "llama3_8b"),
        ("topolgy=tp2", "topolgy", "topology"),
        ("topology=tp2_pp", "topology", "tp2_pp2"),
        ("resum=false", "resum", "resume"),
        ("num_workers=2", "num_workers", "megatron.num_workers"),
        ("cluster.price=3", "cluster.price", "cluster.price_per_gpu_hour"),
        ("cluster.memory=3", "cluster.memory", "cluster.memory_gib"),
        ("model.foo=3", "model.foo", "--help model lists"),
        ("model=gpt4", "model", "--help model lists all"),
        ("topology=tp4_pp3", "topology", "topology.tp=4 topology.pp=3"),
        (
            "attention.segment_lengths=[64,256]",
            "attention.segment_lengths",
            "attention.params.segment_lengths",
        ),
        ("attention.blok_size=64", "attention.blok_size", "attention.params.block_size"),
        ("attention.patern=[ring]", "attention.patern", "attention.pattern?"),
        ("offset=query_head", "offset", "attention.params.offset"),
        ("topology=tp16ep3", "topology", "topology.tp=16 topology.ep=3"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_right_one(word: str, key: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_job([word])
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith(f"{key}: ")
    assert meant in caught.value.hint


def test_every_misspelling_is_listed() -> None:
    with pytest.raises(UserError) as caught:
        compose_job(["train.itres=3", "model=llama9", "topolgy=tp2"])
    text = str(caught.value)
    assert all(word in text for word in ("train.itres", "llama9", "topolgy"))


def test_every_wrong_type_is_listed() -> None:
    with pytest.raises(UserError) as caught:
        compose_job(["topology.tp=two", "train.iters=many", "model.swiglu=3", "topology.pp=true"])
    text = str(caught.value)
    assert all(key in text for key in ("topology.tp", "train.iters", "model.swiglu", "topology.pp"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.iters=ten", "train.iters: must be a whole number, but is 'ten'"),
        ("train.iters=1.5", "train.iters: must be a whole number, but is 1.5"),
        ("model.hidden_size=null", "model.hidden_size: must be a whole number, but is null"),
        ("topology.tp=true", "topology.tp: must be a whole number, but is true"),
        ("lr.lr=fast", "lr.lr: must be a number, but is 'fast'"),
        ("precision.bf16=3", "precision.bf16: must be true or false, but is 3"),
    ],
)
def test_a_value_of_another_type_is_told_in_plain_words(word: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        compose_job([word])


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert compose_job(["train.iters=null", "train.tokens=1e6"]).train.tokens == 1_000_000
    with pytest.raises(UserError, match=r"train\.tokens"):
        compose_job(["train.tokens=1.5"])


def test_megatron_and_plugin_parameters_need_no_plus() -> None:
    job = compose_job(
        ["megatron.check_weight_hash_across_dp_replicas_interval=3", "attention.params.cuda_kernel=flash"]
    )
    assert job.megatron == {"check_weight_hash_across_dp_replicas_interval": 3}
    assert job.attention.params["cuda_kernel"] == "flash"


def test_a_group_is_not_a_value() -> None:
    with pytest.raises(UserError, match="there is no option '3'"):
        compose_job(["train=3"])


@pytest.mark.parametrize("word", ["train.iters", "train.iters=[1", "a b=1"])
def test_a_word_that_is_no_override_is_named(word: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_job([word])
    assert "\n  hint" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("T", "one word, such as tokens=1T"),
        ("train.iters", "it lacks its value: train.iters=..."),
        ("precision", "it lacks its value: precision=..."),
        ("llama3_8b", "did you mean model=llama3_8b?"),
        ("lama3_8b", "did you mean model=llama3_8b?"),
        ("h100", "did you mean cluster=h100?"),
        ("foo", "write key=value"),
    ],
)
def test_a_word_without_a_value_is_answered_with_what_it_may_have_meant(word: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"^'{word}' is no key=value\n") as caught:
        compose_job([word])
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("train.seed=1,2", "--multirun"),
        ("cluster.price_per_gpu_hour=2,5", "not a comma: cluster.price_per_gpu_hour=2.5"),
        ("train.iters=1,000", "train.iters=1_000"),
        ("lr.lr=1,5e-4", "--multirun"),
        ("attention.params.segment_lengths=64,256", "'attention.params.segment_lengths=[64,256]'"),
        ("attention.pattern=ring,dilated", "'attention.pattern=[ring,dilated]'"),
    ],
)
def test_several_values_ask_for_multirun_or_were_one(word: str, hint: str) -> None:
    with pytest.raises(UserError, match="several values") as caught:
        compose_job([word])
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1T", 10**12), ("1t", 10**12), ("300B", 3 * 10**11), ("1.5T", 15 * 10**11), ("15_000", 15_000),
     ("1e12", 10**12), ("100k", 10**5), ("2.3G", 23 * 10**8)],
)  # fmt: skip
def test_tokens_are_written_as_people_say_them(text: str, tokens: int) -> None:
    assert compose_job([f"train.tokens={text}"]).train.tokens == tokens


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("train.tokens=1X", "train.tokens=300B"),
        ("train.tokens=0.1", ""),
        ("model.seq_length=8k", "model.seq_length=8000, if that is meant"),
        ("cluster.peak_tflops=800", "such as cluster.peak_tflops.bf16=800"),
    ],
)
def test_a_number_in_another_form_is_answered_with_one_that_is_taken(word: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_job([word])
    assert word.partition("=")[0] in caught.value.message and hint in caught.value.hint


def test_several_sources_are_said_to_be_a_list() -> None:
    with pytest.raises(UserError, match=r"data.path=\[a.txt,b.txt\]"):
        compose_job(["data=text", "data.path=a.txt,b.txt"])


@pytest.mark.parametrize("word", ["data.split=90,5,5", "data.split='90,5,5'"])
def test_a_split_is_typed_as_the_configs_write_it(word: str) -> None:
    assert compose_job([word]).data.split == "90,5,5"
    assert [word.replace("'", "") for word in sweep_points([word])[0]] == ["data.split=90,5,5"]


@pytest.mark.parametrize("pattern", ["([0]+[1]*3)", "[0,1,1,1]"])
def test_a_pattern_of_layers_needs_no_quotes_of_hydra_s(pattern: str) -> None:
    assert compose_job([f"moe.moe_layer_freq={pattern}"]).moe.moe_layer_freq == pattern


def test_a_list_is_asked_for_as_it_is_typed() -> None:
    with pytest.raises(UserError, match=r"write 'train.recompute_modules=\[mlp\]'"):
        compose_job(["train.recompute_modules=mlp"])


def test_hydra_s_own_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"hydra\.run\.dir"):
        compose_job(["hydra.run.dir=/tmp"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.tokens=1000"], (None, 1000, None)),
        (["train.epochs=2"], (None, None, 2.0)),
        (["train=epoch", "train.iters=7"], (7, None, None)),
        (["train.iters=7", "train.tokens=1000"], (7, 1000, None)),
    ],
)
def test_a_length_that_was_typed_takes_the_place_of_one_that_was_not(words, expected):
    train = compose_job(words).train
    assert (train.iters, train.tokens, train.epochs) == expected


@pytest.mark.parametrize("value", ["cat >> events.log", "mail -s 'it failed' me", 'say "a, b"', "a=b|c"])
def test_a_value_that_needs_quotes_is_shown_with_them_as_a_shell_takes_it(value: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_job([f"alerts.command={value}"])
    _, _, typed = caught.value.hint.partition("the shell's: ")
    assert compose_job(shlex.split(typed)).alerts.command == value


def test_several_keys_of_an_open_group_may_be_given_at_once():
    job = compose_job(
        [
            "attention=ring_dilated",
            "attention.params={segment_lengths:[16,64],dilation_rates:[1,2]}",
            "attention.params.offset=query_head",
            "megatron={decoupled_lr:1e-3}",
        ]
    )
    assert job.attention.params == {
        "segment_lengths": [16, 64],
        "dilation_rates": [1, 2],
        "offset": "query_head",
    }
    assert job.megatron == {"decoupled_lr": 1e-3}
    problems = check(compose_job(["attention=ring_dilated", "attention.params={segment_lenghts:[16]}"]))
    assert [p.key for p in problems] == ["attention.params.segment_lenghts"]
    assert "did you mean 'segment_lengths'" in problems[0].hint


def test_tables_of_values_are_still_given_at_once():
    job = compose_job(["cluster.peak_tflops={bf16:100}", "data.path={a.txt:1,b.txt:2}"])
    assert job.cluster.peak_tflops == {"bf16": 100}
    assert job.data.path == {"a.txt": 1, "b.txt": 2}
