"""Kernels of blocks: the CPU's numbers, CUDA's operators by their shapes, flash-attn's by its signatures."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megaplug.errors import UserError
from megaplug.layers.attention import block_kernels, dilated_attention
from megaplug.layers.attention.block_kernels import KERNELS, choose_kernel
from megaplug.layers.attention.kernels.interface import Block
from megaplug.layers.attention.kernels.reference import Reference
from megaplug.layers.registry.dilated import RING


def block(dtype=torch.float64, num_keys=24, causal=False, device="cpu", **shape):
    """Queries against keys, rows being views with others between them."""
    batch, num_rows, heads, groups, dim = 2, 24, 4, 2, 16
    options = {"dtype": dtype, "device": device}
    q = torch.randn(batch, num_rows, 3, heads, dim, **options)[:, :, 1]
    k, v = (torch.randn(batch, num_keys, 3, groups, dim, **options)[:, :, 1] for _ in range(2))
    return Block(q, k, v, causal, dim**-0.5)


def parts_of(kernel, found: Block):
    """Output, log-sum-exp and gradients, the last as of a part of a larger softmax."""
    out, lse = kernel.forward(found)
    whole, whole_lse = out.to(found.q.dtype) * 0.5, lse + 0.7
    return [out, lse, *kernel.backward(found, torch.ones_like(found.q), whole, whole_lse)]


CASES = pytest.mark.parametrize(("num_keys", "causal"), [(24, True), (24, False), (9, False)])


@CASES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_cpus_kernel_finds_what_the_written_out_one_does(dtype, bound, num_keys, causal, monkeypatch):
    given = block(dtype, num_keys, causal)
    wanted = parts_of(Reference(), given)
    for page in (4096, 16):  # rows taken as they lie, and rows copied together
        monkeypatch.setattr("megaplug.layers.attention.kernels.cpu._PAGE", page)
        for a, b in zip(parts_of(KERNELS["cpu_flash"], given), wanted, strict=True):
            assert (a - b).abs().max() < bound


@pytest.mark.parametrize("most", [1, 3000])
def test_segments_may_be_computed_in_several_calls(most, monkeypatch):
    """Where the first branch reaches every row, and where a tail or another rate is in the way."""
    tensors = [torch.randn(2, 50, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for lengths, rates in (((8, 16), (1, 2)), ((10, 25), (1, 3)), ((5, 10), (2, 5))):
        found = []
        for limit in (None, most):
            monkeypatch.setattr(KERNELS["cpu_flash"], "most_elements", limit)
            out = dilated_attention(*tensors, lengths, rates)
            found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() < 1e-12


def test_gradients_and_inputs_may_lie_in_any_way():
    tensors = [torch.randn(1, 12, 8, 2, dtype=torch.float64).transpose(2, 3) for _ in range(3)]
    found = []
    for given in (tensors, [x.contiguous() for x in tensors]):
        leaves = [x.detach().requires_grad_() for x in given]
        out = dilated_attention(*leaves, [4, 12], [1, 2])
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-12


@CASES
@pytest.mark.parametrize("name", ["cuda_flash", "cudnn", "efficient"])
def test_cudas_operators_take_the_arguments_and_give_the_shapes(name, num_keys, causal):
    """By the shape functions that torch has of them: no GPU is needed, and nothing is computed."""
    with FakeTensorMode():
        given = block(torch.bfloat16, num_keys, causal, "cuda")
        out, lse, *grads = parts_of(KERNELS[name], given)
    assert (out.shape, out.dtype) == (given.q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (given.q.shape[:3], torch.float32)
    assert [x.shape for x in grads] == [given.q.shape, given.k.shape, given.v.shape]


def test_heads_that_cudas_kernels_do_not_take_are_refused():
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 20, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(UserError, match="heads of 20 elements on CUDA"):
            dilated_attention(q, q, q, [8], [1])


# As published: flash_attn 2.7.0 to 2.8.4, hopper/ and flash_attn/cute/ of August 2026; with the values that
# parameters have where they are left out. Those after the last that is used here are left out.
_WINDOW = "window_size_left={0}, window_size_right={0}, "
PUBLISHED = {
    "flash_attn2": (
        "flash_attn.flash_attn_interface",
        "_flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, "
        "softcap, alibi_slopes, return_softmax)",
        "_flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, "
        "window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None)",
    ),
    "flash_attn3": (
        "flash_attn_interface",
        "_flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
        "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, "
        "rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, "
        "softmax_scale=None, causal=False, " + _WINDOW.format(-1) + "attention_chunk=0, softcap=0.0)",
        "_flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, "
        "sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
        "softmax_scale=None, is_causal=False, " + _WINDOW.format(-1) + "softcap=0.0, deterministic=False)",
    ),
    "flash_attn4": (
        "flash_attn.cute.interface",
        "_flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, "
        "seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, "
        "softmax_scale=None, causal=False, softcap=None, " + _WINDOW.format(None) + "learnable_sink=None, "
        "return_lse=False)",
        "_flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
        + _WINDOW.format(None)
        + "deterministic=False, dq=None, dk=None, dv=None)",
    ),
}


def stand_in(signature: str, compute):
    """A function of exactly that signature, which hands its arguments by name to another."""
    name, arguments = signature.split("(", 1)
    scope = {"compute": compute}
    exec(f"def {name}({arguments}:\n    return compute(dict(locals()))", scope)
    return scope[name]


@pytest.fixture(params=PUBLISHED)
def published(request, monkeypatch):
    """The name of a kernel, with a package in place that has its signatures and computes by einsum."""
    module_name, *signatures = PUBLISHED[request.param]

    def forward(a):
        assert not a.get("dropout_p") and not a.get("softcap")
        out, lse = Reference().forward(Block(a["q"], a["k"], a["v"], a["causal"], a["softmax_scale"]))
        return out, lse.transpose(1, 2).contiguous(), None, None

    def backward(a):
        lse = a.get("softmax_lse", a.get("lse"))
        assert lse.is_contiguous() and lse.shape == (2, 4, 24)
        given = Block(a["q"], a["k"], a["v"], a.get("is_causal", a.get("causal")), a["softmax_scale"])
        grads = Reference().backward(given, a["dout"], a["out"], lse.transpose(1, 2))
        if a["dq"] is None:
            return grads
        for place, grad in zip((a["dq"], a["dk"], a["dv"]), grads, strict=True):
            assert place.is_contiguous()
            place.copy_(grad)
        return None

    module = ModuleType(module_name)
    for signature, compute in zip(signatures, (forward, backward), strict=True):
        function = stand_in(signature, compute)
        setattr(module, function.__name__, function)
    monkeypatch.setattr(
        "megaplug.layers.attention.kernels.installed.find_spec", lambda name: module if name else None
    )
    monkeypatch.setitem(sys.modules, module_name, module)
    for number, part in enumerate(parents := module_name.split(".")[:-1]):
        monkeypatch.setitem(sys.modules, ".".join(parents[: number + 1]), ModuleType(part))
    return request.param


@CASES
def test_flash_attns_functions_are_called_as_they_are_published(published, num_keys, causal):
    given = block(torch.float32, num_keys, causal)
    kernel = choose_kernel(torch.device("cuda"), torch.float32, published)
    for a, b in zip(parts_of(kernel, given), parts_of(Reference(), given), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_another_version_of_flash_attn_is_refused(published):
    module = sys.modules[PUBLISHED[published][0]]
    name = KERNELS[published].functions[1]
    old = stand_in(f"{name}(dout, q, k, v, window_size=(-1, -1))", dict)
    assert "window_size" in inspect.signature(old).parameters
    setattr(module, name, old)
    with pytest.raises(UserError, match=f"has no {name} with window_size_left"):
        choose_kernel(torch.device("cuda"), torch.float32, published)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_package_that_is_not_installed_is_refused(name):
    assert not KERNELS[name].is_installed()
    with pytest.raises(UserError, match=r"flash-attn \d is not installed: there is no flash_attn") as raised:
        choose_kernel(torch.device("cuda"), torch.bfloat16, name)
    assert "kernel=auto" in raised.value.hint


def test_a_kernel_of_another_device_is_refused_with_those_of_this_one():
    q = torch.randn(1, 8, 2, 8)
    with pytest.raises(UserError, match="kernel=cuda_flash does not run on cpu") as raised:
        dilated_attention(q, q, q, [8], [1], kernel="cuda_flash")
    assert raised.value.hint == "use auto, cpu_flash, reference"
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 8, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(UserError, match="kernel=cpu_flash does not run on cuda") as raised:
            dilated_attention(q, q, q, [8], [1], kernel="cpu_flash")
    assert "cpu_flash" not in raised.value.hint and "flash_attn2" in raised.value.hint


@pytest.mark.parametrize(
    ("capability", "installed", "torchs", "wanted"),
    [
        ((9, 0), ("flash_attn2", "flash_attn3"), "cudnn_attention", "flash_attn3"),
        ((9, 0), ("flash_attn2",), "cudnn_attention", "cudnn"),
        ((8, 0), ("flash_attn2", "flash_attn3"), "flash_attention", "flash_attn2"),
        ((10, 0), ("flash_attn4",), "cudnn_attention", "flash_attn4"),
        ((12, 0), (), "flash_attention", "cuda_flash"),
        ((7, 5), ("flash_attn2",), "efficient_attention", "efficient"),
        ((9, 0), (), "no kernel", "reference"),
    ],
)
def test_on_cuda_packages_for_the_gpu_come_before_what_torch_takes(
    capability, installed, torchs, wanted, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(block_kernels, "kernel_of", lambda *args, **kwargs: torchs)
    for name in PUBLISHED:
        monkeypatch.setattr(KERNELS[name], "is_installed", lambda name=name: name in installed)
        monkeypatch.setattr(KERNELS[name], "check", lambda: None)
    block_kernels._on_cuda.cache_clear()
    with FakeTensorMode():
        assert choose_kernel(torch.device("cuda"), torch.bfloat16) is KERNELS[wanted]
        assert choose_kernel(torch.device("cuda"), torch.float64) is KERNELS["reference"]
    block_kernels._on_cuda.cache_clear()


TRITON_MERGE = "megaplug.layers.attention.kernels.triton_merge"


def test_tritons_kernel_compiles_for_hopper(monkeypatch, tmp_path):
    """Its interpreter takes what its compiler refuses; the compiler needs no GPU."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delitem(sys.modules, TRITON_MERGE, raising=False)
    kernel = importlib.import_module(TRITON_MERGE)._merge_rows
    pointers = {"total": "*fp32", "total_lse": "*fp32", "new": "*bf16", "new_lse": "*fp32"}
    strides = {f"{name}_strides": ("i64",) * 5 for name in pointers}
    constants = {"ROWS": 32, "DIM": 128}
    signature = {**pointers, "sizes": ("i32",) * 6, **strides, **dict.fromkeys(constants, "constexpr")}
    made = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in made.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_triton_merges_as_torch_does(dtype, monkeypatch):
    """Run by Triton's interpreter, for want of a GPU; rows in no branch, tails and groups among them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, TRITON_MERGE, raising=False)  # Triton reads its switch at import
    tensors = [torch.randn(2, 41, heads, 12, dtype=dtype) for heads in (4, 2, 2)]
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for pattern in (((8, 16, 41), (1, 2, 4)), ((40,), (3,))):
        found, wanted = (dilated_attention(*tensors, *pattern, merge=merge) for merge in ("triton", "torch"))
        assert (found - wanted).abs().max() < bound


def test_a_merge_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 8, 2, 8)
    with pytest.raises(UserError, match="merge=triton is for CUDA, and the tensors are on cpu"):
        dilated_attention(q, q, q, [8], [1], merge="triton")
    with pytest.raises(UserError, match="no merge 'apex'"):
        dilated_attention(q, q, q, [8], [1], merge="apex")
    monkeypatch.setattr("megaplug.layers.attention.merging.find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        dilated_attention(q, q, q, [8], [1], merge="triton")


def test_the_registry_declares_the_packages_that_kernels_look_for():
    needs = RING.parameters["kernel"].needs
    for name in ("flash_attn2", "flash_attn3", "flash_attn4"):
        assert (needs[name].modules, needs[name].package) == (KERNELS[name].modules, KERNELS[name].package)
    assert set(needs) <= set(RING.parameters["kernel"].choices) <= {"auto", *KERNELS}
