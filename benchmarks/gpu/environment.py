"""What this machine is: driver, GPU, versions, and what the doctor says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec

from setting import ROOT, ended, read_setting, skipped


def said(*words: str) -> str:
    """What a command prints, or that it is not there."""
    if shutil.which(words[0]) is None:
        return f"{words[0]} is not there"
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    return (done.stdout + done.stderr).strip()


def main() -> int:
    """Print and store it."""
    setting = read_setting(__doc__)
    import torch

    query = "name,driver_version,memory.total,compute_cap,clocks.max.sm,power.limit"
    facts = {
        "nvidia_smi": "" if setting.rehearse else said("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "doctor": said(sys.executable, "launch/plan.py", "action=doctor"),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    for name, module in (
        ("Transformer Engine", "transformer_engine"),
        ("Apex", "apex"),
        ("flash-attn", "flash_attn"),
    ):
        if find_spec(module) is None:
            skipped(f"what needs {name}", "it is not installed")
    setting.write("environment", facts)
    sees = torch.cuda.is_available() or setting.rehearse
    return ended([] if sees else ["torch sees no GPU"])


if __name__ == "__main__":
    sys.exit(main())
