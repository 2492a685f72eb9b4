"""`launch/plan.py` as a person types it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megaplug.commands import plan
from megaplug.plan.doctor import finding

ROOT = Path(__file__).resolve().parents[2]


def ask(*words, cwd=ROOT):
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=180)


def test_the_doctor_answers_from_any_folder(tmp_path):
    done = ask("action=doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This machine can train" in done.stdout
    assert str(tmp_path / "runs") in done.stdout


def test_the_doctors_json_is_all_that_is_printed():
    done = ask("action=doctor", "output=json")
    answer = json.loads(done.stdout)
    assert answer["can_train"] is True
    assert {"name", "value", "status", "cure"} == set(answer["findings"][0])


def examined(monkeypatch, *findings):
    asked = {}

    def examine(runs_dir, cache_dir):
        asked.update(runs_dir=runs_dir, cache_dir=cache_dir)
        return list(findings)

    monkeypatch.setattr("megaplug.plan.doctor.examine", examine)
    return asked


def test_a_machine_that_cannot_train_ends_with_1(monkeypatch, capsys):
    examined(monkeypatch, finding.Finding("gloo", "no", "broken", "cure it"))
    assert plan.main(["action=doctor"]) == 1
    assert "cure it" in capsys.readouterr().out
    examined(monkeypatch, finding.Finding("gloo", "so so", "warning", "cure it"))
    assert plan.main(["action=doctor"]) == 0


def test_keys_of_the_job_say_where_the_disk_is_looked_at(monkeypatch, tmp_path):
    asked = examined(monkeypatch, finding.Finding("Python", "3.12"))
    assert plan.main(["action=doctor", f"runs_dir={tmp_path}/r", f"data.cache_dir={tmp_path}/c"]) == 0
    assert asked == {"runs_dir": tmp_path / "r", "cache_dir": tmp_path / "c"}


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["action=plane"], "action=plane does not exist", "did you mean plan?"),
        (["action=doctor", "tokens=3"], "tokens=... means nothing to action=doctor", "action=plan"),
        (["tokens=abc"], "tokens=abc is not a whole number above 0", "such as tokens=15T"),
        (["ranks=[0,9]"], "there is no rank 9 among 1", "from 0 to 0"),
        (["ranks=first"], "ranks=first cannot be read", "ranks=0-15"),
        (["tokens=2,5T"], "tokens=2,5T is not a whole number above 0", "not a comma: tokens=2.5T"),
        (["action=search", "top=0"], "top=0 is not a whole number above 0", "such as top=10\n"),
        (
            ["topology=auto", "cluster=h100"],
            "sizes of this topology are not chosen yet",
            "action=search shows",
        ),
        (["ranks=3-1"], "ranks=3-1 counts down", "write ranks=1-3"),
        (["search"], "'search' is no key=value", "did you mean action=search?"),
        (["T", "action=plan"], "'T' is no key=value", "such as tokens=1T"),
        (["--cfg", "job"], "flags of launch/train.py", "launch/train.py --cfg job shows"),
        (["--cgf"], "unrecognized arguments: --cgf", "flags: --help, --config-dir, --config-name, --comp"),
        (["cluster=h1000"], "there is no option 'h1000'", "h100"),
        (["cluster=h100", "cluster.memory_gib=-1"], "cluster.memory_gib: must be above 0", ""),
        (["topology.pp=3"], "4 layers cannot be dealt out evenly to 3 stages", "topology.pp=4"),
        (["tokenizer=sentencepiece"], "tokenizer's, and it cannot be read", "model.vocab_size=32000"),
        (["actoin=plan"], "actoin: there is no such word, key or group", "did you mean action?"),
        (["tokns=3"], "tokns: there is no such word, key or group", "did you mean tokens?"),
        (["model=llama3_8b"], "that a core of cpu2 has", "cluster=h100 plans for others"),
        (["--multirun"], "--multirun is a flag of launch/train.py", "action=search compares layouts"),
        (["--help", "rank"], "there is no word, group or key 'rank'", "did you mean ranks?"),
        (["--help", "tokns"], "there is no word, group or key 'tokns'", "did you mean tokens?"),
        (["device=cpu", "cluster=h100"], "device=cpu wants cores, and cluster=h100 has GPUs", "cluster=cpu2"),
        (["device=cuda", "cluster=cpu2"], "device=cuda wants GPUs, and cluster=cpu2 has cores", "leave out"),
        (["action=docter"], "action=docter does not exist", "did you mean doctor?"),
        (["action=doctor", "output=jsno"], "output=jsno does not exist", "did you mean json?"),
        (["action=doctor", "runs_dri=x"], "runs_dri", "did you mean runs_dir?"),
        (["train.micro_batch_size=0"], "train.micro_batch_size: must be above 0, but is 0", ""),
        (["action=search", "train.micro_batch_size=0"], "micro_batch_size: must be above 0, but is 0", ""),
        (["topology.world_size=99999999999"], "topology.world_size: can be 1,048,576 at most", ""),
        (["model.num_layers=1000000"], "model.num_layers: can be 10,000 at most", ""),
        (["cluster=h100", "cluster.price_per_gpu_hour=1e308"], "can be 1,000,000 US dollars at most", ""),
        (["cluster=h100", "cluster.link_gbps=inf"], "link_gbps: must be a finite number, but is inf", ""),
        (
            ["action=search", "cluster=h100", "topology.world_size=64", "cluster.num_gpus=32"],
            "64 ranks are asked for, and the cluster has 32 GPUs",
            "topology.world_size=32",
        ),
        (
            ["topology.cp=2", "cluster=h100"],
            "'flash' cannot split a sequence over 2 ranks",
            "attention=ring and ring_dilated can",
        ),
    ],
)
def test_a_wrong_question_is_answered_with_what_there_is(words, message, hint, capsys):
    assert plan.main(words) == 2
    text = capsys.readouterr().err
    assert message in text
    assert hint in text
    assert "Traceback" not in text


LARGE = ["model=llama3_405b", "topology=tp8_pp16_llama3_405b", "precision=bf16", "train=pretrain"]
FRUGAL = [
    "train.micro_batch_size=1",
    "train.recompute_granularity=full",
    "train.recompute_method=uniform",
    "train.recompute_num_layers=1",
]


def test_a_plan_is_one_screen_in_which_every_figure_has_its_unit_and_its_label(capsys):
    assert plan.main([*LARGE, *FRUGAL, "cluster=h100", "tokens=15T", "cluster.price_per_gpu_hour=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 28
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for word in ("GiB", "tokens/s", "TFLOP/s", "causal", "full square", "days", "GPU-hours", "US dollars"):
        assert word in text, word
    assert text.count("modelled") >= 3 and "counted" in text
    # Stages of one size share a column: 7 layers, fourteen times 8, 7.
    assert "1-14" in text


def test_a_plan_for_a_program_says_where_its_figures_come_from(capsys):
    assert plan.main([*LARGE, *FRUGAL, "cluster=h100", "output=json", "ranks=[0,127]"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["possible"] is True and said["problems"] == []
    assert [said[part]["label"] for part in ("parameters", "memory", "step_time", "speed")] == [
        "counted", "modelled", "modelled", "modelled",
    ]  # fmt: skip
    assert set(said["speed"]["mfu"]) == set(said["speed"]["flop_conventions"]) == {"causal", "full"}
    assert [stage["layers"] for stage in said["memory"]["stages"]] == [7, *[8] * 14, 7]
    assert [row["rank"] for row in said["ranks"]] == [0, 127]
    assert said["ranks"][1]["layers"] == "119-125" and said["ranks"][1]["node"] == 15


@pytest.mark.parametrize(
    "words", [[], ["topology.tp=3"], ["cluster=rtx4090"]], ids=["works", "refused", "full"]
)
def test_a_program_is_told_which_answer_this_is_and_of_which_job(words, capsys):
    plan.main(["model=llama3_8b", "cluster=h100", "topology=tp8", "precision=bf16", "output=json", *words])
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["model"], said["precision"]["compute"]) == (1, "llama3_8b", "bf16")
    assert [said["precision"][part] for part in ("weights", "gradients", "optimizer")] == [2, 4, 12]
    assert {"megaplug", "possible", "problems", "nearest_that_work", "notes"} <= set(said)


def test_a_job_that_does_not_fit_is_planned_all_the_same_and_ends_with_2(capsys):
    assert plan.main(["model=llama3_8b", "precision=bf16", "cluster=rtx4090"]) == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out
    assert "GiB (modelled)" in said.err and "the nearest that work" in said.err


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["train.recompute_granularity=selective", "train.recompute_modules=[layernorm]"],
    ],
    ids=["plain", "modules computed again"],
)
def test_what_is_named_as_nearest_does_work(typed, capsys):
    words = ["model=llama3_8b", "precision=bf16", "cluster=rtx4090", "output=json", *typed]
    assert plan.main(words) == 2
    nearest = json.loads(capsys.readouterr().out)["nearest_that_work"]
    assert nearest
    for one in nearest:
        assert plan.main([*words, *one["overrides"]]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["topology"]["world_size"] == one["world_size"]
        assert max(s["total"] for s in said["memory"]["stages"]) == one["memory_bytes_per_rank_modelled"]


def test_an_impossible_layout_is_told_to_a_program_too(capsys):
    words = ["model=tiny", "topology.tp=3", "topology.pp=3", "output=json"]
    assert plan.main(words) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["possible"] is False
    assert {"topology.tp", "topology.pp"} <= {problem["key"] for problem in said["problems"]}
    for one in said["nearest_that_work"]:
        assert plan.main([*words, *one["overrides"]]) == 0
        capsys.readouterr()


def test_more_gpus_than_there_are(capsys):
    assert plan.main(["topology.dp=2", "cluster.num_gpus=1"]) == 2
    assert "2 ranks" in capsys.readouterr().err


def test_help_names_every_action_and_every_word_of_its_own(capsys):
    assert plan.main(["--help"]) == 0
    page = capsys.readouterr().out
    for name, action in plan.ACTIONS.items():
        assert f"  {name} " in page
        assert all(f"  {word}=" in page for word in action.words)
    assert plan.main(["--help", "plan"]) == 0
    page = capsys.readouterr().out
    assert "pipeline parallel" in page and "MFU" in page and "tokens=15T" in page
    assert plan.main(["--complete", "to"]) == 0
    assert "tokens=" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["action", *plan.WORDS])
def test_help_explains_each_word_of_its_own(word, capsys):
    assert plan.main(["--help", word]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{word}=")
    meaning = plan.WORDS[word].meaning if word in plan.WORDS else "rehearse"
    assert meaning in page


def test_neither_torch_nor_numpy_is_needed_for_a_plan():
    code = (
        "import sys; from megaplug.commands import plan; plan.main(sys.argv[1:]);"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'megatron', 'matplotlib', 'numpy')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "cluster=h100"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_that_leaves_early_is_no_fault():
    """As in ``launch/plan.py ranks=all | head -1``: nobody reads what is written after the plan."""
    reader, writer = os.pipe()
    os.close(reader)
    words = ["cluster=h100", "topology.dp=8", "train.micro_batch_size=1", "ranks=all"]
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=180)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plan_costs_no_more_than_a_few_imports_of_hydra():
    """0.6 s of a core in which Hydra's modules take 0.2 s; both grow on a busy machine."""
    words = [
        *("model=llama3_405b", "topology=tp8_pp16_llama3_405b", "topology.dp=64", "cluster=h100"),
        *("precision=bf16", "train=pretrain", "train.recompute_granularity=full"),
        *("train.recompute_method=uniform", "train.recompute_num_layers=1", "tokens=15T"),
    ]
    hydra = [sys.executable, "-c", "import hydra.core.config_store, hydra._internal.config_loader_impl"]
    plans, imports = [], []
    for _ in range(3):
        imports.append(core_seconds(lambda: subprocess.run(hydra, check=True, timeout=180)))
        plans.append(core_seconds(lambda: ask(*words)))
    assert "works: " in ask(*words).stdout
    assert min(plans) < 6 * min(imports)


def core_seconds(work):
    """Seconds of a core of the processes that it starts and awaits."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_pictures_are_drawn_where_the_user_says_and_listed(tmp_path, capsys):
    folder = tmp_path / "new" / "pictures"
    words = ["model=llama3_8b", "topology=tp4_pp2", "precision=bf16", "cluster=h100", f"pictures={folder}"]
    plan.main(words)
    assert f"{folder}: memory.png, timeline.png, heat_map.png, scaling.png" in capsys.readouterr().out
    plan.main([*words, "output=json"])
    said = json.loads(capsys.readouterr().out)
    assert said["pictures"] == [
        str(folder / f"{name}.png") for name in ("memory", "timeline", "heat_map", "scaling")
    ]
    assert {path.suffix for path in folder.iterdir()} == {".png", ".json"}


def test_of_cpu_ranks_only_the_memory_is_drawn(tmp_path, capsys):
    assert plan.main(["model=tiny", "cluster=cpu2", f"pictures={tmp_path}"]) == 0
    assert "memory.png (the time of CPU ranks is not modelled: no others)" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "memory.png"]


def test_of_an_impossible_layout_those_that_can_be_are_drawn(tmp_path, capsys):
    words = ["model=llama3_8b", "cluster=h100", "precision=bf16", "topology.world_size=12", "topology.pp=8"]
    words.append("train.global_batch_size=48")
    assert plan.main([*words, f"pictures={tmp_path}"]) == 2
    assert f"note: pictures in {tmp_path}: heat_map.png" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heat_map.json", "heat_map.png"]
    cells = json.loads((tmp_path / "heat_map.json").read_text())["cells"]
    (own,) = [cell for cell in cells if cell["own"]]
    assert own["rule"] == "8 does not divide 12 GPUs"
    assert any("step_seconds" in cell for cell in cells)
    plan.main([*words, f"pictures={tmp_path}", "output=json"])
    assert json.loads(capsys.readouterr().out)["pictures"] == [str(tmp_path / "heat_map.png")]


@pytest.mark.parametrize(
    "words", [["topology.cp=2", "topology.world_size=2"], ["topology.tp=0"], ["train.seed=-1"]], ids=str
)
def test_where_no_picture_can_tell_why_none_is_drawn(words, tmp_path, capsys):
    folder = tmp_path / "none"
    assert plan.main(["model=llama3_8b", "cluster=h100", "precision=bf16", *words, f"pictures={folder}"]) == 2
    assert "note: no pictures: what is wrong is not the layout" in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_of_pictures_that_is_a_file_is_told_before_anything_is_planned(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert plan.main(["model=tiny", f"pictures={tmp_path / 'file'}"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "is not a folder" in said.err


def test_gpus_that_this_machine_has_not_are_not_planned_on_its_cores(monkeypatch, capsys):
    monkeypatch.setattr("megaplug.launchers.machine.gpu_name", lambda: None)
    assert plan.main(["device=cuda"]) == 2
    text = capsys.readouterr().err
    assert "device=cuda wants GPUs, and this machine has none" in text and "cluster=h100" in text
    assert plan.main(["cluster=h100", "train.iters=1"]) == 0
    assert "tokens, 1 step: " in capsys.readouterr().out
