"""What is frozen is read back as it was."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
from job_factory import FOLDER, resolved

from megaplug.errors import UserError
from megaplug.job.freeze import FrozenJob, read_frozen, write_frozen
from megaplug.job.identity import digest, identity, model_fingerprint
from megaplug.job.plain_command import SPEC, command_script, warnings
from megaplug.job.schema import AttentionConfig
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
    assert words[words.index("torchrun") :] == [
        "torchrun",
        "--nproc-per-node",
        "2",
        "${PRETRAIN_GPT:-pretrain_gpt.py}",
        *frozen.megatron_args,
    ]
    assert f"MEGAPLUG_JOB={frozen.folder.job_file}" in words
    assert words.index("megaplug.runtime.plain") < words.index("torchrun")


@pytest.mark.parametrize(
    ("words", "one_queue", "unset"),
    [
        ([], False, False),
        (["topology=tp2"], True, False),
        (["topology.zero=3", "topology.fsdp=torch", "topology.dp=2"], False, True),
        (["topology=tp2", "topology.zero=3"], False, True),
    ],
)
def test_the_plain_command_sets_the_queues_that_megatron_asks_for(
    words: list[str], one_queue: bool, unset: bool
) -> None:
    given = megatron_arguments(*resolved(*words, device="cuda"), FOLDER)
    lines = command_script(given, 1, FOLDER.job_file).splitlines()
    exported = [word for line in lines if line.startswith("export ") for word in line.split()[1:]]
    assert ("CUDA_DEVICE_MAX_CONNECTIONS=1" in exported) == one_queue
    assert ("unset CUDA_DEVICE_MAX_CONNECTIONS" in lines) == unset


def test_the_plain_command_keeps_weights_on_the_gpu_where_activations_are_moved() -> None:
    text = command_script(["--fine-grained-activation-offloading"], 1, FOLDER.job_file)
    assert "NVTE_CPU_OFFLOAD_V1=1" in text
    assert "NVTE_CPU_OFFLOAD_V1" not in command_script([], 1, FOLDER.job_file)


def test_context_parallelism_needs_one_queue_too() -> None:
    text = command_script(["--context-parallel-size", "2"], 1, FOLDER.job_file)
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in text


def test_awkward_words_survive_a_shell(tmp_path: Path) -> None:
    awkward = ["--wandb-exp-name", "it's $HOME", "--spec", *SPEC, "--onnx-safe", ""]
    text = command_script(awkward, 1, tmp_path / "it's $HERE" / "job.yaml")
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    assert words[-7:] == awkward
    assert f"MEGAPLUG_JOB={tmp_path}/it's $HERE/job.yaml" in words


@pytest.mark.parametrize(
    ("backend", "attention", "ours"),
    [("native", "flash", True), ("native", "local", True), ("te", "te", False), ("te", "flash", True)],
)
def test_the_spec_is_given_where_a_layer_is_ours(
    tmp_path: Path, backend: str, attention: str, ours: bool
) -> None:
    job, topology, derived, facts = resolved()
    job = dataclasses.replace(job, attention=AttentionConfig(attention))
    derived = dataclasses.replace(derived, backend=backend)
    words = megatron_arguments(job, topology, derived, facts, RunFolder(tmp_path))
    assert ("--spec" in words) == ours
    text = command_script(words, 1, tmp_path / "job.yaml")
    assert ("MEGAPLUG_JOB" in text) == ("python -m megaplug.runtime.plain" in text) == ours


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ([], "Megatron-LM needs CUDA"),
        (["model.use_rope_scaling=true", "model.rope_scaling_factor=32"], "scales RoPE by 8"),
    ],
)
def test_the_command_says_what_a_plain_run_would_do_otherwise(
    tmp_path: Path, words: list[str], warning: str
) -> None:
    frozen = frozen_in(tmp_path, *words)
    assert any(warning in found for found in warnings(frozen.megatron_args))
    assert warning in command_script(frozen.megatron_args, 1, frozen.folder.job_file)
    assert warnings(["--use-rope-scaling", "--rope-scaling-factor", "8.0"]) == []
    assert len(warnings(["--exit-on-missing-checkpoint"])) == 1
    assert warnings(["--exit-on-missing-checkpoint", "--no-load-optim"]) == []


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    frozen = frozen_in(tmp_path)
    write_frozen(frozen)
    text = frozen.folder.job_file.read_text()
    frozen.folder.job_file.write_text(text.replace("format: 1", "format: 99"))
    with pytest.raises(UserError, match="99"):
        read_frozen(frozen.folder.job_file)


@pytest.mark.parametrize(
    "content", [b"", b"[1", b"format: 1\n", b"a: !!python/object/apply:os.system ['true']", b"format: \xff"]
)
def test_what_is_no_frozen_job_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(UserError):
        read_frozen(tmp_path / "job.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read_frozen(tmp_path / "none.yaml")
