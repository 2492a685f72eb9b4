"""How fast text becomes Megatron's .bin and .idx: on one core, on more, by a plain loop over its builder.

    python benchmarks/tokenizing.py [--megabytes 200] [--cores 2] [--json FILE]
    python benchmarks/tokenizing.py --tokenizer bpe --megabytes 20

Whole preparations of a .jsonl: reading it twice, tokenizing, shuffling, splitting, counting, writing. The
plain loop reads it once, in its own order, and is given its imports for nothing. ``byte`` counts what is
around the tokenizer; ``bpe`` is a byte-level BPE of 8,192 tokens, trained on the first of that text before,
which the plain loop asks of Hugging Face's tokenizers, one text at a time.
(A file called tokenize.py would hide Python's module of that name from everything beside it.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import alternate, environment, median

ROOT = Path(__file__).resolve().parent.parent

BPE_TOKENS = 8_192
BPE_SAMPLE = 5_000_000  # bytes

OURS = """
import os, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[3])])
from megaplug.data.prepare import prepare
from megaplug.job.schema import Job
job = Job()
job.data.path, job.data.cache_dir = sys.argv[1:3]
if len(sys.argv) > 4:
    job.tokenizer.type, job.tokenizer.path = "huggingface", sys.argv[4]
start = time.perf_counter()
prepare(job, show_progress=False)
print(time.perf_counter() - start)
"""

PLAIN = """
import json, os, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[3])])
import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
os.makedirs(sys.argv[2])

def as_bytes(text):
    ids = np.frombuffer(text.encode() + b"e", dtype=np.uint8).astype(np.uint16)
    ids[-1] = 256
    return ids

encode = as_bytes
if len(sys.argv) > 4:
    from tokenizers import Tokenizer
    bpe = Tokenizer.from_file(sys.argv[4] + "/tokenizer.json")
    eod = bpe.token_to_id("<|endoftext|>")
    encode = lambda text: np.array([*bpe.encode(text).ids, eod], dtype=np.uint16)
start = time.perf_counter()
builder = IndexedDatasetBuilder(sys.argv[2] + "/text.bin", dtype=np.uint16)
for line in open(sys.argv[1], "rb"):
    ids = encode(json.loads(line)["text"])
    builder.add_document(ids, [ids.size])
builder.finalize(sys.argv[2] + "/text.idx")
print(time.perf_counter() - start)
"""


def write_corpus(path: Path, size: int) -> int:
    """Pieces of the standard library of 0.5 to 6.5 kB, a line each; gives the bytes of the file."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in sources)
    written = number = 0
    with path.open("w") as stream:
        while written < size:
            length, start = 500 + number * 7919 % 6000, number * 104729 % (len(text) - 7000)
            written += stream.write(json.dumps({"text": f"{text[start : start + length]} {number}"}) + "\n")
            number += 1
    return path.stat().st_size


def train_bpe(folder: Path) -> Path:
    """The folder of a tokenizer of such text."""
    sample, trained = folder / "sample.jsonl", folder / "bpe"
    write_corpus(sample, BPE_SAMPLE)
    words = ["action=train_tokenizer", "data=text", f"data.path={sample}", f"vocab_size={BPE_TOKENS}"]
    command = [sys.executable, ROOT / "launch/prepare.py", *words, f"out={trained}"]
    subprocess.run(command, check=True, capture_output=True)
    return trained


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and MB/s of each contender; ratios are medians of neighbouring runs."""
    corpus = folder / "text.jsonl"
    megabytes = write_corpus(corpus, options.megabytes * 1_000_000) / 1e6
    bpe = [str(train_bpe(folder))] if options.tokenizer == "bpe" else []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds: dict[str, list[float]] = {}

    def run(name: str, script: str, cores: int) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            command = [sys.executable, "-c", script, str(corpus), f"{cache}/new", str(cores), *bpe]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        seconds.setdefault(name, []).append(float(done.stdout.split()[-1]))

    many = f"{options.cores} cores"
    contenders = {"1 core": (OURS, 1), many: (OURS, options.cores), "plain loop": (PLAIN, 1)}
    runs = {name: lambda name=name, c=c: run(name, *c) for name, c in contenders.items()}
    alternate(runs, options.repeats, "cpu")
    # The first round warms up.
    seconds = {name: values[1:] for name, values in seconds.items()}
    rates = {name: megabytes / median(values) for name, values in seconds.items()}
    pairs = {
        "speed-up": [a / b for a, b in zip(seconds["1 core"], seconds[many], strict=True)],
        "of the plain loop": [a / b for a, b in zip(seconds["plain loop"], seconds["1 core"], strict=True)],
    }
    return {
        "megabytes": round(megabytes, 1),
        "cores": options.cores,
        "seconds": seconds,
        "MB/s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratios": {
            name: {"median": median(values), "least": min(values), "most": max(values)}
            for name, values in pairs.items()
        },
        "load average before": list(options.load),
    }


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokenizer", choices=("byte", "bpe"), default="byte")
    options = parser.parse_args()
    options.load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    machine = environment("cpu")
    print(f"{machine['cpu']}, {results['megabytes']} MB of .jsonl, tokenizer {options.tokenizer} (measured)")
    for name, rate in results["MB/s"].items():
        print(f"{name:12} {rate:7.1f} MB/s")
    for name, of in results["ratios"].items():
        print(f"{name:18} {of['median']:.2f}x ({of['least']:.2f} to {of['most']:.2f})")
    if options.json:
        report = {
            "what": f"preparing text, tokenizer {options.tokenizer}; wall seconds, measured",
            "machine": machine,
        }
        options.json.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
