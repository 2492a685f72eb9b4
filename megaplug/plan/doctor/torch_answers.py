"""What torch said (see ``probe.py``), as findings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megaplug.plan.doctor.finding import Finding

GIB = 1024**3
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def torch_findings(answers: dict[str, Any], driver_file: Path = _DRIVER_FILE) -> list[Finding]:
    """CUDA, GPUs, Transformer Engine and gloo; of torch itself only what is wrong with it."""
    torch = answers["torch"]
    if "error" in torch:
        cure = "`make setup` again; if it stays, remove .venv first (`make clean`)"
        return [Finding("torch imports", f"no: {torch['kind']}: {torch['error']}", "broken", cure)]
    findings = [*cuda_findings(torch, driver_version(driver_file))]
    if "transformer_engine" in answers:
        findings.append(transformer_engine_finding(answers["transformer_engine"]))
    if "gloo" in answers:
        findings.append(gloo_finding(answers["gloo"]))
    return findings


def driver_version(driver_file: Path = _DRIVER_FILE) -> str | None:
    """The version of the loaded NVIDIA driver, None if there is none.

    The file's first line reads ``NVRM version: NVIDIA UNIX ... Kernel Module  580.65.06  <build date>``.
    """
    if not driver_file.is_file():
        return None
    words = driver_file.read_text().splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "of an unknown version")


def cuda_findings(torch: dict[str, Any], driver: str | None) -> list[Finding]:
    """The CUDA runtime that torch carries, the driver, and the GPUs with their memory."""
    runtime = f"runtime {torch['cuda_runtime']}" if torch["cuda_runtime"] else "torch built without CUDA"
    shown = f"{runtime}, driver {driver or 'none'}"
    if not torch["cuda"]:
        if driver is None:
            return [Finding("CUDA", f"{shown}; ranks run on the CPU with gloo", "absent")]
        return [Finding("CUDA", f"{shown}, but torch cannot use it", "warning", _cure_for_cuda(torch))]
    findings = [Finding("CUDA", shown)]
    if not torch["nccl"]:
        cure = "install a torch that was built with NCCL; ranks on GPUs speak through it"
        findings.append(Finding("NCCL", "not in this torch", "broken", cure))
    for index, gpu in enumerate(torch["gpus"]):
        memory = f"{gpu['free'] / GIB:.0f} of {gpu['total'] / GIB:.0f} GiB free"
        value = f"{gpu['name']}, {memory}, compute capability {gpu['capability']}"
        if gpu["free"] < gpu["total"] / 2:
            cure = "see who holds it with nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES"
            findings.append(Finding(f"GPU {index}", value, "warning", cure))
        else:
            findings.append(Finding(f"GPU {index}", value))
    return findings


def _cure_for_cuda(torch: dict[str, Any]) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it"
    if torch["cuda_runtime"] is None:
        return "install torch's CUDA build; device=cpu trains without"
    return (
        f"the driver may be too old for CUDA {torch['cuda_runtime']}, or the GPU is not passed into this "
        "container: compare with nvidia-smi; device=cpu trains without"
    )


def transformer_engine_finding(answer: dict[str, Any]) -> Finding:
    """Transformer Engine: Megatron imports it wherever it is found, and bears only an ImportError."""
    name = "Transformer Engine"
    if "error" in answer:
        harmless = answer["kind"] in ("ImportError", "ModuleNotFoundError")
        return Finding(
            name,
            f"installed, but does not import: {answer['kind']}: {answer['error']}",
            "warning" if harmless else "broken",
            "build it against this torch again, or uninstall it: the native backend needs none",
        )
    if answer["version"] is None:
        return Finding(name, "not installed; the native backend needs none", "absent")
    return Finding(name, str(answer["version"]))


def gloo_finding(answer: dict[str, Any]) -> Finding:
    """Whether a process group can be stood up on gloo, which ranks without a GPU speak through."""
    if "error" not in answer:
        return Finding("gloo", "a group of one rank stands up and reduces")
    cure = "the host's name may not resolve: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
    return Finding("gloo", f"{answer['kind']}: {answer['error']}", "broken", cure)
