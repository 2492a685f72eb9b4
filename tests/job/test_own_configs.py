"""A person's own folder composes with the shipped one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaplug.errors import UserError
from megaplug.job.compose import ConfigSource, compose_job


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults:\n  - tiny\n  - _self_\nname: mine\nnum_layers: 6\n"
    )
    (tmp_path / "study.yaml").write_text(
        "defaults:\n  - train\n  - override model: mine\n  - _self_\nruns_dir: elsewhere\n"
    )
    return tmp_path


def test_own_options_stand_beside_the_shipped_ones(own: Path) -> None:
    job = compose_job(["model=mine", "topology=tp2"], ConfigSource(extra_dir=own))
    assert (job.model.num_layers, job.topology.tp, job.name) == (6, 2, "mine")


def test_an_own_primary_file_can_build_on_ours(own: Path) -> None:
    job = compose_job([], ConfigSource("study", own))
    assert (job.model.num_layers, job.runs_dir) == (6, "elsewhere")


def test_a_misspelt_own_option_is_suggested(own: Path) -> None:
    with pytest.raises(UserError) as caught:
        compose_job(["model=mina"], ConfigSource(extra_dir=own))
    assert "mine" in caught.value.hint


def test_unknown_keys_in_an_own_file_are_named(own: Path) -> None:
    (own / "model" / "mine.yaml").write_text("defaults:\n  - tiny\n  - _self_\nnum_layer: 6\n")
    with pytest.raises(UserError, match=r"model\.num_layer: there is no such key") as caught:
        compose_job(["model=mine"], ConfigSource(extra_dir=own))
    assert "num_layers" in caught.value.hint


def test_a_reference_that_leads_nowhere_is_one_message(own: Path) -> None:
    (own / "model" / "mine.yaml").write_text("defaults:\n  - tiny\n  - _self_\nnum_layers: ${model.depth}\n")
    with pytest.raises(UserError, match="depth"):
        compose_job(["model=mine"], ConfigSource(extra_dir=own))


def test_broken_yaml_is_one_message(own: Path) -> None:
    (own / "model" / "mine.yaml").write_text("num_layers: [1\n")
    with pytest.raises(UserError):
        compose_job(["model=mine"], ConfigSource(extra_dir=own))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        compose_job([], ConfigSource(extra_dir=tmp_path / "none"))


def test_a_misspelt_primary_file_is_suggested() -> None:
    with pytest.raises(UserError) as caught:
        compose_job([], ConfigSource("trian"))
    assert "train" in caught.value.hint
