"""``--help`` and ``--version``: short where nothing is named, to the point where something is, in no time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megaplug.commands import help as help_pages
from megaplug.job import keys
from megaplug.job.compose import ConfigSource, group_options

ROOT = Path(__file__).resolve().parents[2]


def ask(*words: str, script: str = "train", columns: int = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *words]
    env = {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def said(*words: str, script: str = "train", columns: int = 100) -> str:
    done = ask(*words, script=script, columns=columns)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_the_page_fits_the_terminal_and_two_screens(columns: int) -> None:
    lines = said("--help", columns=columns).splitlines()
    assert max(map(len, lines)) <= min(110, max(60, columns))
    assert columns < 80 or len(lines) <= 96


def test_the_page_has_every_group_with_its_options_and_the_keys_used_most() -> None:
    page = " ".join(said("--help").split())
    for group, options in group_options(ConfigSource()).items():
        assert f" {group} " in page and all(option in page for option in options)
    assert all(f" {key}=" in page for key in help_pages.MOST_USED)
    assert set(help_pages.MOST_USED) <= set(keys.all_keys())
    assert "tiny*" in page and "flash*" in page and "train.iters=220 Steps of the optimizer." in page
    assert all(flag in page for flag in ("--multirun", "--cfg job", "--completion", "megatron.<argument>"))


def test_help_takes_under_a_second_and_imports_neither_torch_nor_hydra() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said("--help", "train")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
    heavy = ("torch", "hydra", "omegaconf", "yaml")
    code = (
        "import sys; from megaplug.commands.train import main; main(['--help']); main(['--help', 'lr'])\n"
        f"print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_a_group_is_explained_with_its_options_and_keys() -> None:
    page = said("--help", "lr")
    assert "cosine*" in page and "Warm up, stay, decay in the last steps" in page
    assert "lr.min_lr=2.0e-4" in page and "number; Megatron's --min-lr" in page
    flat = " ".join(page.split())
    assert "constant | linear | cosine | inverse-square-root | WSD; Megatron's --lr-decay-style" in flat


@pytest.mark.parametrize("name", ["lr.min_lr", "min_lr", "lr.min_lr=3", "++lr.min_lr=3"])
def test_a_key_is_explained_however_it_is_written(name: str) -> None:
    assert said("--help", name).splitlines()[:2] == [
        "lr.min_lr=2.0e-4",
        "  Lowest learning rate after the warm-up.",
    ]


def test_an_option_and_an_argument_of_megatron_s_are_explained() -> None:
    assert "8,030,261,248 parameters" in said("--help", "model=llama3_8b")
    assert "Megatron's --overlap-grad-reduce" in said("--help", "megatron.overlap_grad_reduce")
    assert "is set by overlap.overlap_grad_reduce" in said("--help", "megatron.overlap_grad_reduce")
    assert "is set by" not in said("--help", "megatron.decoupled_lr")


def test_parameters_of_attentions_are_explained_with_whose_they_are() -> None:
    page = said("--help", "segment_lengths")
    assert page.startswith("attention.params.segment_lengths=[]\n")
    assert page.rstrip().endswith("list of whole numbers; of dilated, ring_dilated")
    whole = said("--help", "attention.params", "attention.params.kernel")
    for name in ("cuda_kernel=auto", "token_layout=zigzag", "block_size=null", "merge=torch"):
        assert f"\nattention.params.{name}\n" in whole
    assert whole.count("\nattention.params.kernel=auto\n") == 2 and "| flash_attn4 |" in whole
    assert "did you mean attention.params.block_size?" in ask("--help", "attention.block_size").stderr


@pytest.mark.parametrize(
    ("name", "meant"), [("lr.min_rl", "lr.min_lr"), ("topolgy", "topology"), ("itres", "iters")]
)
def test_a_misspelt_name_is_answered_with_the_one_that_was_meant(name: str, meant: str) -> None:
    done = ask("--help", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"did you mean {meant}?" in done.stderr


def test_json_has_every_key_and_group() -> None:
    content = json.loads(said("--help", "--json"))
    assert [info["key"] for info in content["keys"]][-1].startswith("cluster.")
    assert {info["key"] for info in content["keys"]} == set(keys.all_keys())
    assert content["groups"] == group_options(ConfigSource())
    assert {"type", "default", "choices", "meaning", "argument"} <= set(content["keys"][0])


def test_an_own_folder_s_options_are_explained(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# A model of mine.\ndefaults:\n  - tiny\n")
    assert "A model of mine." in said("--help", "model", "--config-dir", str(tmp_path))


@pytest.mark.parametrize("script", ["train", "plan"])
def test_the_version_names_what_runs(script: str) -> None:
    text = said("--version", script=script)
    assert text.startswith("megaplug 0.") and "megatron-core 0.19" in text and "torch 2." in text


def test_plan_explains_its_actions_and_the_keys_of_a_job() -> None:
    page = said("--help", script="plan")
    assert "what this machine has" in page and "tokens=15T" in page
    assert "Folder that holds the runs." in said("--help", "runs_dir", script="plan")


@pytest.mark.parametrize(
    ("name", "said_of_it"),
    [
        ("plan", ["VPP ", "ETP ", "tokens to experts ", "if all stages were equal"]),
        ("model", ["Its sequences are 2,097,152 tokens long"]),
    ],
)
def test_a_page_knows_the_words_of_a_plan(name: str, said_of_it: list[str]) -> None:
    page = said("--help", name, script="plan")
    assert max(map(len, page.splitlines())) <= 110
    flat = " ".join(page.split())
    assert all(words in flat for words in said_of_it)


def test_the_planners_page_tells_num_gpus_from_world_size_and_names_the_defaults() -> None:
    page = " ".join(said("--help", script="plan").split())
    assert "topology.world_size is what the job takes" in page and "cluster.num_gpus is what there is" in page
    assert "fp32" in page and "8 sequences" in page and "precision=bf16 train=pretrain" in page
