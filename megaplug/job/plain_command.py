"""The same run as a plain Megatron-LM command: ``pretrain_gpt.py``, with our layers by ``--spec``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megaplug.job.variables import CONNECTIONS, OFFLOAD, moves_activations, needs_one_queue, uses_fsdp

# Where the spec finds the frozen job that names the layers.
JOB_VARIABLE = "MEGAPLUG_JOB"
# What Megatron's --spec is given: a module, and the function in it that makes the layers.
SPEC = ("megaplug.runtime.plain", "layer_spec")
RELEASE = "core_v0.19"


def command_script(megatron_args: Sequence[str], world_size: int, job_file: Path) -> str:
    """A shell script that is typed beside Megatron-LM's ``pretrain_gpt.py``, or is told where that is.

    Args:
        megatron_args: The words for Megatron's parser.
        world_size: Ranks on one machine.
        job_file: The run's ``job.yaml``.
    """
    notes = [
        f"# This run as a plain Megatron-LM command, for pretrain_gpt.py of {RELEASE} or the wheel's release:"
    ]
    notes.append("#   PRETRAIN_GPT=<clone of Megatron-LM>/pretrain_gpt.py sh command.sh")
    notes += [f"# {warning}" for warning in warnings(megatron_args)]
    lines = ["#!/bin/sh", *notes, "set -eu", *_environment(megatron_args)]
    if SPEC[0] in megatron_args:
        lines += [
            f"export {JOB_VARIABLE}={shlex.quote(str(job_file.resolve()))}",
            "# Megatron goes on with layers of its own where it cannot import ours: asked before it starts.",
            f"python -m {SPEC[0]}",
        ]
    command = [f'torchrun --nproc-per-node {world_size} "${{PRETRAIN_GPT:-pretrain_gpt.py}}"']
    for word in megatron_args:
        if word.startswith("--"):
            command.append(f"    {shlex.quote(word)}")
        else:
            command[-1] += f" {shlex.quote(word)}"
    return "\n".join([*lines, " \\\n".join(command)]) + "\n"


def _environment(megatron_args: Sequence[str]) -> list[str]:
    """Lines that set what a rank of the run itself has in its environment."""
    # A tokenizer is a local folder; nothing asks a hub for it.
    exported = {"HF_HUB_OFFLINE": "1"}
    if needs_one_queue(megatron_args):
        exported[CONNECTIONS] = "1"
    if moves_activations(megatron_args):
        exported[OFFLOAD] = "1"
    lines = ["export " + " ".join(f"{name}={value}" for name, value in exported.items())]
    return [*lines, f"unset {CONNECTIONS}"] if uses_fsdp(megatron_args) else lines


def warnings(megatron_args: Sequence[str]) -> list[str]:
    """What a plain run would do otherwise than the run itself; docs/plain_megatron.md says more.

    Args:
        megatron_args: The words for Megatron's parser.
    """
    values = dict(zip(megatron_args, [*megatron_args[1:], ""], strict=False))
    found = []
    if values.get("--distributed-backend") == "gloo":
        found.append("Megatron-LM needs CUDA, and this job is for the CPU: device=cuda writes it for GPUs.")
    if "--use-rope-scaling" in values and float(values.get("--rope-scaling-factor", "8")) != 8.0:
        found.append(
            "Megatron scales RoPE by 8 whatever --rope-scaling-factor says; the run itself does not."
        )
    if "--exit-on-missing-checkpoint" in values and "--no-load-optim" not in values:
        found.append(
            "Megatron loads Adam's state wrongly without Transformer Engine or Apex; the run does not."
        )
    return found
