"""What is composed, and that nothing is composed for nothing."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult, ConfigSource

from megaplug.job.compose import compose_config, conf_dir

WORDS = ["model=mixtral_8x7b", "topology.tp=2", "train=pretrain", "++megatron.decoupled_lr=1e-3"]


def test_hydras_own_settings_are_left_out_and_the_job_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = compose_config(WORDS)
    source = SourcesRegistry.instance().resolve("pkg")
    read, load = [], source.load_config

    def noted(self: ConfigSource, config_path: str) -> ConfigResult:
        read.append(config_path)
        return load(self, config_path)

    monkeypatch.setattr(source, "load_config", noted)
    assert compose_config(WORDS) == ours
    assert read == []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydras = compose("train", overrides=WORDS)
    assert ours == hydras
    assert "hydra/output/default" in read
