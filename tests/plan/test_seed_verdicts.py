"""Plans that were published for large models, and what is true of them: the rule broken or the figure."""

from __future__ import annotations

import json

import pytest

from megaplug.commands import plan

GIB = 2**30


def ask(capsys, *words):
    """The answer to ``launch/plan.py`` and its exit code."""
    code = plan.main([*words, "precision=bf16", "output=json"])
    said = capsys.readouterr()
    assert said.err == ""
    return code, json.loads(said.out)


def problem(said, key):
    found = [one for one in said["problems"] if one["key"] == key]
    assert found, f"{key}: {said['problems']}"
    return found[0]["message"]


def nearest(capsys, said, *words):
    """The nearest job that is named; it is typed as it stands, and works."""
    best = said["nearest_that_work"][0]
    code, again = ask(capsys, *words, *best["overrides"])
    assert (code, again["possible"], again["problems"]) == (0, True, [])
    assert again["memory"]["spare"] >= 0
    return again


def test_tp4_ep16_pp4_dp2_on_16_gpus(capsys):
    """A 30B mixture of experts on 16 cards of 64 GB: 4 x 4 x 2 is 32, and 16 experts x 4 stages needs 64."""
    words = [
        "model=moe_30b", "model.vocab_size=32000", "cluster=card_64gb", "train.micro_batch_size=1",
        "topology.tp=4", "topology.ep=16", "topology.pp=4", "topology.dp=2", "topology.world_size=16",
    ]  # fmt: skip
    code, said = ask(capsys, *words)
    assert code == 2 and said["possible"] is False
    assert "tp 4 x pp 4 x cp 1 x dp 2 = 32, but the world size is 16" in problem(said, "topology.world_size")
    assert "etp 4 x ep 16 x pp 4 = 256 does not divide the world size 16" in problem(said, "topology.ep")
    # An expert need not be cut by TP; even so 1 x 16 x 4 ranks do not go into 16.
    _, whole = ask(capsys, *words, "topology.etp=1")
    assert "= 64 does not divide the world size 16" in problem(whole, "topology.ep")
    works = nearest(capsys, said, *words)
    assert works["topology"]["world_size"] == 16 and works["parameters"]["total"] == 30_131_389_440


@pytest.mark.parametrize("cluster", ["a100_80gb", "h100", "h200", "b200", "gb300"])
def test_200b_on_8_gpus(capsys, cluster):
    """207 billion parameters are 3.4 TiB of state: 434 GiB for each of 8, which no GPU has."""
    words = ["model=arbor_200b", "topology.world_size=8", "train.micro_batch_size=1", f"cluster={cluster}"]
    words += ["model.seq_length=8192"]
    code, said = ask(capsys, *words)
    assert code == 2
    text = problem(said, "topology.world_size")
    assert "207.3 billion parameters are 3,476.0 GiB (18 bytes each), 434.5 for each of 8 ranks" in text
    works = nearest(capsys, said, *words)
    assert works["topology"]["world_size"] > 8
    assert works["parameters"]["total"] == 207_349_886_976


def test_200b_at_tp8_has_12_kv_heads(capsys):
    words = ["model=arbor_200b", "topology.tp=8", "topology.pp=8", "topology.dp=4", "cluster=a100_80gb"]
    code, said = ask(capsys, *words, "train.micro_batch_size=1")
    assert code == 2
    assert "num_query_groups 12 must be a multiple or a divisor of tp 8" in problem(said, "topology.tp")


def test_400b_on_32_gpus(capsys):
    """It is 460 billion parameters, and 241 GiB of state a GPU before any activation."""
    words = ["model=arbor_400b", "topology.world_size=32", "train.micro_batch_size=1", "cluster=a100_80gb"]
    words += ["model.seq_length=8192"]
    code, said = ask(capsys, *words)
    assert code == 2
    text = problem(said, "topology.world_size")
    assert "460.1 billion parameters" in text and "241.0 for each of 32 ranks" in text
    assert nearest(capsys, said, *words)["topology"]["world_size"] >= 99
    # Nor is its own layout possible: 120 layers in 16 stages.
    _, said = ask(capsys, "model=arbor_400b", "topology.tp=8", "topology.pp=16", "cluster=a100_80gb")
    assert "120 layers cannot be dealt out evenly to 16 stages" in problem(said, "topology.pp")


def test_the_road_to_1t(capsys):
    """TP16 with 20 KV heads, 32 stages for 150 layers, and 96.8 trillion parameters for one."""
    words = ["model=arbor_1t_moe", "topology.tp=16", "topology.pp=32", "topology.dp=8", "cluster=h100"]
    words += ["train.micro_batch_size=1", "model.seq_length=8192"]
    code, said = ask(capsys, *words)
    assert code == 2
    assert "num_query_groups 20 must be a multiple or a divisor of tp 16" in problem(said, "topology.tp")
    assert "150 layers cannot be dealt out evenly to 32 stages" in problem(said, "topology.pp")
    assert "96.78 trillion parameters" in problem(said, "topology.world_size")
    works = nearest(capsys, said, *words)
    assert works["topology"]["world_size"] >= 20_908
    assert works["parameters"]["total"] == pytest.approx(96.78e12, rel=1e-3)
    assert works["parameters"]["active"] < 2e12


@pytest.mark.parametrize("devices", [3814, 4096])
def test_a_sequence_of_a_billion_tokens_cannot_be_cut_so(capsys, devices):
    """Each rank takes two chunks, and 10^9 is 2^9 x 5^9."""
    code, said = ask(capsys, *_billion(10**9, devices))
    assert code == 2
    text = problem(said, "topology.cp")
    assert f"seq_length 1000000000 is not a multiple of 2 x cp = {2 * devices}" in text
    works = nearest(capsys, said, *_billion(10**9, devices))
    assert 10**9 % (2 * works["topology"]["cp"]) == 0 and works["batch"]["seq_length"] == 10**9


def test_2_to_the_30_tokens_can_be_cut_and_need_far_more_than_2_gb_a_device(capsys):
    code, said = ask(capsys, *_billion(2**30, 4096))
    assert code == 2 and [one["key"] for one in said["problems"]] == ["cluster.memory_gib"]
    (stage,) = said["memory"]["stages"]
    # One bf16 vector of 4,096 channels a token and layer is kept, whatever is computed again.
    assert stage["activations"] >= 2 * 4096 * 32 * 2**30 / 4096
    assert stage["total"] > 100 * GIB
    works = nearest(capsys, said, *_billion(2**30, 4096))
    assert works["topology"]["world_size"] > 4096 and works["batch"]["seq_length"] == 2**30


def _billion(tokens, devices):
    return [
        "model=llama3_8b", f"model.seq_length={tokens}", f"topology.cp={devices}", "attention=te",
        "cluster=h100", "train.micro_batch_size=1", "train.recompute_granularity=full",
        "train.recompute_method=uniform", "train.recompute_num_layers=1",
    ]  # fmt: skip


def test_405b_at_tp8_pp8_on_64_gpus(capsys):
    """126 layers in 8 stages leave 6; dealt out unevenly, 64 ranks still need 106 GiB each for state."""
    words = ["model=llama3_405b", "topology.tp=8", "topology.pp=8", "topology.world_size=64", "cluster=h100"]
    words += ["train.micro_batch_size=1"]
    code, said = ask(capsys, *words)
    assert code == 2
    assert "126 layers cannot be dealt out evenly to 8 stages" in problem(said, "topology.pp")
    text = problem(said, "topology.world_size")
    assert "405.9 billion parameters" in text and "106.3 for each of 64 ranks" in text
    works = nearest(capsys, said, *words)
    assert works["topology"]["world_size"] > 64 and works["parameters"]["total"] == 405_853_388_800


def test_70b_at_25_gb_on_8_gpus(capsys):
    """State alone is 148 GiB a GPU, not 25 GB."""
    words = ["model=llama3_70b", "topology.tp=8", "cluster=a100_80gb", "train.micro_batch_size=1"]
    code, said = ask(capsys, *words)
    assert code == 2
    (stage,) = said["memory"]["stages"]
    state = stage["weights"] + stage["gradients"] + stage["optimizer"]
    assert state == pytest.approx(18 * 70.55e9 / 8, rel=0.01)
    assert "147.8 for each of 8 ranks" in problem(said, "topology.world_size")
    assert nearest(capsys, said, *words)["topology"]["world_size"] > 8


def test_8b_on_one_rtx_4090(capsys):
    words = ["model=llama3_8b", "cluster=rtx4090", "train.micro_batch_size=1"]
    code, said = ask(capsys, *words)
    assert code == 2
    assert "8.030 billion parameters are 134.6 GiB" in problem(said, "topology.world_size")
    works = nearest(capsys, said, *words)
    assert works["topology"]["world_size"] == 8


def test_a_bubble_of_5_percent_at_pp4_with_8_microbatches(capsys):
    """It is 3/11 of the step with 8 microbatches; 5 % takes 57."""
    shares = {}
    for microbatches in (8, 56, 57):
        words = ["model=moe_30b", "topology=tp4_pp4_ep4", "model.vocab_size=32000", "cluster=card_64gb"]
        words += ["train.micro_batch_size=1", f"train.global_batch_size={microbatches}"]
        code, said = ask(capsys, *words)
        assert (code, said["batch"]["num_microbatches"]) == (0, microbatches)
        shares[microbatches] = said["pipeline"]["bubble_of_equal_stages"]
    assert shares[8] == pytest.approx(3 / 11)
    assert shares[57] <= 0.05 < shares[56]


def test_the_screen_says_how_many_microbatches_a_small_bubble_takes(capsys):
    words = ["model=moe_30b", "topology=tp4_pp4_ep4", "model.vocab_size=32000", "cluster=card_64gb"]
    assert plan.main([*words, "precision=bf16", "train.micro_batch_size=1", "train.global_batch_size=8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "27.3 %" in text and "5 % takes 57 microbatches: train.global_batch_size=57" in text
