"""Which packages are installed, and whether they are the ones that megaplug asks for."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import megaplug
from megaplug.job.packages import find_apex
from megaplug.plan.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def software_findings() -> list[Finding]:
    """Python, megaplug, the packages it needs, and the optional ones."""
    findings = [python_finding(sys.version_info[:3], sys.executable), _megaplug_finding()]
    if importlib.util.find_spec("packaging") is None:
        return [*findings, Finding("packages", "megaplug's own are not installed", "broken", "`make setup`")]
    requirements = requirements_of_megaplug()
    findings += [
        package_finding(wanted) for wanted in requirements if wanted.name in ("torch", "megatron-core")
    ]
    return [*findings, _other_packages_finding(requirements), apex_finding(), wandb_finding()]


def python_finding(version: tuple[int, ...], executable: str) -> Finding:
    """Whether this Python is one that Megatron-core 0.19 has wheels for: 3.12 or 3.13."""
    shown = f"{'.'.join(map(str, version))} ({executable})"
    if (3, 12) <= version[:2] < (3, 14):
        return Finding("Python", shown)
    cure = "use Python 3.12 or 3.13: `make setup PYTHON=/path/to/python3.12`"
    return Finding("Python", f"{shown}, but 3.12 or 3.13 is needed", "broken", cure)


def _megaplug_finding() -> Finding:
    return Finding("megaplug", f"{megaplug.__version__} ({Path(megaplug.__file__).parent})")


def requirements_of_megaplug() -> list[Requirement]:
    """What ``pyproject.toml`` asks for, without the extras, from the installed package or from the clone."""
    from packaging.requirements import Requirement

    pyproject = Path(megaplug.__file__).parents[1] / "pyproject.toml"
    if pyproject.is_file():
        lines = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    else:
        lines = metadata.requires("megaplug") or []
    requirements = [Requirement(line) for line in lines]
    return [wanted for wanted in requirements if not wanted.marker or wanted.marker.evaluate({"extra": ""})]


def package_finding(wanted: Requirement) -> Finding:
    """Whether a package is installed in a version that megaplug has been made for.

    A local version such as ``2.11.0a0+custom`` of a vendor's container counts as what it says it is.
    """
    asked = f"{wanted.name}{wanted.specifier}"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "not installed", "broken", f"`make setup`, or: pip install '{asked}'")
    if wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, version)
    return Finding(
        wanted.name,
        f"{version}, but {wanted.specifier} is needed",
        "broken",
        f"`make setup`, or: pip install '{asked}'",
    )


def _other_packages_finding(requirements: list[Requirement]) -> Finding:
    others = [
        package_finding(wanted) for wanted in requirements if wanted.name not in ("torch", "megatron-core")
    ]
    faulty = [finding for finding in others if finding.status != "ok"]
    if not faulty:
        return Finding("other packages", ", ".join(f"{found.name} {found.value}" for found in others))
    listed = "; ".join(f"{found.name}: {found.value}" for found in faulty)
    asked = " ".join(f"'{wanted.name}{wanted.specifier}'" for wanted in requirements)
    return Finding("other packages", listed, "broken", f"`make setup`, or: pip install {asked}")


def apex_finding() -> Finding:
    """Whether there is an Apex, and whose: it is not imported, only looked at."""
    apex = find_apex()
    if apex is None:
        return Finding("Apex", "not installed; not needed", "absent")
    if apex.is_nvidias:
        return Finding("Apex", f"NVIDIA's ({apex.place})")
    return Finding(
        "Apex",
        f"another project of the same name ({apex.place}), not NVIDIA's",
        "warning",
        "pip uninstall apex; NVIDIA's is only built from source, and nothing here needs it",
    )


def wandb_finding() -> Finding:
    """Whether runs can be sent to Weights & Biases."""
    try:
        return Finding("wandb", metadata.version("wandb"))
    except metadata.PackageNotFoundError:
        return Finding("wandb", "not installed; only for logging.wandb_project", "absent")
