"""`launch/plan.py` as a person types it."""

from __future__ import annotations

import json
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
        ([], "no action was given", "action=doctor"),
        (["action=search"], "action=search does not exist", "one of: action=doctor"),
        (["action=docter"], "action=docter does not exist", "did you mean doctor?"),
        (["action=doctor", "output=jsno"], "output=jsno does not exist", "did you mean json?"),
        (["action=doctor", "runs_dri=x"], "runs_dri", "did you mean runs_dir?"),
    ],
)
def test_a_wrong_question_is_answered_with_what_there_is(words, message, hint, capsys):
    assert plan.main(words) == 2
    text = capsys.readouterr().err
    assert message in text
    assert hint in text
    assert "Traceback" not in text
