"""The shipped configurations: each composes, passes the checks, and explains every key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megaplug.job import keys
from megaplug.job.checks import check
from megaplug.job.compose import ConfigSource, compose_config, compose_job, conf_dir, group_options

CONF = conf_dir()
FILES = sorted(CONF.glob("**/*.yaml"))
OPTIONS = [(group, option) for group, options in group_options(ConfigSource()).items() for option in options]

# What an option needs beside it to make sense.
COMPANIONS = {
    ("tokenizer", "huggingface"): ["tokenizer.path=tokenizer.json"],
    ("tokenizer", "sentencepiece"): ["tokenizer.path=tokenizer.model"],
    ("tokenizer", "tiktoken"): ["tokenizer.path=some.tiktoken"],
    ("data", "text"): ["data.path=text.txt"],
    ("cuda_graph", "te"): ["backend=te"],
    ("launch", "nodes"): ["launch.nnodes=1", "launch.node_rank=0", "launch.master_addr=127.0.0.1"],
    ("launch", "slurm"): ["cluster=h100"],
    ("moe", "mixtral"): ["model=llama1_7b"],
    ("moe", "deepseek_v2_lite"): ["model=deepseek_v2_lite"],
    ("moe", "deepseek_v3"): ["model=deepseek_v3"],
    ("moe", "kimi_k2"): ["model=kimi_k2"],
}
# Topologies of large models, with a model that they fit.
MODELS_OF_TOPOLOGIES = (
    "tiny",
    "tiny_moe",
    "tiny_llama3_150m",
    "llama1_7b",
    "llama3_8b",
    "llama3_70b",
)
# Topologies made for one model.
MODEL_OF_TOPOLOGY = {
    "tp8_pp16_llama3_405b": "llama3_405b",
    "tp4_pp8": "arbor_200b",
    "tp8_pp15": "arbor_400b",
    "tp4_pp30_ep128": "arbor_1t_moe",
    "tp4_pp4_ep4": "moe_30b",
    "tp2_pp4_ep8": "mixtral_8x22b",
    "pp8_ep64_deepseek_v3": "deepseek_v3",
    "tp2_pp8_ep32_qwen3_235b_a22b": "qwen3_235b_a22b",
}


def test_all_groups_are_there() -> None:
    model_and_data = "model topology attention moe data tokenizer train optimizer lr precision cluster"
    how = "kernels overlap cuda_graph checkpoint logging profile experiment"
    where = "launch slurm sweep watch alerts resilience"
    assert sorted(group_options(ConfigSource())) == sorted(f"{model_and_data} {how} {where}".split())


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_checks(group: str, option: str) -> None:
    words = [f"{group}={option}", *COMPANIONS.get((group, option), [])]
    if (group, option) == ("topology", "auto"):
        assert [problem.key for problem in check(compose_job(words))] == ["topology.auto"]
        return
    if group == "topology":
        tried = {}
        own = MODEL_OF_TOPOLOGY.get(option)
        for model in (own,) if own else MODELS_OF_TOPOLOGIES:
            for more in ([], ["moe=small"], ["attention=te", "device=cuda"]):
                job = compose_job(
                    [
                        *words,
                        f"model={model}",
                        "train.global_batch_size=1024",
                        "train.micro_batch_size=1",
                        *more,
                    ]
                )
                # Without Transformer Engine its attention is refused here; the grid itself is what is asked.
                tried[model] = [p for p in check(job) if p.key != "attention.name"]
                if not tried[model]:
                    return
        pytest.fail(f"fits no model: {tried}")
    job = compose_job(words)
    problems = [problem for problem in check(job) if "transformer_engine" not in problem.message]
    assert problems == []


def test_the_default_has_every_key_of_the_schema() -> None:
    config = compose_config([])
    for name, section in keys.sections().items():
        assert section is not None
        assert list(config[name]) == list(keys.section_keys(name)), name
    assert sorted(config) == sorted(keys.top_level_keys())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_key_has_a_comment_above_it(file: Path) -> None:
    lines = file.read_text().splitlines()
    in_defaults = False
    for number, line in enumerate(lines):
        if line.startswith("defaults:"):
            in_defaults = True
        elif line and not line.startswith((" ", "#")):
            in_defaults = False
        stripped = line.strip()
        if in_defaults or not stripped or stripped.startswith(("#", "-", "{")):
            continue
        key, _, value = stripped.partition(":")
        if not value.strip() and key in keys.sections():
            continue  # a group inside an experiment
        assert lines[number - 1].strip().startswith("# "), f"line {number + 1}: {key} has no comment above it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_key_is_in_the_schema(file: Path) -> None:
    content = yaml.safe_load(file.read_text()) or {}
    content.pop("defaults", None)
    group = file.parent.name
    if group == "experiment" or file.parent == CONF:
        known = set(keys.top_level_keys())
        for section in keys.sections():
            assert set(content.get(section) or {}) <= set(keys.section_keys(section))
    else:
        known = set(keys.section_keys(group))
    assert set(content) <= known
