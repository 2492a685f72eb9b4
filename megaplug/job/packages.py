"""Apex and Transformer Engine: what is installed here, and what of it a job takes. Nothing is imported.

Megatron decides at import, by what it finds, whose optimizer, gradient clipping, norms and fused weight
gradients it takes (``core/optimizer/__init__.py``, ``core/optimizer/clip_grads.py``,
``core/models/backends.py``, ``core/tensor_parallel/layers.py`` of 0.19): Transformer Engine's, else Apex's,
else torch's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaplug.errors import Problem

if TYPE_CHECKING:
    from megaplug.job.schema import Job

NAMES = {"apex": "Apex", "te": "Transformer Engine"}
# Every module that a package brings and that Megatron looks for, by the name of its key.
MODULES = {
    "apex": (
        "apex", "amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda", "fast_layer_norm",
        "scaled_masked_softmax_cuda", "scaled_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda",
    ),
    "te": ("transformer_engine", "transformer_engine_torch"),
}  # fmt: skip
# How what is missing is named, by the name of its key.
LACKED = {"apex": "NVIDIA's Apex", "te": "transformer_engine"}
WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
INSTALLATION = "docs/kernels.md says how it is installed"
# NVIDIA's Apex has these folders; the project of the same name on the package index has not.
_FOLDERS_OF_NVIDIA_APEX = ("multi_tensor_apply", "optimizers", "transformer")


@dataclass(frozen=True)
class Apex:
    """An Apex that can be imported here.

    Attributes:
        place: Its folder.
        is_nvidias: Whether it is NVIDIA's, and not another project of that name.
    """

    place: str
    is_nvidias: bool


def find_apex() -> Apex | None:
    """The Apex of this environment, whoever's it is."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    is_nvidias = any((folder / part).is_dir() for folder in folders for part in _FOLDERS_OF_NVIDIA_APEX)
    return Apex(str(folders[0] if folders else spec.origin), is_nvidias)


def is_installed(key: str) -> bool:
    """Whether the package behind ``kernels.<key>`` is installed."""
    if key == "apex":
        apex = find_apex()
        return apex is not None and apex.is_nvidias
    return importlib.util.find_spec("transformer_engine") is not None


def has_weight_gradient_fusion() -> bool:
    """Whether Apex's extension for fused weight gradients is installed."""
    return importlib.util.find_spec(WEIGHT_GRADIENTS) is not None


def why_not_taken(key: str, word: str, device: str) -> str:
    """Why Megatron does not take a package's kernels; empty if it does.

    Args:
        key: ``apex`` or ``te``.
        word: ``auto``, ``off`` or ``require``.
        device: ``cpu`` or ``cuda``.
    """
    if word == "off":
        return f"kernels.{key}=off"
    if device == "cpu":
        return "it needs a GPU"
    if is_installed(key):
        return ""
    if key == "apex" and (other := find_apex()) is not None:
        return f"the apex in {other.place} is another project, not NVIDIA's"
    return "it is not installed"


def resolve_backend(requested: str, device: str, te: str = "auto") -> str:
    """``native`` or ``te``: ``auto`` means Transformer Engine where ``kernels.te`` takes its kernels."""
    if requested != "auto":
        return requested
    return "native" if why_not_taken("te", te, device) else "te"


def why_no_fused_weight_gradients(apex: str, device: str) -> str:
    """Why no matrix product adds a weight's gradient to its buffer by itself; empty if it does."""
    if device == "cpu":
        return "they need a GPU"
    if apex == "off":
        return "kernels.apex=off"
    if not has_weight_gradient_fusion():
        return f"Apex's extension {WEIGHT_GRADIENTS} is not installed"
    # A rank that does not take Apex keeps the extension out with the rest of it.
    reason = why_not_taken("apex", apex, device)
    return f"no Apex: {reason}" if reason else ""


def package_problems(job: Job, device: str | None) -> Iterator[Problem]:
    """What is wrong with ``kernels.*``, and with ``backend`` beside them.

    Args:
        job: The job.
        device: ``cpu`` or ``cuda``; None where it is not known, and then nothing is asked of the machine.
    """
    if job.backend == "te" and job.kernels.te == "off":
        message = "kernels.te=off keeps out the Transformer Engine that backend=te builds its layers of"
        yield Problem("kernels.te", message, "use backend=native, or kernels.te=auto")
    for key, word in (("apex", job.kernels.apex), ("te", job.kernels.te)):
        if word != "require" or device is None:
            continue
        if reason := why_not_taken(key, word, device):
            how = "" if device == "cpu" else f"{INSTALLATION}; or "
            message = f"{NAMES[key]} is required, but {reason}"
            lacks = "" if device == "cpu" else LACKED[key]
            yield Problem(f"kernels.{key}", message, f"{how}use kernels.{key}=auto", lacks)
    if not job.megatron.get("gradient_accumulation_fusion") or device is None:
        return
    if reason := why_no_fused_weight_gradients(job.kernels.apex, device):
        message = f"weight gradients cannot be fused: {reason}"
        lacks = "" if device == "cpu" or job.kernels.apex == "off" else LACKED["apex"]
        key, hint = "megatron.gradient_accumulation_fusion", f"leave it out; {INSTALLATION}"
        yield Problem(key, message, hint, lacks)


def backend_problem(job: Job, device: str, key: str = "") -> Problem | None:
    """That the backend is Transformer Engine's and cannot be had; None where nothing is wrong with it.

    Args:
        job: The job.
        device: ``cpu`` or ``cuda``.
        key: What asks for it; ``backend`` itself if empty.
    """
    if job.backend != "te":
        return None
    if device == "cpu":
        message = "Transformer Engine needs a GPU, and the device is cpu"
        return Problem("backend", message, "use backend=native")
    if is_installed("te"):
        return None
    hint = f"{INSTALLATION}; or use backend=native"
    return Problem(key or "backend", f"{NAMES['te']} is not installed", hint, LACKED["te"])


def packages_line(apex: str, te: str, device: str, backend: str) -> str:
    """What a person should know before the ranks have said what runs.

    Args:
        apex: ``kernels.apex``.
        te: ``kernels.te``.
        device: ``cpu`` or ``cuda``.
        backend: ``native`` or ``te``, as resolved.
    """
    reasons = {key: why_not_taken(key, word, device) for key, word in (("te", te), ("apex", apex))}
    if device == "cpu":
        return "torch's and Megatron's own: Apex and Transformer Engine need a GPU"
    parts = [f"{NAMES[key]}'s" if not why else f"no {NAMES[key]} ({why})" for key, why in reasons.items()]
    if reason := why_no_fused_weight_gradients(apex, device):
        parts.append(f"weight gradients not fused ({reason})")
    if not reasons["te"] and backend == "native":
        parts.append("layers native")
    return ", ".join(parts)
