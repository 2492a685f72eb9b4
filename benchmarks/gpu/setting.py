"""What every step is told: where to write, what stands for the GPU, and how large it may be."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        results: Folder for what was measured.
        work: Folder for what is thrown away.
        gpu: The GPU in a file's name.
        rehearse: Tiny sizes, and the CPU in the place of the GPU.
    """

    results: Path
    work: Path
    gpu: str
    rehearse: bool

    @property
    def device(self) -> str:
        """``cuda``, or ``cpu`` in its place."""
        return "cpu" if self.rehearse else "cuda"

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Store figures as ``<name>_<gpu>.json`` with the machine beside them."""
        whole = {"machine": self.machine(), **content}
        (self.results / f"{name}_{self.gpu}.json").write_text(json.dumps(whole, indent=2) + "\n")

    def machine(self) -> dict[str, Any]:
        """GPU, versions and day."""
        found: dict[str, Any] = {"gpu": self.gpu, "python": platform.python_version()}
        if self.rehearse:
            found["rehearsal"] = (
                "the CPU stood in for the GPU, at tiny sizes: no figure here says anything of speed"
            )
        for name in ("torch", "megatron-core", "transformers", "triton", "transformer-engine"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
        return found | {"date": datetime.now(UTC).date().isoformat()}


def read_setting(purpose: str | None) -> Setting:
    """The setting from the command line."""
    parser = argparse.ArgumentParser(
        description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gpu", default="gpu")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    return Setting(options.results.resolve(), options.work.resolve(), options.gpu, options.rehearse)


def skipped(what: str, why: str) -> None:
    """Say that something was left out; the driver repeats it at the end."""
    print(f"SKIPPED {what}: {why}", flush=True)


def ended(failures: list[str]) -> int:
    """Print what failed and return the exit code."""
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
