"""Names and numbers of run folders."""

from __future__ import annotations

import pytest

from megaplug.errors import UserError
from megaplug.runs.folder import create_next, find_latest, open_first


def test_the_first_folder_has_the_plain_name_and_the_next_are_numbered(tmp_path):
    runs = tmp_path / "a" / "runs"
    names = [create_next(runs, "tiny", "0123abcd").name for _ in range(3)]
    assert names == ["tiny-0123abcd", "tiny-0123abcd-2", "tiny-0123abcd-3"]


def test_the_newest_is_the_highest_number_and_not_the_last_word(tmp_path):
    for suffix in ("", "-2", "-9", "-10", "-x", "-011"):
        (tmp_path / f"tiny-0123abcd{suffix}").mkdir()
    (tmp_path / "tiny-0123abcd-99").write_text("a file")
    assert find_latest(tmp_path, "tiny", "0123abcd").name == "tiny-0123abcd-10"


def test_other_runs_do_not_count(tmp_path):
    (tmp_path / "tiny-ffffffff-7").mkdir()
    (tmp_path / "tiny-2-0123abcd").mkdir()
    assert find_latest(tmp_path, "tiny", "0123abcd") is None
    assert find_latest(tmp_path / "none", "tiny", "0123abcd") is None
    assert create_next(tmp_path, "tiny", "0123abcd").name == "tiny-0123abcd"


def test_a_new_folder_leaves_the_older_ones_alone(tmp_path):
    first = create_next(tmp_path, "tiny", "0")
    first.job_file.write_text("kept")
    second = create_next(tmp_path, "tiny", "0")
    assert first.job_file.read_text() == "kept" and list(second.checkpoints.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="folder"):
        create_next(tmp_path, name, "0")


def test_a_file_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        create_next(tmp_path / "runs", "tiny", "0")
    (tmp_path / "tiny-0").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        create_next(tmp_path, "tiny", "0")


def test_two_launchers_that_find_no_folder_get_the_same_one(tmp_path):
    runs = tmp_path / "runs"
    assert open_first(runs, "tiny", "1a2b3c4d") == open_first(runs, "tiny", "1a2b3c4d")
    assert [entry.name for entry in runs.iterdir()] == ["tiny-1a2b3c4d"]
    assert create_next(runs, "tiny", "1a2b3c4d").name == "tiny-1a2b3c4d-2"


def test_a_file_in_the_place_of_the_runs_folder_is_an_error_for_a_person(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError):
        open_first(tmp_path / "runs", "tiny", "1a2b3c4d")
