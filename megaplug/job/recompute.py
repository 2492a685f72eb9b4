"""What the keys of recomputation mean where some of them are left open."""

from __future__ import annotations

from megaplug.job.schema import TrainConfig


def granularity(train: TrainConfig) -> str | None:
    """``full``, ``selective`` or None; modules alone mean ``selective``."""
    if train.recompute_granularity is None and train.recompute_modules:
        return "selective"
    return train.recompute_granularity


def method_and_layers(train: TrainConfig) -> tuple[str | None, int | None]:
    """How full recomputation goes through the layers: ``uniform`` by one layer where nothing is said."""
    if granularity(train) != "full":
        return None, None
    return train.recompute_method or "uniform", train.recompute_num_layers or 1
