from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_texts import some_text

from megaplug.job.schema import Job


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Twelve .txt files in two folders, and a .jsonl of eight lines."""
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    for i in range(12):
        (root / ("deep" if i % 2 else ".") / f"doc{i:02}.txt").write_text(some_text(i), encoding="utf-8")
    with (root / "more.jsonl").open("w", encoding="utf-8") as stream:
        for i in range(12, 20):
            stream.write(json.dumps({"text": some_text(i), "id": i}) + "\n")
    return root


@pytest.fixture
def make_job(tmp_path: Path):
    def make(path: Path | str, **data: object) -> Job:
        job = Job()
        job.data.path = str(path)
        job.data.cache_dir = str(tmp_path / "cache")
        for key, value in data.items():
            setattr(job.data, key, value)
        return job

    return make


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory) -> Path:
    """A small byte-level BPE with a template that begins every text, as published models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([some_text(i) for i in range(40)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(8)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
