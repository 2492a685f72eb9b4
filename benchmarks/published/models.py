"""The models of the tables as our presets have them, and why some are not among them."""

from __future__ import annotations

import dataclasses
from functools import cache

from megaplug.job.checks import job_shape
from megaplug.job.compose import compose_job
from megaplug.topology import ModelShape

# What the tables write, without the notes in parentheses behind it, and the preset that it is.
PRESETS = {
    "GPT3-5B": "gpt3_5b",
    "GPT3-20B": "gpt3_20b",
    "GPT3-175B": "gpt3_175b",
    "LLAMA2-7B": "llama2_7b",
    "LLAMA2-13B": "llama2_13b",
    "LLAMA2-70B": "llama2_70b",
    "Nemotron-8B": "nemotron3_8b",
    "Nemotron-22B": "nemotron3_22b",
    "Nemotron-340B": "nemotron4_340b",
    "LLAMA3-8B": "llama3_8b",
    "LLAMA3-70B": "llama3_70b",
    "LLAMA3_8B": "llama3_8b",
    "LLAMA3_70B": "llama3_70b",
    "LLAMA3.1_405B": "llama3_1_405b",
    "DeepSeekV3": "deepseek_v3",
    "GPT OSS 120B": "gpt_oss_120b",
    "Qwen3_30B_a3B": "qwen3_30b_a3b",
    "Qwen3_235B_a22B": "qwen3_235b_a22b",
    "Kimi_K2": "kimi_k2",
}
HYBRID = "layers of state-space models (Mamba) between attention layers: no such model is shipped"
NOT_SHIPPED = {"Nemotron_3_Nano": HYBRID, "Nemotron_3_Super": HYBRID}


@cache
def shape_of(model: str, seq_length: int) -> ModelShape:
    """The sizes of a table's model, from our preset, at a sequence length."""
    preset = job_shape(compose_job([f"model={PRESETS[model]}"]))
    return dataclasses.replace(preset, seq_length=seq_length)
