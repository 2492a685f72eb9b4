from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megaplug.errors import UserError
from megaplug.layers.attention.flash import FlashAttention, attend_groups_as_batch, fused_attention
from megaplug.layers.attention.torch_kernel import kernel_of


def make_flash(config, **changes):
    return FlashAttention(config, 1, AttnMaskType.causal, "self", **changes)


def tensors(s=64, b=2, h=8, g=2, d=8, dtype=torch.float32):
    """Query, key, value and an output gradient; K and V as views of a projection, as Megatron's are."""
    torch.manual_seed(0)
    q_SBHD = torch.randn(s, b, h, d, dtype=dtype)
    k_SBGD, v_SBGD = torch.randn(s, b, g, 2 * d, dtype=dtype).split(d, dim=3)
    return [q_SBHD, k_SBGD, v_SBGD], torch.randn(s, b, h * d, dtype=dtype)


def run(attention, inputs, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attention(*leaves, None)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def reference(inputs, grad, scale=None, causal=True):
    """Attention in fp64 written out, K and V repeated."""

    def attention(q, k, v, _):
        k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
        scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * (scale or q.size(3) ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones(q.size(0), k.size(0)).triu(1).bool(), -torch.inf)
        return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), v).flatten(2)

    return run(attention, [tensor.double() for tensor in inputs], grad.double())


def error(found, wanted):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_flash_and_its_gradients_equal_megatrons_local_attention_in_fp32(config, local_attention, groups):
    sizes = config(num_query_groups=groups)
    inputs, grad = tensors(g=groups)
    found = run(make_flash(sizes), inputs, grad)
    assert [tuple(x.shape) for x in found] == [
        (64, 2, 64),
        (64, 2, 8, 8),
        (64, 2, groups, 8),
        (64, 2, groups, 8),
    ]
    assert error(found, run(local_attention(sizes), inputs, grad)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.2)]
)
def test_flash_equals_attention_written_out_in_fp64(config, dtype, bound):
    inputs, grad = tensors(dtype=dtype)
    assert error(run(make_flash(config()), inputs, grad), reference(inputs, grad)) < bound


@pytest.mark.parametrize("size", [4, 12])
def test_heads_of_values_may_be_shorter_or_longer_than_those_of_keys(config, size):
    """As in latent attention: the scores do not change, and the output has the size of a value."""
    (q_SBHD, k_SBGD, _), _ = tensors()
    v_SBGD, grad = torch.randn(64, 2, 2, size), torch.randn(64, 2, 8 * size)
    found = run(make_flash(config(), k_channels=8, v_channels=size), [q_SBHD, k_SBGD, v_SBGD], grad)
    assert found[0].shape == grad.shape
    assert error(found, reference([q_SBHD, k_SBGD, v_SBGD], grad)) < 1e-5


class Padded(TorchDispatchMode):
    """Counts the tensors that are filled up."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.constant_pad_nd.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("size", "count"), [(4, 1), (8, 0), (12, 2)])
def test_only_what_is_shorter_is_copied_to_be_filled_up(size, count):
    q_SBHD, k_SBGD = torch.randn(2, 16, 1, 4, 8)
    with Padded() as padded:
        fused_attention(q_SBHD, k_SBGD, torch.randn(16, 1, 4, size), causal=True, scale=1.0)
    assert padded.count == count


def test_against_fp64_flash_is_no_worse_than_torchs_sdpa(config):
    inputs, grad = tensors(s=256)

    def sdpa(q, k, v, _):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    wanted = reference(inputs, grad)
    assert error(run(make_flash(config()), inputs, grad), wanted) <= error(run(sdpa, inputs, grad), wanted)


def test_a_later_token_never_moves_an_earlier_output(config):
    inputs, _ = tensors()
    attention = make_flash(config())
    before = attention(*inputs, None)
    for tensor in inputs:
        tensor[40] += 1.0
    moved = (attention(*inputs, None) != before).any(dim=-1).any(dim=-1)
    assert not moved[:40].any()
    assert moved[40:].all()


def test_no_mask_and_a_given_softmax_scale_are_honoured(config):
    inputs, grad = tensors()
    attention = FlashAttention(config(), 1, AttnMaskType.no_mask, "self", softmax_scale=0.7)
    wanted = reference(inputs, grad, scale=0.7, causal=False)
    assert error(run(attention, inputs, grad), wanted) < 1e-5


class Allocations(TorchDispatchMode):
    """The number of elements of everything that any operation returns as a new tensor."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.numel())
                self.storages.add((str(func), x.numel()))
        return out


def test_no_scores_and_no_repeated_keys_are_ever_in_memory(config):
    inputs, grad = tensors(s=256, b=2)
    q_elements, kv_elements = inputs[0].numel(), inputs[1].numel()
    attention = make_flash(config())
    with Allocations() as forward:
        attention(*(tensor.detach() for tensor in inputs), None)
    # the output and the log-sum-exp of every row, and no copy of an input or of the output
    assert sorted(size for _, size in forward.storages) == [q_elements // 8, q_elements]
    with Allocations() as both:
        run(attention, inputs, grad)
    assert both.largest == q_elements
    assert (
        max(size for name, size in both.storages if "flash" not in name and size != q_elements) == kv_elements
    )


@pytest.mark.parametrize("causal", [True, False])
def test_groups_as_a_batch_equal_a_kernel_that_knows_groups(causal):
    inputs, grad = tensors(g=4)

    def slow(q, k, v, _):
        return attend_groups_as_batch(q, k, v, causal, 0.3, 0.0, "auto").flatten(2)

    def fast(q, k, v, _):
        return fused_attention(q, k, v, causal=causal, scale=0.3)

    assert error(run(slow, inputs, grad), run(fast, inputs, grad)) < 1e-5


def test_dropout_is_refused_on_a_cpu_in_training_only(config):
    inputs, _ = tensors()
    attention = make_flash(config(attention_dropout=0.1))
    with pytest.raises(UserError, match=r"no dropout on cpu.*0\.1"):
        attention(*inputs, None)
    assert torch.equal(attention.eval()(*inputs, None), make_flash(config())(*inputs, None))


def test_what_the_kernels_lack_is_refused_by_name(config):
    for changes, name in [
        ({"window_size": (8, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type=learnable"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit"),
    ]:
        with pytest.raises(UserError, match=name):
            make_flash(config(**changes))
    split = config()
    split.context_parallel_size = 2
    with pytest.raises(UserError, match="context_parallel_size > 1"):
        make_flash(split)
    with pytest.raises(UserError, match="num_splits"):
        make_flash(config(), num_splits=2)
    with pytest.raises(UserError, match="no cuda_kernel 'math'"):
        make_flash(config(), cuda_kernel="math")
    with pytest.raises(UserError, match="no padding mask"):
        FlashAttention(config(), 1, AttnMaskType.padding, "self")


def test_bias_packed_sequences_masks_and_unequal_lengths_are_refused(config):
    inputs, _ = tensors()
    attention = make_flash(config())
    with pytest.raises(UserError, match="packed sequences"):
        attention(*inputs, None, packed_seq_params=object())
    with pytest.raises(UserError, match="attention bias"):
        attention(*inputs, None, attention_bias=torch.zeros(1))
    with pytest.raises(UserError, match="no arbitrary mask"):
        attention(*inputs, None, attn_mask_type=AttnMaskType.arbitrary)
    with pytest.raises(UserError, match="1 queries and 64 keys"):
        attention(inputs[0][:1], *inputs[1:], None)


def test_inputs_that_no_fused_kernel_takes_are_an_error_and_not_a_slow_path(config):
    inputs, _ = tensors()
    transposed = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no fused kernel"):
        make_flash(config())(transposed, *inputs[1:], None)


def test_groups_as_a_batch_are_one_call_on_views(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*tensors, **options):
        calls.append([tensor.untyped_storage().data_ptr() for tensor in tensors])
        return real(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    inputs, _ = tensors(h=8, g=2)
    attend_groups_as_batch(*inputs, True, 0.3, 0.0, "auto")
    assert calls == [[tensor.untyped_storage().data_ptr() for tensor in inputs]]


def test_a_layer_says_which_of_torchs_kernels_takes_it(config):
    assert make_flash(config()).kernel_name() == "torch's flash_attention"


def test_where_no_kernel_takes_the_tensors_that_is_its_name():
    q, k = (torch.empty(1, heads, 16, 8, dtype=torch.int32) for heads in (4, 4))
    assert kernel_of([SDPBackend.FLASH_ATTENTION], q, k, k, causal=True, dropout_p=0.0) == "no kernel"


@pytest.mark.parametrize(("tokens", "wide"), [(512, True), (513, False)])
def test_short_bf16_sequences_are_computed_in_fp32_on_a_cpu(tokens, wide):
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, 1, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2))
    in_fp32 = fused_attention(q.float(), k.float(), v.float(), causal=True, scale=0.2).bfloat16()
    assert torch.equal(fused_attention(q, k, v, causal=True, scale=0.2), in_fp32) is wide
