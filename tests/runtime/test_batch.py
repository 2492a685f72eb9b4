"""What Megatron's arguments say of the data reaches its data sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megaplug.job.compose import compose_job
from megaplug.job.passthrough import passthrough_problems
from megaplug.runtime import batch

ARGUMENTS = {
    "seed": 5,
    "seq_length": 16,
    "split": None,
    "num_dataset_builder_threads": 1,
    "data_cache_path": None,
    "mmap_bin_files": True,
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "eod_mask_loss": False,
    "create_attention_mask_in_dataloader": False,
    "mid_level_dataset_surplus": 0.25,
}


def test_the_surplus_that_is_passed_through_reaches_the_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Builder:
        def __init__(self, *_: Any) -> None: ...

        def build(self) -> tuple[None, None, None]:
            return None, None, None

    monkeypatch.setattr(batch, "get_args", lambda: SimpleNamespace(**ARGUMENTS))
    monkeypatch.setattr(batch, "get_tokenizer", lambda: None)
    monkeypatch.setattr(batch, "get_blend_and_blend_per_split", lambda _: (None, None))
    monkeypatch.setattr(batch, "GPTDatasetConfig", lambda **values: told.update(values))
    monkeypatch.setattr(batch, "BlendedMegatronDatasetBuilder", Builder)
    batch.build_datasets([1, 1, 1])
    assert passthrough_problems(compose_job(["megatron.mid_level_dataset_surplus=0.25"])) == []
    assert told["mid_level_dataset_surplus"] == 0.25
