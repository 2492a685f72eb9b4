"""Delays, allocations and independent counts, put into running ranks to check what they report."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch

ALLOCATED = 400 << 20
BATCH_DELAY_S = 0.2
CALL_DELAY_S = 0.1


def note(folder: str, **values: Any) -> None:
    """Append a line that the test reads."""
    with (Path(folder) / f"known{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def noted(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"known{rank}.jsonl").read_text().splitlines()]


def count_and_compute(folder: str) -> None:
    """FLOPs by torch's counter, norms by hand, memory by psutil, time by the wall, of each step."""
    from megatron.training import training
    from torch.utils.flop_counter import FlopCounterMode

    real_step = training.train_step

    def train_step(
        forward_step: Any, iterator: Any, model: Any, optimizer: Any, *args: Any, **more: Any
    ) -> Any:
        grad_norms = []
        real_update = optimizer.step

        def step() -> Any:
            squares = [p.main_grad.double().square().sum() for p in model[0].parameters()]
            grad_norms.append(math.sqrt(sum(squares)))
            return real_update()

        optimizer.step = step
        resident = psutil.Process().memory_info().rss
        if more["iteration"] == 1:
            block = torch.ones(ALLOCATED, dtype=torch.uint8)
            resident = psutil.Process().memory_info().rss
            del block
        with FlopCounterMode(display=False) as counter:
            answer = real_step(forward_step, iterator, model, optimizer, *args, **more)
        optimizer.step = real_update
        note(
            folder,
            flops=counter.get_total_flops(),
            grad_norm=grad_norms[0],
            params_norm=math.sqrt(sum(p.detach().double().square().sum() for p in model[0].parameters())),
            resident=resident,
            wall=time.time(),
        )
        return answer

    training.train_step = train_step


def rank_1_waits_for_its_data() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    real = GPTDataset.__getitem__

    def getitem(self: Any, index: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(BATCH_DELAY_S)
        return real(self, index)

    GPTDataset.__getitem__ = getitem


def slow_network_of_tensor_parallelism(folder: str) -> None:
    """Every sum over a tensor-parallel group takes longer by a known time; counted for each step."""
    from megatron.training import training

    group_class: Any = torch.distributed.ProcessGroup
    real_sum, real_step = group_class.allreduce, training.train_step
    calls = []

    def allreduce(group: Any, *args: Any, **kwargs: Any) -> Any:
        if group.group_desc == "TENSOR_MODEL_PARALLEL_GROUP":
            calls.append(1)
            time.sleep(CALL_DELAY_S)
        return real_sum(group, *args, **kwargs)

    def train_step(*args: Any, **kwargs: Any) -> Any:
        calls.clear()
        answer = real_step(*args, **kwargs)
        note(folder, calls=len(calls))
        return answer

    group_class.allreduce, training.train_step = allreduce, train_step
