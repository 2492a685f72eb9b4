"""Torch's Adam steps in its fused kernel, whatever it was built or loaded with."""

from __future__ import annotations

import copy

import pytest
import torch

from megaplug.runtime import fused_adam


@pytest.fixture
def installed():
    handle = fused_adam.install()
    yield
    handle.remove()


def trained(steps, optimizer_class=torch.optim.AdamW, **options):
    weight = torch.linspace(-1, 1, 12).requires_grad_()
    optimizer = optimizer_class([weight], lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        weight.grad = torch.sin(weight.detach() * (step + 3))
        optimizer.step()
    return weight, optimizer


def calls_of_the_fused_kernel(work):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::_fused_adamw_")


def test_adam_as_megatron_builds_it_steps_in_the_fused_kernel(installed):
    assert calls_of_the_fused_kernel(lambda: trained(3)) == 3


def test_without_the_hook_it_does_not():
    assert calls_of_the_fused_kernel(lambda: trained(3)) == 0


def test_its_steps_are_those_of_adam(installed):
    fused, _ = trained(5)
    exact, _ = trained(5, foreach=False, differentiable=False, fused=True)
    assert torch.equal(fused, exact)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_the_unfused_kernel_gives_the_same_within_roundings(optimizer_class):
    plain, _ = trained(5, optimizer_class)
    handle = fused_adam.install()
    fused, _ = trained(5, optimizer_class)
    handle.remove()
    # Five steps of a few roundings each, of weights up to 1.
    torch.testing.assert_close(fused, plain, rtol=0, atol=5e-7)


def test_state_and_groups_of_an_unfused_run_are_taken_over():
    weight, optimizer = trained(2)
    saved, value = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    assert not saved["param_groups"][0]["fused"]
    handle = fused_adam.install()
    loaded = torch.optim.AdamW([value.requires_grad_()], lr=1e-2, weight_decay=0.1)
    loaded.load_state_dict(saved)
    value.grad = torch.sin(value.detach() * 5)
    assert calls_of_the_fused_kernel(loaded.step) == 1
    handle.remove()
    assert float(loaded.state[value]["step"]) == 3
    wanted, _ = trained(3)
    torch.testing.assert_close(value, wanted, rtol=0, atol=5e-7)


def test_an_optimizer_of_another_kind_is_left_alone(installed):
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.param_groups[0]["fused"]


def test_a_count_that_was_loaded_onto_another_device_comes_to_the_weights(installed):
    weight, optimizer = trained(2)
    assert optimizer.param_groups[0]["fused"]
    elsewhere = torch.empty((), device="meta")
    optimizer.state[weight]["step"] = elsewhere
    moved = []
    elsewhere.to = lambda device: moved.append(device) or torch.tensor(2.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert moved == [weight.device]
    assert optimizer.state[weight]["step"] == 3
