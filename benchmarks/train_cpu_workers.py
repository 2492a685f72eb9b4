"""The contenders of ``train_cpu.py``: each lives in a process of its own and takes a step when it is told to.

A process of its own, since megaplug's stand-in for CUDA changes torch for the whole process. A line on
standard input is one step; the answer is a line with its seconds (wall, CPU) and its loss. What else a
library prints goes to a log.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

WEIGHT_DECAY, BETAS, EPS, CLIP, LR = 0.1, (0.9, 0.95), 1e-8, 1.0, 1e-3


def main() -> None:
    """``train_cpu_workers.py <contender> <settings as JSON>``."""
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    answers = _answers_alone(Path(settings["folder"]) / f"{name}.log")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if name.startswith("huggingface"):
        step = huggingface_step(name.removeprefix("huggingface_"), settings)
        while sys.stdin.readline():
            _answer(answers, step)
    else:
        run_megatron(name, settings, answers)


def _answers_alone(log: Path) -> TextIO:
    """The true standard output, which from here on nothing else writes to."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return answers


def _answer(answers: TextIO, step: Callable[[], float]) -> None:
    with _Clocks() as clocks:
        loss = step()
    print(*clocks.seconds, loss, file=answers, flush=True)


class _Clocks:
    """Seconds of a ``with`` block: on the wall, and of this process's threads."""

    seconds: tuple[float, float]

    def __enter__(self) -> _Clocks:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def huggingface_step(regime: str, settings: dict[str, Any]) -> Callable[[], float]:
    """One step of ``LlamaForCausalLM`` with SDPA, clipping and torch's fused AdamW.

    Args:
        regime: ``fp32``; ``master`` (bf16 model, fp32 master weights and optimizer, as Megatron does it),
            ``autocast`` (fp32 model, bf16 matrix products) or ``pure`` (all in bf16, the optimizer too).
        settings: Sizes, as the orchestrator found them in the job.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = settings["model"]
    config = LlamaConfig(
        vocab_size=settings["padded_vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        max_position_embeddings=sizes["seq_length"],
        rms_norm_eps=sizes["norm_epsilon"],
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": float(sizes["rotary_base"])},
    )
    model = LlamaForCausalLM(config).to(torch.float32 if regime in ("fp32", "autocast") else torch.bfloat16)
    model.train()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == settings["parameters"], (count, settings["parameters"])
    weights = list(model.parameters())
    masters = [w.detach().float().requires_grad_() for w in weights] if regime == "master" else weights
    optimizer = torch.optim.AdamW(masters, LR, BETAS, EPS, WEIGHT_DECAY, fused=True)
    rows, micro = settings["global_batch_size"], settings["micro_batch_size"]
    autocast = torch.autocast("cpu", torch.bfloat16) if regime == "autocast" else nullcontext()
    batches = _random_batches(settings)

    def step() -> float:
        batch = next(batches)
        total = 0.0
        for part in batch.split(micro):
            with autocast:
                loss = model(input_ids=part, labels=part).loss * (micro / rows)
            loss.backward()
            total += loss.item()
        if regime == "master":
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if regime == "master":
            torch._foreach_copy_([w.data for w in weights], [m.data for m in masters])
        return total

    return step


def _random_batches(settings: dict[str, Any]) -> Iterator[torch.Tensor]:
    """``[global batch, sequence]`` random tokens: what they say does not change the time."""
    shape = (settings["global_batch_size"], settings["model"]["seq_length"])
    while True:
        yield torch.randint(256, shape)


def run_megatron(name: str, settings: dict[str, Any], answers: TextIO) -> None:
    """Megatron's own ``pretrain()`` over a frozen job, each ``train_step`` when it is told to.

    Args:
        name: ``megaplug``, a run of ours as it is, or ``local``: Megatron's own local spec, nothing of ours.
        settings: Where the frozen job is.
        answers: Where the seconds go.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    from megaplug.runtime import cpu, fused_adam
    from megaplug.runtime.pretrain import run

    if name == "local":
        fused_adam.install = lambda: None  # type: ignore[assignment,return-value]
        cpu._install_lone_ranks = lambda: None

    def plant() -> None:
        from megatron.training import training

        real = training.train_step

        def told(*args: Any, **kwargs: Any) -> Any:
            if not sys.stdin.readline():
                # Nothing of the run is wanted; with it end the processes that Megatron saves with.
                os.killpg(0, signal.SIGKILL)
            with _Clocks() as clocks:
                outcome = real(*args, **kwargs)
            print(*clocks.seconds, float(outcome[0]["lm loss"]), file=answers, flush=True)
            return outcome

        training.train_step = told
        if name == "local":
            _use_local_spec()

    run(Path(settings["job_file"]), plant=plant)


def _use_local_spec() -> None:
    """Megatron's layers, as ``pretrain_gpt.py --transformer-impl local`` has them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megaplug.layers import spec
    from megaplug.runtime import batch

    def build(config: Any, vp_stage: int | None = None) -> Any:
        transformer = getattr(config, "transformer", config)
        return get_gpt_decoder_block_spec(transformer, use_transformer_engine=False, vp_stage=vp_stage)

    spec.transformer_layer_spec = lambda *args: build  # type: ignore[assignment]
    batch.end_of_model = lambda chunk: None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
