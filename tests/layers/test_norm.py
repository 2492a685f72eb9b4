from __future__ import annotations

import pytest
import torch

from megaplug.errors import UserError
from megaplug.layers.norm import LayerNorm, RMSNorm


def run(norm, x, grad):
    x = x.detach().requires_grad_()
    out = norm(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(parameter.grad for parameter in norm.parameters())]


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return (3 * torch.randn(16, 2, 64)).to(dtype), torch.randn(16, 2, 64).to(dtype)


def randomise(norm):
    torch.manual_seed(1)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, std=0.3)


def test_rms_norm_equals_hugging_faces_llama_norm_with_its_gradients(config):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(config(), 64, eps=1e-3), LlamaRMSNorm(64, eps=1e-3)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    for found, wanted in zip(run(ours, *inputs()), run(theirs, *inputs()), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torchs_in_every_dtype_and_keeps_it(config, dtype):
    ours, theirs = RMSNorm(config(), 64).to(dtype), torch.nn.RMSNorm(64, eps=1e-5).to(dtype)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, wanted in zip(run(ours, *inputs(dtype)), run(theirs, *inputs(dtype)), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_bf16_is_normalised_and_scaled_in_fp32_and_rounded_once(config):
    norm = RMSNorm(config(), 64)
    randomise(norm)
    norm.bfloat16()
    x, _ = inputs(torch.bfloat16)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    differing = (norm(x) != (wide * norm.weight.float()).bfloat16()).float().mean()
    assert differing < 1e-3  # the order of a sum in fp32 may move a value over a rounding edge


def test_rms_norm_passes_a_numerical_check_of_its_gradients(config):
    norm = RMSNorm(config(), 6).double()
    randomise(norm)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight)
    )


def test_layer_norm_equals_torchs(config):
    ours, theirs = LayerNorm(config(), 64, eps=1e-3), torch.nn.LayerNorm(64, eps=1e-3)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    for found, wanted in zip(run(ours, *inputs()), run(theirs, *inputs()), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_weights_are_marked_for_megatrons_gradient_sum_exactly_under_sequence_parallelism(config, kind):
    for sequence_parallel in (False, True):
        norm = kind(config(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel), 64)
        assert [p.sequence_parallel for p in norm.parameters()] == [sequence_parallel] * len(
            list(norm.parameters())
        )


def test_weights_have_the_dtype_of_the_configs_parameters(config):
    assert RMSNorm(config(params_dtype=torch.bfloat16), 64).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["layernorm_zero_centered_gamma", "memory_efficient_layer_norm"])
def test_options_of_other_backends_are_refused_by_name(config, option):
    with pytest.raises(UserError, match=option):
        RMSNorm(config(**{option: True}), 64)
