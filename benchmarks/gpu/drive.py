"""Runs the steps one after the other, each in its own processes and its own time, and says what came of them.

A step is a script beside this file. It writes its figures itself; a line ``SKIPPED what: why`` that it
prints is kept for the end. A step that fails or takes too long does not stop the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
# Eight minutes, less what unpacking the wheels and the last kill may take.
BUDGET_S = 455.0
# A step is not begun for less than this.
LEAST_S = 5.0
# What a step that is told to end has before it is killed.
_GRACE_S = 2.0


@dataclass(frozen=True)
class Step:
    """One script.

    Attributes:
        name: What it is called in the report.
        command: Its words after the interpreter.
        limit_s: Longest time that it may take.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass
class Outcome:
    """What came of a step: ``passed``, ``failed``, ``out of time`` or ``not begun``."""

    name: str
    status: str
    seconds: float = 0.0
    exit_code: int | None = None
    skipped: list[str] = field(default_factory=list)


def steps(options: Sequence[str], device: str, rehearse: bool) -> list[Step]:
    """All steps in their order.

    Args:
        options: What every script beside this one takes.
        device: ``cuda``, or ``cpu`` in a rehearsal.
        rehearse: Tiny sizes.
    """
    shape = ["--heads", "8", "--kv-heads", "2"] if rehearse else ["--heads", "32", "--kv-heads", "8"]
    # 4,096 tokens: what is compared with keeps every score in fp64.
    attention = [
        "--seq-length",
        "128" if rehearse else "4096",
        "--head-dim",
        "16" if rehearse else "128",
        *shape,
    ]
    dilated = [
        *("--seq-length", "512" if rehearse else "131072"),
        *("--segments", *(str((32 if rehearse else 8192) * 2**i) for i in range(5))),
        *("--rates", "1", "2", "4", "8", "16"),
        *("--head-dim", "16" if rehearse else "128"),
        *shape,
        *("--only", "sdpa", "sdpa flash", "ours", "ours flash", *([] if rehearse else ["ours triton"])),
    ]
    norm = ["--tokens", "64" if rehearse else "8192", "--hidden-size", "64" if rehearse else "4096"]
    experts = [
        *("--tokens", "64" if rehearse else "16384", "--hidden", "16" if rehearse else "2048"),
        *(
            "--width",
            "16" if rehearse else "1024",
            "--experts",
            "8" if rehearse else "64",
            "--dtypes",
            "bf16",
        ),
    ]
    others = ["--device", device, "--repeats", "3" if rehearse else "11", "--json"]

    # A rehearsal shares two cores with whatever else they do.
    patience = 4.0 if rehearse else 1.0

    def ours(name: str, limit_s: float) -> Step:
        return Step(name, (str(HERE / f"{name}.py"), *options), limit_s * patience)

    def other(name: str, *words: str) -> Step:
        return Step(
            name,
            (str(HERE.parent / f"{name}.py"), *words, *others, f"{{results}}/{name}_{{gpu}}.json"),
            70 * patience,
        )

    return [
        # What matters most comes first: the last may not be begun.
        ours("environment", 60),
        ours("cuda_parity", 100),
        ours("block_kernels", 40),
        other("dilated_attention", *dilated, "--dtype", "bf16"),
        ours("longest_sequence", 60),
        ours("one_rank_share", 75),
        ours("step_time", 200),
        ours("attention_kernels", 45),
        ours("run_parity_cases", 150),
        ours("resume", 90),
        other("attention", *attention, "--dtype", "bf16"),
        other("experts", *experts),
        other("norm", *norm),
    ]


def run_step(step: Step, left_s: float, log: Path) -> Outcome:
    """Run one step in a process group of its own, show its output, and end all of it when its time is up."""
    limit = min(step.limit_s, left_s)
    if limit < LEAST_S:
        return Outcome(step.name, "not begun")
    print(f"\n==> {step.name} (at most {limit:.0f} s)", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=_show, args=(process, lines), daemon=True)
    reader.start()
    status = ""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        # What the step itself has left running goes with it; also when a person ends the driver.
        _end_group(process)
    reader.join(_GRACE_S)
    log.write_text("".join(lines))
    status = status or ("passed" if process.returncode == 0 else "failed")
    skipped = [line.removeprefix("SKIPPED ").strip() for line in lines if line.startswith("SKIPPED ")]
    return Outcome(step.name, status, round(time.monotonic() - started, 1), process.returncode, skipped)


def _show(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        print(f"    {line}", end="", flush=True)


def _end_group(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def run_all(chosen: Sequence[Step], budget_s: float, logs: Path) -> list[Outcome]:
    """Run all steps within a budget; one outcome a step, in their order."""
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    return [run_step(step, end - time.monotonic(), logs / f"{step.name}.log") for step in chosen]


def report(outcomes: Sequence[Outcome], file: Path, gpu: str) -> int:
    """Print and store what came of the steps; the exit code."""
    print(f"\n==> {gpu}, {sum(outcome.seconds for outcome in outcomes):.0f} s")
    for outcome in outcomes:
        print(f"  {outcome.name:<20} {outcome.status:<12} {outcome.seconds:6.1f} s")
    skipped = [f"{outcome.name}: {line}" for outcome in outcomes for line in outcome.skipped]
    skipped += [f"{outcome.name}: no time was left" for outcome in outcomes if outcome.status == "not begun"]
    print("  nothing was skipped" if not skipped else "  skipped:")
    for line in skipped:
        print(f"    {line}")
    content = {"gpu": gpu, "steps": [asdict(outcome) for outcome in outcomes], "skipped": skipped}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"  written to {file.parent}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


def gpu_name() -> str | None:
    """The first GPU as the driver calls it, or None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    words = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    names = done.stdout.strip().splitlines()
    return names[0].strip() if done.returncode == 0 and names else None


def leave_on_sigterm() -> None:
    """SIGTERM becomes an exit that ends the running step on its way."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main() -> int:
    """Parse, run, report."""
    leave_on_sigterm()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU, into a temporary folder"
    )
    parser.add_argument("--only", help="names of steps, with commas between them")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--results", type=Path, help="where the figures go")
    options = parser.parse_args()
    name = None if options.rehearse else gpu_name()
    if name is None and not options.rehearse:
        print(
            "error: no GPU here\n  hint: benchmarks/gpu.sh --rehearse shows that the scripts run",
            file=sys.stderr,
        )
        return 2
    gpu = re.sub(r"[^a-z0-9]+", "_", (name or "rehearsal").lower()).strip("_")
    with tempfile.TemporaryDirectory(prefix="megaplug-gpu-") as work:
        results = options.results or (
            Path(tempfile.mkdtemp(prefix="megaplug-rehearsal-")) if options.rehearse else RESULTS
        )
        results.mkdir(parents=True, exist_ok=True)
        words = [
            "--results",
            str(results),
            "--work",
            work,
            "--gpu",
            gpu,
            *(["--rehearse"] if options.rehearse else []),
        ]
        chosen = steps(words, "cpu" if options.rehearse else "cuda", options.rehearse)
        if options.only:
            known = {step.name for step in chosen}
            if unknown := set(options.only.split(",")) - known:
                print(
                    f"error: there is no step {', '.join(sorted(unknown))}; known: {', '.join(known)}",
                    file=sys.stderr,
                )
                return 2
            chosen = [step for step in chosen if step.name in options.only.split(",")]
        filled = [
            Step(
                step.name,
                tuple(
                    word.format(results=results, gpu=gpu) if "{" in word else word for word in step.command
                ),
                step.limit_s,
            )
            for step in chosen
        ]
        outcomes = run_all(
            filled, options.budget, results / f"logs_{gpu}" if options.rehearse else Path(work) / "logs"
        )
        return report(
            outcomes, results / f"gpu_{gpu}.json", name or "the CPU, standing in for a GPU: a rehearsal"
        )


if __name__ == "__main__":
    sys.exit(main())
