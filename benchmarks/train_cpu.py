"""Tokens/s of a training step on a CPU: megaplug, Hugging Face with torch's AdamW, Megatron's local spec.

    python benchmarks/train_cpu.py [--models tiny tiny_llama3_50m] [--precisions fp32 bf16] [--json FILE]

A step is forward, backward, clipping and AdamW over one global batch in micro-batches of equal size;
megaplug's is Megatron's own ``train_step`` inside ``pretrain()``, as a run of ours has it, data loader
included, in the environment that our launcher gives a rank. The local spec runs with the stand-in for CUDA
and nothing of what makes ours faster. The contenders are processes of equal threads that take turns of a few
steps, so that a busy machine hurts all alike; the first step of a turn is not timed, for it finds the caches
full of another's numbers, as no step in training does. A ratio is the median over the rounds of (peer's
seconds / megaplug's seconds), with a 95 % interval of that median from order statistics (distribution-free).

In bf16 Megatron keeps bf16 weights, fp32 gradients and fp32 master weights with fp32 Adam state.
``huggingface_master`` does the same by hand (gradients are summed in bf16 over micro-batches, which is less);
``huggingface_autocast`` keeps fp32 weights and computes matrix products in bf16; ``huggingface_pure`` has
everything in bf16, the optimizer too, which trains worse and does less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from measure import environment, median

ROOT = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).with_name("train_cpu_workers.py")
PEERS = {
    "fp32": ["huggingface_fp32", "local"],
    "bf16": ["huggingface_master", "huggingface_autocast", "huggingface_pure", "local"],
}
# The size that a model's name promises is counted with this vocabulary; the default model has bytes.
VOCABULARY = {"tiny_llama3_50m": ["model.vocab_size=32000"]}


class Contender:
    """A worker process that takes one step at a time."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        from megaplug.launchers.heap import keeping_freed_memory

        self.name = name
        self.log = Path(settings["folder"]) / f"{name}.log"
        command = [sys.executable, str(WORKERS), name, json.dumps(settings)]
        # A group of its own, which it ends as a whole.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            # Before torch is imported, or they would be as many as the machine has cores.
            env=os.environ
            | {"OMP_NUM_THREADS": str(settings["threads"])}
            | (keeping_freed_memory(os.environ) if name == "megaplug" else {}),
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders: IO[str] = self.process.stdin
        self.answers: IO[str] = self.process.stdout

    def turn(self, steps: int, clock: str) -> float:
        """Seconds of a step, the mean of so many after one that is not timed.

        Args:
            steps: That are timed.
            clock: The ``wall`` or the ``cpu``.

        Raises:
            RuntimeError: The worker died; with the end of its log.
        """
        self.step(clock)
        return sum(self.step(clock) for _ in range(steps)) / steps

    def step(self, clock: str) -> float:
        """Seconds of one step."""
        self.orders.write("step\n")
        self.orders.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError(f"{self.name} died:\n{self.log.read_text(errors='replace')[-3000:]}")
        wall, cpu, loss = map(float, answer.split())
        assert math.isfinite(loss), f"{self.name}: loss {loss}"
        return cpu if clock == "cpu" else wall

    def end(self) -> None:
        """Close its input, on which it ends."""
        self.orders.close()
        self.process.wait()


def frozen_job(model: str, precision: str, threads: int, folder: Path) -> dict[str, Any]:
    """Freeze a run of ours and say what the workers need to know of it."""
    from megaplug.commands.readiness import make_ready, open_folder
    from megaplug.commands.resolved import resolve
    from megaplug.job.compose import compose_job

    places = [f"runs_dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"]
    # A schedule that no benchmark reaches the end of, and no validation in between.
    length = ["train.iters=100000", "train.eval_iters=0", "lr=constant", "checkpoint.save_interval=100000"]
    words = [f"model={model}", f"precision={precision}", f"data.path={_text(folder)}", "device=cpu"]
    job = compose_job([*words, *places, *length, *VOCABULARY.get(model, [])])
    resolved = resolve(job, on_this_machine=False)
    run_folder = open_folder(resolved)
    make_ready(resolved, run_folder)
    sizes = {key: getattr(job.model, key) for key in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "seq_length", "norm_epsilon", "rotary_base",
    )}  # fmt: skip
    return {
        "job_file": str(run_folder.job_file.resolve()),
        "folder": str(folder),
        "model": sizes,
        "padded_vocab_size": resolved.derived.padded_vocab_size,
        "parameters": resolved.parameters,
        "micro_batch_size": job.train.micro_batch_size,
        "global_batch_size": job.train.global_batch_size,
        "threads": threads,
    }


def _text(folder: Path) -> Path:
    """A text of a few hundred kilobytes: sources of the standard library that every Python has."""
    import asyncio

    text = folder / "text"
    text.mkdir(exist_ok=True)
    for source in sorted(Path(asyncio.__file__).parent.glob("*.py")):
        (text / f"{source.stem}.txt").write_text(source.read_text())
    return text


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median: the k-th values from either end, k from the binomial distribution."""
    n, ordered = len(values), sorted(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def measure(model: str, precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds of a turn each, and what they say."""
    settings = frozen_job(model, precision, options.threads, folder)
    peers = [peer for peer in PEERS[precision] if not options.peers or peer in options.peers]
    contenders = [Contender(name, settings) for name in ["megaplug", *peers]]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    try:
        for contender in contenders:
            for _ in range(options.warm_up):
                contender.step(options.clock)
        for number in range(options.rounds):
            # Every second round backwards, so that none always runs behind the same one.
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                seconds[contender.name].append(contender.turn(options.steps, options.clock))
    finally:
        for contender in contenders:
            contender.end()
    tokens = settings["global_batch_size"] * settings["model"]["seq_length"]
    ratios = {}
    for peer in peers:
        pairs = [theirs / ours for theirs, ours in zip(seconds[peer], seconds["megaplug"], strict=True)]
        ratios[peer] = {"median": median(pairs), "interval_95": median_interval(pairs)}
    return {
        "parameters": settings["parameters"],
        "tokens_per_step": tokens,
        "median_s": {name: median(values) for name, values in seconds.items()},
        "tokens_per_s": {name: tokens / median(values) for name, values in seconds.items()},
        "megaplug_over": ratios,
        "rounds": options.rounds,
        "steps_of_a_turn": options.steps,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print one model in one precision."""
    print(f"{name}: {result['parameters']:,} parameters, {result['tokens_per_step']:,} tokens a step")
    for contender, rate in result["tokens_per_s"].items():
        line = f"  {contender:22} {rate:10,.0f} tokens/s"
        if contender in result["megaplug_over"]:
            ratio = result["megaplug_over"][contender]
            low, high = ratio["interval_95"]
            line += f"   megaplug is {ratio['median']:.2f}x ({low:.2f} to {high:.2f})"
        print(line, flush=True)


def main() -> None:
    """Measure every model in every precision, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny_llama3_50m"])
    parser.add_argument("--precisions", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peers", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=3, help="of a turn, that are timed")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=_usable_cpus())
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of the threads, for a busy machine; with --threads 1 the time of a quiet one",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results = {}
    for model in options.models:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as folder:
                name = f"{model} {precision}"
                results[name] = measure(model, precision, options, Path(folder))
                show(name, results[name])
    if options.json:
        content = {
            "what": "a whole training step, contenders in turns; tokens/s and ratios of seconds, measured",
            "machine": environment("cpu") | {"threads": options.threads, "clock": options.clock},
            "peer_versions": _versions(),
            "results": results,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"transformers": version("transformers")}


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
