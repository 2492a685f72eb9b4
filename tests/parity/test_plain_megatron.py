"""The printed command under Megatron-LM's own entry trains as the run itself does.

Without loading a checkpoint none of megaplug's repairs has a part in it. A run has a cross-entropy and an
Adam that round otherwise than Megatron's own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence

import plain_pretrain
import pytest
from ranks import run_ranks
from small_jobs import SmallJobs, curve

from megaplug.job.plain_command import JOB_VARIABLE, SPEC
from megaplug.runs.folder import RunFolder

STEPS = 5
# Some units in the last place of fp32 (6e-8), where two norms, losses or optimizers round differently, and
# five steps on; in bf16 a weight may round to its neighbour (4e-3).
ROUNDING = 1e-5
ROUNDING_BF16 = 2e-3
FEW = [f"train.iters={STEPS}", "lr=constant", "train.global_batch_size=4"]


def printed(folder: RunFolder) -> tuple[dict[str, str], list[str]]:
    """What a run's command.sh exports, and the words that it gives pretrain_gpt.py."""
    text = folder.command_file.read_text()
    exported = [
        word for line in re.findall(r"^export (.*)$", text, re.MULTILINE) for word in shlex.split(line)
    ]
    (command,) = re.findall(r"^torchrun .*\Z", text, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    return dict(word.split("=", 1) for word in exported), words[4:]


def plain_rank(words: Sequence[str], environment: dict[str, str]) -> plain_pretrain.Curve:
    """What each forked rank does: the arguments and the environment of the script, nothing else."""
    from megaplug.runtime.pretrain import _store

    os.environ.update(environment)
    plain_pretrain.stand_in()
    sys.argv = ["pretrain_gpt.py", *words]
    return plain_pretrain.pretrain_from_arguments(_store)


def both_curves(
    small_jobs: SmallJobs, overrides: Sequence[str], without: Sequence[str] = ()
) -> tuple[plain_pretrain.Curve, plain_pretrain.Curve]:
    """The curve of the plain command, then that of the run of the same job.

    Args:
        small_jobs: Where.
        overrides: The job.
        without: Words of the command that are left out.
    """
    folder, world_size = small_jobs.freeze(overrides)
    environment, words = printed(folder)
    assert set(without) <= set(words)
    words = [word for word in words if word not in without]
    logs = small_jobs.root / "plain" / folder.name
    plain = run_ranks(world_size, plain_rank, words, environment, folder=logs)[-1]
    # What the plain run has saved is not to be continued.
    shutil.rmtree(folder.checkpoints)
    return plain, curve(small_jobs.run(overrides))


@pytest.mark.slow
def test_flash_attention_trains_alike_under_megatron_s_own_entry_on_two_ranks(small_jobs: SmallJobs) -> None:
    plain, ours = both_curves(small_jobs, [*FEW, "name=plain_flash_tp2", "topology.tp=2"])
    assert len(plain) == STEPS and plain[0][0] > plain[-1][0]
    assert sum(plain, ()) == pytest.approx(sum(ours, ()), rel=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("one_rank", [], marks=pytest.mark.soak),
        pytest.param("dp2", ["topology.dp=2"], marks=pytest.mark.soak),
        ("pp2", ["topology.pp=2"]),
        ("moe", ["moe=small", "topology.ep=2", "topology.dp=2"]),
        ("bf16", ["precision=bf16"]),
    ],
)
def test_flash_attention_trains_alike_in_every_layout(
    small_jobs: SmallJobs, name: str, words: list[str]
) -> None:
    plain, ours = both_curves(small_jobs, [*FEW, f"name=plain_{name}", *words])
    assert len(plain) == STEPS
    rounding = ROUNDING_BF16 if name == "bf16" else ROUNDING
    assert sum(plain, ()) == pytest.approx(sum(ours, ()), rel=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [pytest.param("topology.dp=1", marks=pytest.mark.soak), "topology.dp=2"])
def test_a_stock_job_needs_no_spec(small_jobs: SmallJobs, topology: str) -> None:
    """Megatron's own local layers, without the spec: its RMSNorm sums in another order than megaplug's."""
    words = [*FEW, f"name=stock_{topology[-1]}", "attention=local", topology]
    plain, ours = both_curves(small_jobs, words, without=["--spec", *SPEC])
    assert len(plain) == STEPS
    assert sum(plain, ()) == pytest.approx(sum(ours, ()), rel=ROUNDING)


def test_without_the_frozen_job_the_spec_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megaplug.errors import UserError
    from megaplug.runtime import plain

    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    with pytest.raises(UserError, match=JOB_VARIABLE):
        plain.layer_spec(None)
    assert plain.main() == 2


def test_the_spec_reads_name_and_parameters_from_the_frozen_job(
    small_jobs: SmallJobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megaplug.runtime import plain

    folder, _ = small_jobs.freeze(["name=named", "attention=local"])
    environment, words = printed(folder)
    assert words[words.index("--spec") + 1 :][:2] == list(SPEC)
    monkeypatch.setenv(JOB_VARIABLE, environment[JOB_VARIABLE])
    assert plain.main() == 0
    assert "native layers, local attention" in capsys.readouterr().out
