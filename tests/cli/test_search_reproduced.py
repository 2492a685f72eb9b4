"""What a search prints for a row, given to ``action=plan``, is a job that works, with the same figures."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from megaplug.commands.plan import main
from megaplug.plan.search.answer_json import SECTIONS
from megaplug.plan.search.text import spread

MODELS = (
    "llama3_8b", "llama3_70b", "gpt3_22b", "mixtral_8x7b", "deepseek_v2_lite", "qwen3_30b_a3b",
    "gpt_oss_20b", "moe_30b", "tiny_moe", "qwen3_4b",
)  # fmt: skip
CLUSTERS = ("a100_80gb", "h100", "h200", "b200", "gb300", "card_64gb", "rtx4090")
EXTRA = (
    "topology.pp=2", "train=pretrain", "topology.zero=1", "train.micro_batch_size=1", "topology.vpp=null",
    "cluster.price_per_gpu_hour=2.5", "train.recompute_granularity=full", "attention=te",
)  # fmt: skip


def asked(seed: int) -> list[str]:
    """A search of some model on some machines."""
    chance = random.Random(seed)
    words = [
        f"model={chance.choice(MODELS)}",
        f"cluster={chance.choice(CLUSTERS)}",
        f"topology.world_size={chance.choice((8, 24, 32, 64, 96, 256))}",
        f"train.global_batch_size={chance.choice((48, 64, 96, 256, 1024))}",
        "precision=bf16",
        "model.seq_length=4096",
        f"tokens={chance.choice(('1T', '300B'))}",
    ]
    return words + chance.sample(EXTRA, chance.choice((0, 0, 1, 2)))


def answered(capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    code = main([*words, "output=json"])
    shown = capsys.readouterr()
    assert shown.err == ""
    return code, json.loads(shown.out)


def is_reproduced(capsys: Any, seed: int) -> bool:
    """Whether anything fits; where it does, each row's own words make that row."""
    typed = asked(seed)
    code, found = answered(capsys, "action=search", "top=3", *typed)
    if code == 2:
        assert found["possible"] is False and found["problems"][0]["message"]
        return False
    rows = found["rows"] + spread(found["pareto_front"], 3)
    for row in rows:
        code, plan = answered(capsys, *typed, *row["overrides"])
        assert (code, plan["possible"], plan["problems"]) == (0, True, []), (typed, row["overrides"])
        memory = plan["memory"]
        fullest = memory["stages"][memory["fullest_stage"]]
        assert row["memory"] == memory | {"stages": [fullest]}
        assert {name: row[name] for name in SECTIONS} == {name: plan[name] for name in SECTIONS}
    return len(rows) > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_words_of_a_row_make_the_row(capsys, seed):
    assert is_reproduced(capsys, seed)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_so_they_do_in_thirty_searches(capsys):
    fits = [is_reproduced(capsys, seed) for seed in range(3, 33)]
    assert sum(fits) >= 25
