"""What is frozen is read back as it was."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from job_factory import resolved

from megaplug.errors import UserError
from megaplug.job.freeze import FrozenJob, command_script, read_frozen, write_frozen
from megaplug.job.identity import digest, identity, model_fingerprint
from megaplug.job.translate import megatron_arguments
from megaplug.runs.folder import RunFolder


def frozen_in(path: Path, *words: str) -> FrozenJob:
    job, topology, derived, facts = resolved(*words)
    folder = RunFolder(path)
    return FrozenJob(
        job=job,
        topology=topology,
        derived=derived,
        facts=facts,
        megatron_args=megatron_arguments(job, topology, derived, facts, folder),
        digest=digest(identity(job, topology, derived, facts)),
        model_fingerprint=model_fingerprint(job, derived, facts),
        revision="abc+changes",
        megaplug_version="0",
        folder=folder,
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        [
            "moe=small",
            "topology=tp2_pp2",
            "megatron.num_workers=1",
            "train.recompute_granularity=selective",
            "train.recompute_modules=[mlp]",
        ],
    ],
)
def test_a_frozen_job_is_read_back_whole(tmp_path: Path, words: list[str]) -> None:
    frozen = frozen_in(tmp_path, *words)
    write_frozen(frozen)
    read = read_frozen(frozen.folder.job_file)
    for field in dataclasses.fields(FrozenJob):
        assert getattr(read, field.name) == getattr(frozen, field.name), field.name


def test_the_command_is_the_plain_megatron_one(tmp_path: Path) -> None:
    frozen = frozen_in(tmp_path, "topology=tp2")
    write_frozen(frozen)
    text = frozen.folder.command_file.read_text()
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    assert words == ["torchrun", "--nproc-per-node", "2", "pretrain_gpt.py", *frozen.megatron_args]


def test_awkward_words_survive_a_shell() -> None:
    awkward = ["--wandb-exp-name", "it's $HOME", "--onnx-safe", ""]
    words = shlex.split(command_script(awkward, 1).replace("\\\n", " "), comments=True)
    assert words[-4:] == awkward


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    frozen = frozen_in(tmp_path)
    write_frozen(frozen)
    text = frozen.folder.job_file.read_text()
    frozen.folder.job_file.write_text(text.replace("format: 1", "format: 99"))
    with pytest.raises(UserError, match="99"):
        read_frozen(frozen.folder.job_file)


@pytest.mark.parametrize("content", ["", "[1", "format: 1\n", "a: !!python/object/apply:os.system ['true']"])
def test_what_is_no_frozen_job_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.yaml").write_text(content)
    with pytest.raises(UserError):
        read_frozen(tmp_path / "job.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read_frozen(tmp_path / "none.yaml")
