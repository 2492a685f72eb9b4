"""``launch/plan.py action=search`` and ``topology=auto``: what is shown, what is frozen, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from live_command import train

from megaplug.commands import plan as plan_command
from megaplug.commands import train as train_command
from megaplug.commands.searched import choose, search
from megaplug.job import packages
from megaplug.job.checks import check, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.elsewhere import judge
from megaplug.plan.search.chosen import as_job, words
from megaplug.plan.workload import workload_of

LLAMA = ("model=llama3_8b", "cluster=h100", "precision=bf16", "train.global_batch_size=64")
Asked = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys) -> Asked:
    """Answers a search; the exit code, what was shown, and the error."""

    def asked(*typed: str) -> tuple[int, str, str]:
        code = plan_command.main(["action=search", *typed])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return asked


def test_a_table_of_the_best_with_what_reproduces_each(ask):
    code, shown, _ = ask(*LLAMA, "topology.world_size=32", "top=4")
    lines = shown.splitlines()
    assert code == 0
    assert lines[0].startswith("llama3_8b on 32 GPUs of h100 (4 nodes of 8), bf16, 64 sequences of 8,192 tok")
    names = next(line for line in lines if "step s" in line)
    assert all(name in names for name in ("tokens/s", "MFU", "GiB", "bubble", "layout", "computed again"))
    start = next(number for number, line in enumerate(lines) if line.startswith("To start one on 4 nodes"))
    assert lines[start].endswith("topology.world_size=32 device=cuda and")
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == ["1", "2", "3", "4"]


def test_what_starts_a_row_is_the_command_beside_this_one(ask, monkeypatch):
    typed = [*LLAMA, "topology.world_size=8", "top=1"]
    for called, starts in [
        ("launch/plan.py", "To start one: python launch/train.py model="),
        ("../launch/plan.py", "To start one: python ../launch/train.py model="),
        ("/usr/bin/megaplug-plan", "To start one: megaplug-train model="),
    ]:
        monkeypatch.setattr(sys, "argv", [called])
        _, shown, _ = ask(*typed)
        assert any(
            line.startswith(starts) and line.endswith(" device=cuda and") for line in shown.splitlines()
        )
    _, shown, _ = ask("device=cuda", *typed)
    assert shown.count("device=cuda") == 1
    _, shown, _ = ask("model=tiny", "cluster=cpu2", "topology.world_size=2", "top=1")
    assert "device=" not in shown and "nodes" not in shown


def test_cores_and_gpus_are_not_confused(ask):
    code, shown, error = ask(*LLAMA, "topology.world_size=8", "device=cpu")
    assert (code, shown) == (2, "")
    assert "device=cpu wants cores, and cluster=h100 has GPUs" in error


def test_days_and_money_are_columns_where_tokens_and_a_price_are_known(ask):
    typed = [*LLAMA, "topology.world_size=64", "train=pretrain", "top=2"]
    _, shown, _ = ask(*typed)
    names = next(line for line in shown.splitlines() if "step s" in line)
    assert "training" in names and "dollars" not in names
    _, shown, _ = ask(*typed, "tokens=15T", "cluster.price_per_gpu_hour=2.5")
    names = next(line for line in shown.splitlines() if "step s" in line)
    assert "training" in names and "US dollars" in names
    assert "tokens=15T" not in shown and "cluster.price_per_gpu_hour=2.5" in shown
    _, shown, _ = ask(*typed, "tokens=15T", "cluster.price_per_gpu_hour=2.5", "output=json")
    training = json.loads(shown)["rows"][0]["training"]
    assert training["tokens"] == 15_000_000_000_000
    assert training["us_dollars"] == pytest.approx(2.5 * training["gpu_hours"])


def test_what_was_considered_is_said_in_words(ask):
    _, shown, _ = ask(*LLAMA, "topology.world_size=64", "topology.tp=4", "top=1")
    assert "84 ways to cut 64 ranks into TP x PP x CP x DP\n" in shown
    assert "cp > 1: the core_attention 'flash' cannot split a sequence over 2 ranks\n" in shown
    assert " tp is to be 4\n" in shown
    assert "microbatches of 1, 2, 4, 8, and 4 choices of what is computed again\n" in shown


@pytest.mark.slow
def test_sequences_that_are_why_nothing_fits_are_named_with_what_sets_them(ask):
    typed = ["model=arbor_400b", "cluster=h100", "precision=bf16", "topology.world_size=512"]
    _, _, error = ask(*typed)
    assert "come with the sequences of 2,097,152 tokens, which model=arbor_400b sets" in error
    length = int(error.partition("model.seq_length=")[2].partition(" fits")[0])
    assert ask(*typed, f"model.seq_length={length}", "top=1")[0] == 0
    code, _, error = ask(*typed, f"model.seq_length={2 * length}")
    assert code == 2 and f"sequences of {2 * length:,} tokens\n" in error


@pytest.mark.parametrize("model", ["model=llama3_8b", "model=mixtral_8x7b"])
def test_every_row_can_be_typed_and_is_that_configuration(model):
    typed = [*LLAMA, model, "model.seq_length=4096", "topology.world_size=32"]
    found = search(compose_job(typed), typed, top=3)
    for row in found.answer.rows + found.answer.front[-1:]:
        job = compose_job(typed)
        again = compose_job([*typed, *words(row.workload, job)])
        assert check(again, device="cuda") == []
        shape = row.workload.shape
        assert workload_of(again, resolve_topology(again), shape) == row.workload
        assert as_job(row.workload, job) == again


def test_json_has_the_same_rows(ask):
    code, shown, _ = ask(*LLAMA, "topology.world_size=16", "top=3", "output=json")
    answer = json.loads(shown)
    assert code == 0
    assert len(answer["rows"]) == 3
    first = answer["rows"][0]
    assert first["step_time"]["total"] <= answer["rows"][1]["step_time"]["total"]
    assert first["within_the_error_of_the_first"] or answer["mean_relative_error_of_time"] is None
    assert 0 < first["speed"]["mfu"]["causal"] < 1
    assert (answer["model"], answer["precision"], answer["world_size"]) == ("llama3_8b", "bf16", 16)
    considered = answer["considered"]
    assert considered["configurations_that_fit"] <= considered["configurations_legal"]
    assert considered["grids"] == considered["grids_legal"] + sum(considered["grids_forbidden"].values())


def test_context_parallelism_is_searched_for_machines_that_have_what_it_needs(ask, monkeypatch):
    """Transformer Engine is asked for by the attention and is not installed here."""
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(packages, "is_installed", lambda key: False)
    typed = [*LLAMA, "attention=te", "model.seq_length=131072", "topology.world_size=16"]
    found = search(compose_job(typed), typed, top=4)
    assert {problem.lacks for problem in found.lacking} == {"transformer_engine"}
    assert any(row.workload.topology.cp > 1 for row in found.answer.rows)
    for row in found.answer.rows[:2]:
        again = [*typed, *words(row.workload, compose_job(typed))]
        judged = judge(compose_job(again), "cuda")
        assert judged.problems == []
        shape = row.workload.shape
        assert workload_of(judged.job, resolve_topology(judged.job), shape) == row.workload
        assert plan_command.main([*again, "output=json"]) == 0
    code, shown, _ = ask(*typed, "top=1")
    assert code == 0 and shown.rstrip().endswith("which attention.name needs: install it where the job runs")


def test_what_the_attention_cannot_do_is_not_enumerated():
    """Flash attention has no context parallelism, which the fastest layouts on paper would use."""
    typed = [*LLAMA, "topology.world_size=32"]
    answer = search(compose_job(typed), typed, top=5).answer
    assert {row.workload.topology.cp for row in answer.rows + answer.front} == {1}
    assert answer.refused == {}


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["topology.tp=8"], {"tp": 8}),
        (["topology=tp4_pp2"], {"tp": 4, "pp": 2}),
        (["topology.pp=1", "topology.dp=4"], {"pp": 1, "dp": 4}),
        (["topology.pp=2", "topology.vpp=null"], {"pp": 2, "vpp": None}),
    ],
    ids=str,
)
def test_what_was_typed_stays(typed, kept):
    typed = [*LLAMA, "topology.world_size=16", *typed]
    for row in search(compose_job(typed), typed, top=5).answer.rows:
        assert {key: getattr(row.workload.topology, key) for key in kept} == kept


def test_a_typed_microbatch_and_recomputation_stay():
    typed = [*LLAMA, "topology.world_size=16", "train.micro_batch_size=2", "train.recompute_granularity=full"]
    for row in search(compose_job(typed), typed, top=5).answer.rows:
        assert row.workload.batch.micro_batch_size == 2
        assert row.workload.recompute.granularity == "full"


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["model=tiny", "cluster=cpu2"], ["topology.world_size is not given", "topology.world_size=64"]),
        ([*LLAMA, "topology.world_size=0"], ["topology.world_size: must be at least 1, but is 0"]),
        ([*LLAMA, "topology.world_size=-8"], ["must be at least 1"]),
        ([*LLAMA, "topology.world_size=67"], ["no topology of 67 ranks", "topology.world_size=6"]),
        ([*LLAMA, "topology.world_size=16,32"], ["names several values"]),
        ([*LLAMA, "topology.world_size=many"], ["topology.world_size"]),
        (
            [*LLAMA, "topology.world_size=16", "topology.tp=8", "topology.dp=8"],
            ["with topology.tp=8 topology.dp=8", "leave out some"],
        ),
        ([*LLAMA, "topology.world_size=16", "topology.tp=3"], ["with topology.tp=3", "leave out some"]),
        ([*LLAMA, "topology.world_size=16", "topology.tp=0"], ["topology.tp: must be at least 1, but is 0"]),
        (
            [*LLAMA, "topology.world_size=16", "topology.ep=2"],
            ["no topology of 16 ranks", "topology.ep=2", "leave out some"],
        ),
        ([*LLAMA, "topology.world_size=16", "train.micro_batch_size=3"], ["no topology of 16 ranks"]),
        ([*LLAMA, "topology.world_size=16", "topology.cp=2"], ["cannot split a sequence"]),
        ([*LLAMA, "topology.world_size=16", "train.recompute_modules=[moe]"], ["the model has none"]),
        ([*LLAMA, "topology.world_size=16", "top=0"], ["top=0 is not a whole number above 0"]),
        ([*LLAMA, "topology.world_size=16", "top=few"], ["top=few"]),
        ([*LLAMA, "topology.world_size=16", "topology.tq=2"], ["topology.tq", "--help topology lists"]),
        (
            ["model=llama3_405b", "cluster=h100", "precision=bf16", "topology.world_size=8",
             "train.global_batch_size=64"],
            ["legal configurations fits 8 GPUs of h100", "the first doubling that works"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_wrong_question_is_told_what_is_wrong(ask, typed, parts):
    code, shown, error = ask(*typed)
    assert code == 2
    assert shown == ""
    for part in parts:
        assert part in error


def frozen_of(folder: Path) -> tuple[str, dict]:
    runs = list(folder.iterdir())
    assert len(runs) == 1
    return runs[0].name, yaml.safe_load((runs[0] / "job.yaml").read_text())


def test_the_chosen_topology_is_shown_and_frozen_as_if_it_had_been_typed(tmp_path, capsys):
    common = ["launch=freeze", "topology.world_size=2", "cluster=cpu2", "device=cpu", "logging.progress=none"]
    assert train_command.main([*common, "topology=auto", f"runs_dir={tmp_path}/auto"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("topology=auto"))
    chosen = line.rpartition(": ")[2].split()
    assert "topology.world_size=2" in chosen
    assert train_command.main([*common, *chosen, f"runs_dir={tmp_path}/typed"]) == 0
    (name, auto), (other, typed) = frozen_of(tmp_path / "auto"), frozen_of(tmp_path / "typed")
    assert name == other
    assert auto["digest"] == typed["digest"]
    assert auto["job"]["topology"] == typed["job"]["topology"]
    assert auto["job"]["topology"]["auto"] is False
    assert auto["topology"] == typed["topology"]
    # the same command finds its run
    assert train_command.main([*common, "topology=auto", f"runs_dir={tmp_path}/auto"]) == 0
    assert frozen_of(tmp_path / "auto")[0] == name


def test_a_chosen_topology_keeps_what_was_typed(capsys):
    typed = ["topology=auto", "topology.world_size=2", "topology.tp=2", "cluster=cpu2", "device=cpu"]
    job = choose(compose_job(typed), typed)
    assert (job.topology.tp, job.topology.world_size, job.topology.auto) == (2, 2, False)
    assert "topology.tp=2" in capsys.readouterr().err


def test_without_a_number_of_ranks_nothing_is_chosen(capsys):
    assert train_command.main(["topology=auto", "device=cpu", "cluster=cpu2"]) == 2
    assert "topology.world_size is not given" in capsys.readouterr().err


def test_a_topology_that_was_never_chosen_is_refused():
    problems = check(compose_job(["topology=auto", "topology.world_size=2"]))
    assert [problem.key for problem in problems] == ["topology.auto"]


@pytest.mark.slow
def test_two_ranks_train_with_a_chosen_topology(tmp_path):
    done = train(
        "topology=auto", "topology.world_size=2", "device=cpu", "train.iters=2", "train.eval_iters=0",
        f"runs_dir={tmp_path}", "logging=quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "finished at step 2 of 2" in done.stdout
    assert "topology=auto: " in done.stderr
