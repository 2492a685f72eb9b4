"""The stand-in for CUDA: everything in megaplug that pretends to be a GPU, in one place.

Megatron-core asks for ``torch.cuda`` in several hundred places. Without a GPU each of them is answered
here by the CPU: devices are the CPU, streams and events do nothing, memory is the process's own. With
CUDA :func:`install` does nothing at all.

The stand-in is for the ranks of a CPU run and, with tensors that hold no numbers (torch's ``meta`` device) in
the CPU's place, for rehearsals; it changes ``torch`` for the whole process.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import resource
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch.distributed import DeviceMesh
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_META = torch.device("meta")
_KIB = 1024
_installed = False
# Where tensors really lie that are asked for on CUDA.
_device = _CPU


def is_needed() -> bool:
    """Whether this process has no CUDA device and needs the stand-in."""
    return not torch.cuda.is_available()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _Stream:
    """A stream on which everything has always been done already."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Any) -> float:
        return 0.0


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def _no_stream(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _resident_bytes(*args: Any, **kwargs: Any) -> int:
    return psutil.Process().memory_info().rss


def _peak_resident_bytes(*args: Any, **kwargs: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _memory_info(*args: Any, **kwargs: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    # Compute capability 8.0: the oldest for which Megatron takes no special path.
    return SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
    )


def _install_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _returning(_device)
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect"):
        setattr(cuda, name, _returning(None))
    cuda.get_device_properties = _device_properties
    cuda.get_device_capability = _returning((8, 0))
    cuda.get_device_name = _returning("cpu")
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = _no_stream
    cuda.set_stream = _returning(None)
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _returning(_Stream()))
    cuda.is_current_stream_capturing = _returning(False)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _returning(None))
    accelerator: Any = torch.accelerator
    accelerator.synchronize = _returning(None)
    accelerator.current_stream = _returning(_Stream())
    accelerator.current_device_index = _returning(0)


def _install_memory() -> None:
    cuda: Any = torch.cuda
    for name in ("memory_allocated", "memory_reserved"):
        setattr(cuda, name, _resident_bytes)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, _peak_resident_bytes)
    cuda.memory_stats = lambda *args, **kwargs: {
        "num_alloc_retries": 0,
        "allocation.all.current": 0,
        "allocated_bytes.all.current": _resident_bytes(),
        "allocated_bytes.all.peak": _peak_resident_bytes(),
        "reserved_bytes.all.current": _resident_bytes(),
        "reserved_bytes.all.peak": _peak_resident_bytes(),
    }
    cuda.mem_get_info = _memory_info


def _install_constructors() -> None:
    """Whatever takes ``device="cuda"`` or an integer device makes it the CPU.

    Not a ``TorchFunctionMode``, as ``torch.set_default_device`` is one: it would cost 2 us on every call of
    every function of torch, which is a thirtieth of a small model's step.
    """
    like = [name for name in dir(torch) if name.endswith("_like") and not name.startswith("_")]
    makers = {function.__name__ for function in _device_constructors() if hasattr(torch, function.__name__)}
    for name in {*makers, *like, "normal"}:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    for name in ("new_tensor", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"):
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    real_to = _on_cpu(tensor.to)

    @functools.wraps(tensor.to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_device, *args[1:])
        return real_to(self, *args, **kwargs)

    tensor.to = to


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = _device
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _moved(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self if _device == _CPU else self.to(_device)


def _module_moved(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    if _device == _CPU:
        return self
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != _device:
                # torch would make a new one without the marks that Megatron has put on it.
                moved = torch.nn.Parameter(parameter.data.to(_device), parameter.requires_grad)
                moved.__dict__.update(parameter.__dict__)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(_device)
    return self


def _install_tensors() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = _moved
    tensor.pin_memory = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = _module_moved

    real_type = tensor.type

    @functools.wraps(real_type)
    def type_as_if_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        # Megatron's optimizers and clipping ask for 'torch.cuda.FloatTensor' by name. A function mode looks a
        # method up by name again, so this one may be called by itself.
        if not isinstance(answer, str) or answer.startswith("torch.cuda."):
            return answer
        return f"torch.cuda.{answer.removeprefix('torch.').removeprefix('meta.')}"

    tensor.type = type_as_if_on_cuda


class _Done:
    """A collective that is over."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _install_lone_ranks() -> None:
    """What a rank that is alone in its group sends to itself is a copy, or nothing, as it is with NCCL.

    gloo takes it to threads of its own, which copy with OpenMP. With them a process has more OpenMP threads
    than there are cores, and then libgomp's no longer spin between two operators of the model: a step of the
    default model on two cores takes half as long again.
    """
    distributed: Any = torch.distributed
    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(distributed, name, _unless_alone(getattr(distributed, name)))
    # Names of their own, which a module that was imported before has for gloo's.
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings

    for module in (param_and_grad_buffer, layers, mappings):
        module.dist_all_gather_func = distributed.all_gather_into_tensor
        module.dist_reduce_scatter_func = distributed.reduce_scatter_tensor


def _unless_alone(real: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(real)

    @functools.wraps(real)
    def collective(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if torch.distributed.get_world_size(given.get("group")) != 1:
            return real(*args, **kwargs)
        tensors = [value for value in given.values() if torch.is_tensor(value)]
        if len(tensors) == 2 and tensors[0].data_ptr() != tensors[1].data_ptr():
            output, source = tensors
            output.copy_(source.view_as(output))
        return _Done() if given.get("async_op") else None

    return collective


def _install_random() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    # Not torch.manual_seed, which calls torch.cuda.manual_seed_all itself.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    _leave_the_model_s_random_numbers()


def _leave_the_model_s_random_numbers() -> None:
    """A data loader's iterator draws its workers' seed from the CPU's generator, which here is dropout's.

    A run that continues makes its iterators after it has restored the random state, not before.
    """
    from torch.utils.data import dataloader

    iterator: Any = dataloader._BaseDataLoaderIter
    real_init = iterator.__init__

    @functools.wraps(real_init)
    def init(*args: Any, **kwargs: Any) -> None:
        before = torch.get_rng_state()
        real_init(*args, **kwargs)
        torch.set_rng_state(before)

    iterator.__init__ = init


def _install_megatron() -> None:
    from megatron.core.distributed import torch_fully_sharded_data_parallel
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.training import training

    real_initialize = training.initialize_megatron

    @functools.wraps(real_initialize)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        # Process groups and seeds are only set up where a device is counted; nothing later may see one.
        real_count = torch.cuda.device_count
        torch.cuda.device_count = _returning(1)
        try:
            return real_initialize(*args, **{**kwargs, "allow_no_cuda": True})
        finally:
            torch.cuda.device_count = real_count

    training.initialize_megatron = initialize_megatron

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron's own skips tensors that are on the CPU already, so that splits stay tensors
        # where all_to_all_single wants numbers.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    # torch's FSDP2 on the CPU itself: a mesh that is called CUDA would ask for CUDA's memory and streams.
    torch_fully_sharded_data_parallel.DeviceMesh = SimpleNamespace(from_group=_mesh_on_cpu)


def _mesh_on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu", *args, **kwargs)


def install() -> bool:
    """Put the CPU in the place of CUDA for this process, once.

    Returns:
        True if the stand-in is in place, False if CUDA is there and nothing was changed.
    """
    if not is_needed():
        return False
    _install()
    return True


def install_without_numbers() -> None:
    """Put the ``meta`` device in the place of CUDA for this process, whether or not there is a GPU.

    Tensors have sizes and storages of as many bytes, and take no memory; collectives are left to the caller.
    """
    global _device
    assert not _installed or _device == _META, "the CPU stands in for CUDA already"
    _device = _META
    _install()


def _install() -> None:
    global _installed
    if _installed:
        return
    # Their optimizers and norms have no CPU kernels, and Megatron takes them wherever they can be imported.
    for name in ("transformer_engine", "apex", "amp_C"):
        sys.modules[name] = None  # type: ignore[assignment]
    _install_devices()
    _install_memory()
    _install_constructors()
    _install_tensors()
    if _device == _CPU:
        _install_lone_ranks()
    _install_random()
    _install_megatron()
    _installed = True
