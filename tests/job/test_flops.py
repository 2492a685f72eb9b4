"""FLOPs of a step by hand, and the peaks that they are measured against."""

from __future__ import annotations

import dataclasses

import pytest
from job_factory import small_job

from megaplug.job.checks import job_shape
from megaplug.job.flops import forward_flops_per_token, training_flops_per_token
from megaplug.job.gpus import peak_tflops


def test_llama3_8b_by_hand() -> None:
    """Queries and output 2 x 4096 x 4096, keys and values 2 x 4096 x 1024, MLP 3 x 4096 x 14336."""
    shape = job_shape(small_job("model=llama3_8b"), 128256)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    linear = 32 * layer + 128256 * 4096
    scores = 32 * 2 * 4096 * (8192 + 1) / 2
    assert shape.seq_length == 8192
    found = training_flops_per_token(shape, vocab_size=128256)
    assert found == 6 * (linear + scores)
    square = training_flops_per_token(shape, vocab_size=128256, causal=False)
    assert square / found == pytest.approx(1.125, abs=0.001)


def test_only_the_experts_that_a_token_visits_count() -> None:
    words = ["moe=small", "moe.num_experts=8", "moe.moe_router_topk=2", "moe.moe_ffn_hidden_size=512"]
    layers = ["moe.moe_layer_freq='[0,1,0,1]'", "moe.moe_shared_expert_intermediate_size=128"]
    shape = job_shape(small_job(*words, *layers), 257)
    attention = 256 * (256 + 2 * 64) + 256 * 256 + 2 * 256 * 257 / 2
    expert_layer = 3 * 256 * 2 * 512 + 3 * 256 * 128 + 256 * 8
    by_hand = 4 * attention + 2 * (3 * 256 * 688) + 2 * expert_layer + 256 * 384
    assert forward_flops_per_token(shape, vocab_size=384) == 2 * by_hand


def test_latent_attention_goes_through_its_latents() -> None:
    """Hidden 256, 8 heads with 32 + 16 channels of keys and 24 of values, latents of 96 and 64."""
    sizes = {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16}
    shape = dataclasses.replace(
        job_shape(small_job(), 257), multi_latent_attention=True, v_head_dim=24, **sizes
    )
    queries = 256 * 96 + 96 * 8 * 48
    keys_values = 256 * (64 + 16) + 64 * 8 * (32 + 24)
    attention = queries + keys_values + 8 * 24 * 256 + (257 / 2) * 8 * (48 + 24)
    by_hand = 4 * (attention + 3 * 256 * 688) + 256 * 384
    assert forward_flops_per_token(shape, vocab_size=384) == 2 * by_hand


@pytest.mark.parametrize(
    ("name", "half", "fp32"),
    [
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.4, 51.2),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA A1000", None, None),
        ("cpu", None, None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, half: float | None, fp32: float | None) -> None:
    assert peak_tflops(name, half=True) == half
    assert peak_tflops(name, half=False) == fp32
