"""Packages with the names and attributes that Megatron looks up, for a folder on ``sys.path``."""

from __future__ import annotations

from pathlib import Path

_OPTIMIZERS = """
import torch

class FusedAdam(torch.optim.AdamW):
    pass

class FusedSGD(torch.optim.SGD):
    pass
"""
_APPLIER = """
def multi_tensor_applier(op, overflow, tensors, *args):
    return op(overflow, tensors, *args)
"""
_KERNELS = """
def multi_tensor_l2norm(overflow, tensors, per_parameter):
    return None, None

def multi_tensor_scale(overflow, tensors, scale):
    return None

def multi_tensor_scale_tensor(overflow, tensors, scale):
    return None
"""
NVIDIAS_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": _OPTIMIZERS,
    "apex/multi_tensor_apply/__init__.py": _APPLIER,
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "class FusedLayerNormAffineFunction:\n    pass\n",
    "amp_C.py": _KERNELS,
}
OTHER_APEX = {"apex/__init__.py": "raise SystemExit('imported')", "apex/interfaces.py": ""}
# Megatron imports a hundred names of Transformer Engine; all but those of optimizer and clipping are empty
# classes, or modules of such classes.
_ANY_NAME = """
import importlib.abc, importlib.machinery, sys, types

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].islower():
        full = "transformer_engine." + name
        return sys.modules.get(full) or importlib.import_module(full)
    return type(name, (), {"apply": None})
"""
_ANY_MODULE = (
    _ANY_NAME
    + """
class AnyModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        ours = name.startswith("transformer_engine.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = __getattr__

sys.meta_path.append(AnyModule())
__version__ = "2.8.0"
"""
)
TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": _ANY_MODULE,
    "transformer_engine/pytorch/__init__.py": _ANY_NAME,
    "transformer_engine/pytorch/optimizers.py": _OPTIMIZERS + _APPLIER + _KERNELS,
}
BROKEN_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "raise OSError('libcudart.so.99: cannot open shared object file')\n"
}
WEIGHT_GRADIENTS = {"fused_weight_gradient_mlp_cuda.py": ""}


def write(folder: Path, *packages: dict[str, str]) -> Path:
    """Write the files of the packages below a folder and return it."""
    for package in packages:
        for name, text in package.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder
