"""Asks torch in a process of its own: ``python -m megaplug.plan.doctor.probe`` prints one JSON object a line.

The answers come in stages (torch, Transformer Engine, gloo), so that when one of them crashes or hangs,
those before it are still heard.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

# torch takes 3 s to import from a warm disk; a cold network disk has taken a minute.
PROBE_LIMIT_S = 120.0
STAGES = ("torch", "transformer_engine", "gloo")


def ask_torch(limit_s: float = PROBE_LIMIT_S) -> dict[str, Any]:
    """Runs the stages in another process.

    Args:
        limit_s: Seconds after which it is killed.

    Returns:
        By stage what was answered, ``{"error": ..., "kind": ...}`` where a stage failed. A stage that
        never answered because the process died or hung says so in the same form; those after it are left out.
    """
    command = [sys.executable, "-m", "megaplug.plan.doctor.probe"]
    # megaplug may be on this process's path only, and not be installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
        end = f"the process ended with {process.returncode}: {last_line(err)}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        end = f"no answer within {limit_s:g} s"
    answers: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("{"):
            answers.update(json.loads(line))
    missing = [stage for stage in STAGES if stage not in answers]
    if missing:
        answers[missing[0]] = {"error": end, "kind": "Silence"}
    return answers


def last_line(text: str) -> str:
    """The last line that is not empty, shortened to 300 characters; of a traceback that is what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda_runtime": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "gpus": [],
    }
    if facts["cuda"]:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = f"{properties.major}.{properties.minor}"
            facts["gpus"].append(
                {"name": properties.name, "total": total, "free": free, "capability": capability}
            )
    return facts


def _transformer_engine() -> dict[str, Any]:
    if importlib.util.find_spec("transformer_engine") is None:
        return {"version": None}
    import transformer_engine.pytorch

    return {"version": transformer_engine.__version__}


def _gloo() -> dict[str, Any]:
    """Stands up a group of one rank and reduces over it; gloo opens its network device for that."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    # A real store on a real port, as a run has it: a machine that refuses local sockets is found out here.
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    total = torch.ones(2)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"reduced": total.tolist()}


def _answer() -> None:
    for stage, ask in zip(STAGES, (_torch, _transformer_engine, _gloo), strict=True):
        try:
            answer = ask()
        # Whatever a broken installation throws is the answer that was asked for.
        except Exception as fault:  # noqa: BLE001
            answer = {"error": last_line(str(fault)), "kind": type(fault).__name__}
        print(json.dumps({stage: answer}), flush=True)


if __name__ == "__main__":
    _answer()
