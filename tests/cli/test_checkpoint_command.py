"""``launch/checkpoint.py``: what a person types about checkpoints, and what is answered."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from quick_answers import assert_quick
from small_checkpoints import COMMON, craft_object, make_checkpoint

from megaplug.commands import checkpoint as command
from megaplug.job.checks import resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.derive import derive
from megaplug.job.facts import DataFacts
from megaplug.job.freeze import FrozenJob, write_frozen
from megaplug.runs.checkpoints import TRACKER, faults_of, list_checkpoints
from megaplug.runs.folder import RunFolder
from megaplug.runs.lock import RunLock
from megaplug.runs.metrics import append_metrics

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5}


def frozen(folder: RunFolder) -> FrozenJob:
    """The default job, which keeps the two newest checkpoints."""
    job = compose_job([])
    counts = {"train": 1_000_000, "valid": 50_000, "test": 0}
    facts = DataFacts("f" * 32, {}, counts, counts, 257, 3.2, "a test", 256, "bytes", [])
    topology = resolve_topology(job)
    derived = derive(job, topology, facts, device="cpu", backend="native")
    return FrozenJob(job, topology, derived, facts, [], "0123abcd", {}, "", "0", folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("template") / "small-0123abcd")
    folder.path.mkdir()
    write_frozen(frozen(folder))
    for iteration, loss in LOSSES.items():
        make_checkpoint(folder.checkpoints, iteration, {"topology": {"world_size": 2, "tp": 2}})
        append_metrics(folder.metrics_file, {"iteration": iteration, "valid_loss": loss, "split": "valid"})
    return folder.path


@pytest.fixture
def run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with three checkpoints, of which its job keeps two; the current folder is that of ``runs``."""
    folder = RunFolder(tmp_path / "runs" / template.name)
    shutil.copytree(template, folder.path)
    monkeypatch.chdir(tmp_path)
    return folder


def typed(*words: str) -> int:
    return command.main(list(words))


def read(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict:
    assert typed(*words, "output=json") == code
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def flip(path: Path, place: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def steps(run: RunFolder) -> list[int]:
    return [found.iteration for found in list_checkpoints(run.checkpoints)]


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one message of a mistake, for a person and for a program."""
    assert typed(*words) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ")
    document = read(capsys, *words, code=code)
    assert document["exit_code"] == code and document["problems"][0]["message"] in shown.err
    return shown.err


def test_the_list_says_what_there_is_and_what_the_run_would_do(run, capsys):
    assert typed() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/small-0123abcd"
    ten, twenty, thirty = (line.split("  ") for line in lines[2:5])
    assert ten[-1] == "not kept" and twenty[-1] == "lowest loss" and "goes on from it" in thirty[-1]
    assert lines[5] == "  the run keeps the newest 2"
    (found,) = read(capsys)["runs"]
    assert [one["valid_loss"] for one in found["checkpoints"]] == [3.0, 2.0, 2.5]
    assert [one["stays"] for one in found["checkpoints"]] == [False, True, True]
    assert [one["tracked"] for one in found["checkpoints"]] == [False, False, True]
    assert found["tracker_fault"] is None
    assert all(one["complete"] and one["num_bytes"] > 8192 for one in found["checkpoints"])


def test_the_list_shows_what_is_not_whole_without_reading_it(run, capsys):
    (run.checkpoints / "iter_0000010" / "manifest.json").unlink()
    (run.checkpoints / "iter_0000020" / "__0_0.distcp").write_bytes(b"short")
    (run.checkpoints / "set_aside" / "0001-iter_0000040").mkdir(parents=True)
    (run.checkpoints / "saving" / "iter_0000050").mkdir(parents=True)
    assert typed("run=runs/small-0123abcd") == 1
    out = capsys.readouterr().out
    assert "not known" in out and "manifest.json: it was removed" in out and "has 5 bytes in place of" in out
    assert "set aside, being damaged: runs/small-0123abcd/checkpoints/set_aside/0001-iter_0000040" in out
    assert "being saved, or broken off: step 50" in out
    (found,) = read(capsys, code=1)["runs"]
    assert [one["complete"] for one in found["checkpoints"]] == [False, False, True]
    assert found["unfinished"] == [50]


@pytest.mark.parametrize(
    ("tracker", "said"),
    [("rubbish", "names no step"), ("40", "names step 40, which has no"), (None, "is not")],
)
def test_a_tracker_that_names_none_of_them_is_mentioned(run, capsys, tracker, said):
    file = run.checkpoints / TRACKER
    file.unlink() if tracker is None else file.write_text(tracker)
    assert typed() == 0
    assert f"latest_checkpointed_iteration.txt {said}" in capsys.readouterr().out.splitlines()[-1]
    assert said in read(capsys)["runs"][0]["tracker_fault"]


def test_a_job_of_another_version_does_not_hide_the_checkpoints(run, capsys):
    run.job_file.write_text("format: 0\n")
    (found,) = read(capsys)["runs"]
    assert found["policy"] is None and [one["stays"] for one in found["checkpoints"]] == [None] * 3


def test_one_is_shown_with_its_tensors_and_who_wrote_it(run, capsys):
    shown = read(capsys, "action=show", "run=runs/*", "iteration=20")
    assert (shown["iteration"], shown["complete"], shown["tracked"]) == (20, True, False)
    assert shown["tensors"] == [
        {
            "name": "optimizer.state.exp_avg.output_layer.weight",
            "shape": [64, 32],
            "dtype": "bfloat16",
            "num_parts": 1,
        },
        {"name": "output_layer.weight", "shape": [64, 32], "dtype": "float32", "num_parts": 1},
    ]
    assert (shown["num_weights"], shown["num_optimizer"], shown["objects"]) == (2048, 2048, [COMMON])
    assert shown["written_by"] == {"job": "0123abcd", "topology": {"world_size": 2, "tp": 2}}
    assert typed("action=show", f"path={run.checkpoints / 'iter_0000020'}") == 0
    out = capsys.readouterr().out
    assert "2,048 in weights" in out and "world_size 2, tp 2" in out
    assert "output_layer.weight  64 x 32  float32      1" in out
    assert "exp_avg" not in out and "and 1 of the optimizer: tensors=all" in out
    assert typed("action=show", "run=runs/*", "tensors=all") == 0
    assert "exp_avg" in capsys.readouterr().out


def test_a_crafted_one_is_shown_and_its_program_does_not_run(run, tmp_path, capsys):
    marker, shown = tmp_path / "ran", run.checkpoints / "iter_0000030"
    evil = b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(marker)
    (shown / ".metadata").write_bytes(evil)
    assert typed("action=show", "run=runs/*") == 1
    assert ".metadata would import posix.system" in capsys.readouterr().out
    assert not marker.exists()


def test_every_byte_is_verified_and_what_is_damaged_is_named(run, capsys):
    assert typed("action=verify") == 0
    assert "3 checkpoints whole" in capsys.readouterr().out
    flip(run.checkpoints / "iter_0000020" / "__0_0.distcp")
    craft_object(run.checkpoints / "iter_0000030", COMMON, run.path / "ran")
    assert typed("action=verify") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("whole") and lines[1].endswith("DAMAGED") and lines[3].endswith("DAMAGED")
    assert lines[2] == "  __0_0.distcp has other bytes than were saved"
    assert lines[4] == f"  __0_0.distcp: {COMMON} would import _io.open"
    assert lines[5].startswith("2 of 3 checkpoints damaged")
    found = read(capsys, "action=verify", code=1)
    assert found["num_damaged"] == 2 and [one["whole"] for one in found["checkpoints"]] == [
        True,
        False,
        False,
    ]
    assert typed("action=verify", "run=runs/*", "iteration=10") == 0
    assert not (run.path / "ran").exists()


def test_several_runs_are_verified_at_once(run, tmp_path, capsys):
    make_checkpoint(tmp_path / "elsewhere", 5)
    found = read(capsys, "action=verify", "run=[runs/small-0123abcd,elsewhere]")
    assert [one["iteration"] for one in found["checkpoints"]] == [10, 20, 30, 5]


def test_what_a_run_does_is_not_said_of_copies(run, tmp_path, capsys):
    for directory in (run.checkpoints, tmp_path / "copies"):
        if directory != run.checkpoints:
            make_checkpoint(directory, 30)
        flip(directory / "iter_0000030" / "__0_0.distcp")
        assert typed("action=verify", f"path={directory}/iter_0000030") == 1
        assert ("a run goes on from" in capsys.readouterr().out) == (directory == run.checkpoints)


def test_one_stays_and_two_stay(run, capsys):
    for words, said in ((["keep=1"], "the newest stays"), (["keep=2"], "the newest 2 stay")):
        assert typed("action=prune", "run=runs/*", *words) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith(said)


def test_pruning_shows_first_and_deletes_when_told(run, capsys):
    assert typed("action=prune", "run=runs/*") == 0
    out = capsys.readouterr().out
    assert "step 10 would go" in out and "yes=true" in out and steps(run) == [10, 20, 30]
    assert typed("action=prune", "run=runs/*", "yes=true") == 0
    assert "deleted: 1 checkpoint" in capsys.readouterr().out
    assert steps(run) == [20, 30] and not (run.checkpoints / "saving").exists()
    assert typed("action=prune", "run=runs/*", "yes=true") == 0
    assert "deleted: 0 checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["keep=1"], [30]),
        (["keep=1", "keep_best=1"], [20, 30]),
        (["keep=1", "keep_every=10"], [10, 20, 30]),
        (["keep=3"], [10, 20, 30]),
        (["keep_best=1"], [20, 30]),
        (["keep_every=20", "keep=1"], [20, 30]),
    ],
)
def test_words_that_are_typed_stand_above_the_run_s_own(run, capsys, words, left):
    found = read(capsys, "action=prune", "run=runs/*", "yes=true", *words)
    assert steps(run) == left and found["deleted"]
    assert [one["iteration"] for one in found["runs"][0]["going"]] == sorted({10, 20, 30} - set(left))


def test_the_newest_whole_one_stays_though_newer_damaged_ones_are_there(run, capsys):
    flip(run.checkpoints / "iter_0000030" / "__0_0.distcp")
    assert typed("action=prune", "run=runs/*", "keep=1", "yes=true") == 0
    assert steps(run) == [20, 30]
    assert "step 30 is damaged" in capsys.readouterr().out
    flip(run.checkpoints / "iter_0000020" / "__0_0.distcp")
    assert typed("action=prune", "run=runs/*", "keep=1", "yes=true") == 0
    assert steps(run) == [20, 30] and "none is deleted" in capsys.readouterr().out


def test_a_running_job_is_not_disturbed(run, capsys):
    with RunLock.acquire(run, "python launch/train.py"):
        said = refused(capsys, "action=prune", "run=runs/*", "keep=1", "yes=true")
        assert "another job is using" in said and steps(run) == [10, 20, 30]
        assert typed("action=prune", "run=runs/*", "keep=1") == 0, "to look is no harm"


def test_a_copy_is_whole_and_where_it_was_asked_for(run, tmp_path, capsys):
    found = read(capsys, "action=copy", "run=runs/*", "to=disk/deep")
    assert found["to"] == "disk/deep/iter_0000030" and faults_of(tmp_path / found["to"]) == []
    assert sorted(path.name for path in (tmp_path / "disk" / "deep").iterdir()) == ["iter_0000030"]
    said = refused(capsys, "action=copy", "run=runs/*", "to=disk/deep")
    assert "exists already" in said and "to=" in said
    assert typed("action=copy", f"path={run.checkpoints}/iter_0000010", "to=disk/deep") == 0
    assert "load=disk/deep/iter_0000010" in capsys.readouterr().out
    assert [one["path"] for one in read(capsys, "run=disk/deep")["runs"][0]["checkpoints"]] == [
        "disk/deep/iter_0000010",
        "disk/deep/iter_0000030",
    ]


def test_a_copy_that_was_broken_off_goes_on(run, tmp_path, capsys):
    source, beside = run.checkpoints / "iter_0000030", tmp_path / "disk" / ".iter_0000030.copying"
    beside.mkdir(parents=True)
    shard = (source / "__0_0.distcp").read_bytes()
    (beside / "__0_0.distcp").write_bytes(shard)
    (beside / ".metadata").write_bytes(b"half")
    (beside / "stranger").write_bytes(b"")
    found = read(capsys, "action=copy", f"path={source}", "to=disk")
    assert found["num_bytes_found"] == len(shard)
    assert faults_of(tmp_path / "disk" / "iter_0000030") == [] and not beside.exists()


def test_two_copies_to_one_place_do_not_meet(run, tmp_path, capsys):
    beside = tmp_path / "disk" / ".iter_0000030.copying"
    beside.mkdir(parents=True)
    fd = os.open(beside, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert "another process is copying" in refused(capsys, "action=copy", "run=runs/*", "to=disk")
    finally:
        os.close(fd)


def test_a_damaged_source_is_not_copied(run, tmp_path, capsys):
    shard = run.checkpoints / "iter_0000030" / "__0_0.distcp"
    flip(shard)
    said = refused(capsys, "action=copy", "run=runs/*", "to=disk", code=1)
    assert "__0_0.distcp has other bytes than were saved" in said
    assert not (tmp_path / "disk" / "iter_0000030").exists()
    shard.unlink()
    said = refused(capsys, "action=copy", "run=runs/*", "to=disk", code=1)
    assert "__0_0.distcp is missing" in said


def test_a_crafted_source_is_not_copied_and_nothing_of_it_stays(run, tmp_path, capsys):
    craft_object(run.checkpoints / "iter_0000030", COMMON, tmp_path / "ran")
    assert "would import" in refused(capsys, "action=copy", "run=runs/*", "to=disk", code=1)
    assert list((tmp_path / "disk").iterdir()) == [] and not (tmp_path / "ran").exists()


def test_bytes_that_change_on_the_way_are_found(run, tmp_path, capsys, monkeypatch):
    """A disk that does not keep what it was given."""
    from megaplug.runs import copying

    real = copying._copy

    def copy(source: Path, target: Path, *more: object) -> None:
        real(source, target, *more)
        if target.name == "__0_0.distcp":
            flip(target)

    monkeypatch.setattr(copying, "_copy", copy)
    said = refused(capsys, "action=copy", "run=runs/*", "to=disk", code=1)
    assert "__0_0.distcp has other bytes" in said and list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["action=lst"], "action=lst does not exist", "did you mean list?"),
        (["verify"], "'verify' is no key=value", "did you mean action=verify?"),
        (["actoin=list"], "actoin: there is no such word", "did you mean action?"),
        (["model=tiny"], "model: there is no such word", "words: action"),
        (["runs/small-0123abcd"], "is no key=value", "run=runs/small-0123abcd"),
        (["run=runs/smal"], "run=runs/smal is not a folder", "runs/small-0123abcd"),
        (["run=."], "neither a run nor", "runs/small-0123abcd"),
        (["run="], "run= has no value", "a run's folder"),
        (["to=disk"], "to=... means nothing to action=list", "action=copy"),
        (["action=show"], "no checkpoint is named", "runs/small-0123abcd"),
        (["action=show", "run=runs/*", "iteration=15"], "no checkpoint of step 15", "10, 20, 30"),
        (["action=show", "run=runs/*", "iteration=x"], "iteration=x is not a whole number", "iteration=100"),
        (["action=show", "path=x/iter_1", "iteration=16"], "iteration=16 another way", "give path=, or run="),
        (["action=verify", "path=x/iter_1", "run=runs/*"], "run=runs/* another way", "give path=, or run="),
        (["action=show", "path=runs"], "path=runs is not a checkpoint", "iter_"),
        (["action=show", "path=none"], "path=none is no folder", "iter_"),
        (["action=prune"], "no run is named", "run=FOLDER"),
        (["action=prune", "run=runs/*", "keep=0"], "keep=0 is not a whole number of 1", "keep=2"),
        (["action=prune", "run=runs/*", "yes=ja"], "yes=ja does not exist", "yes=true"),
        (["action=copy", "run=runs/*"], "to= is not given", "to=FOLDER"),
        (["--cfg", "job"], "no job is composed here", "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_told_with_what_was_meant(run, capsys, words, said, hint):
    message = refused(capsys, *words)
    assert said in message and hint in message.partition("hint: ")[2]


def test_folders_that_cannot_be_pruned_without_a_policy_say_so(run, tmp_path, capsys):
    make_checkpoint(tmp_path / "copies", 5), make_checkpoint(tmp_path / "copies", 6)
    assert "keep=" in refused(capsys, "action=prune", "run=copies")
    assert typed("action=prune", "run=copies", "keep=1", "yes=true") == 0
    assert [found.iteration for found in list_checkpoints(tmp_path / "copies")] == [6]


@pytest.mark.parametrize("name", [*command.ACTIONS, *command.WORDS, "action"])
def test_help_explains_every_action_and_word(name, capsys):
    assert typed("--help", name) == 0
    said = capsys.readouterr().out
    assert said.startswith((f"action={name}", f"{name}=")) and len(said.splitlines()) >= 2


def test_help_s_front_page_has_them_all_and_fits(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/checkpoint.py"])
    assert typed("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in command.ACTIONS)
    assert all(f"\n  {word.form} " in said for word in command.WORDS.values())
    assert max(map(len, said.splitlines())) <= 110
    assert typed("--help", "prun") == 2
    assert "did you mean prune?" in capsys.readouterr().err


def test_the_tab_key_knows_its_words_and_no_others(capsys):
    assert typed("--complete", "") == 0
    assert capsys.readouterr().out.split() == [f"{name}=" for name in ("action", *command.WORDS)]
    assert typed("--complete", "action=") == 0
    assert capsys.readouterr().out.split() == [f"action={name}" for name in command.ACTIONS]
    assert typed("--complete", "run=") == 0
    assert capsys.readouterr().out.split() == [":files"]


@pytest.mark.parametrize("words", [[], ["action=verify"], ["action=prune", "run=runs/*"], ["--help"]])
def test_an_answer_needs_no_torch_and_comes_at_once(run, tmp_path, words):
    assert_quick("checkpoint", words, tmp_path)
