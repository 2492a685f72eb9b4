"""Jobs, data facts and folders for the tests of this room; nothing is read or written."""

from __future__ import annotations

from pathlib import Path

from megaplug.job.checks import check, resolve_topology
from megaplug.job.compose import compose_job
from megaplug.job.derive import Derived, derive
from megaplug.job.facts import DataFacts
from megaplug.job.schema import Job
from megaplug.runs.folder import RunFolder
from megaplug.topology import Topology

# Sizes that stay as they are when the shipped defaults are tuned.
MODEL = [
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.ffn_hidden_size=688",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.seq_length=256",
]
TRAIN = ["train.iters=300", "train.micro_batch_size=4", "train.global_batch_size=16", "lr.lr=1e-3"]


def small_job(*words: str) -> Job:
    """A job of known sizes, changed by ``words``."""
    model = [] if any(word.startswith("model=") for word in words) else MODEL
    return compose_job([*model, *TRAIN, *words])


def data_facts(num_tokens: int = 1_000_000, vocab_size: int = 257, **changes: object) -> DataFacts:
    """A byte-level corpus with training and validation text."""
    values: dict[str, object] = {
        "fingerprint": "f" * 32,
        "prefixes": {"train": "/data/train", "valid": "/data/valid"},
        "num_tokens": {"train": num_tokens, "valid": num_tokens // 20, "test": 0},
        "num_documents": {"train": 100, "valid": 5, "test": 0},
        "vocab_size": vocab_size,
        "unigram_loss": 3.2,
        "source": "a test",
        "eod": vocab_size - 1,
        "tokenizer_fingerprint": "bytes",
        "tokenizer_arguments": ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)],
    }
    return DataFacts(**{**values, **changes})  # type: ignore[arg-type]


def resolved(
    *words: str, device: str = "cpu", facts: DataFacts | None = None
) -> tuple[Job, Topology, Derived, DataFacts]:
    """A checked job with what follows from it."""
    job = small_job(*words)
    problems = check(job)
    assert problems == [], problems
    facts = facts or data_facts()
    topology = resolve_topology(job)
    backend = None if job.backend != "auto" else "native"
    return job, topology, derive(job, topology, facts, device=device, backend=backend), facts


FOLDER = RunFolder(Path("/runs/tiny-00000000"))
