"""What is installed from a wheel is whole, stands beside one's own configuration, and replaces nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# No index, no folder of wheels and no settings of this machine: pip may use only what it is given.
ALONE = {
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


def run(*command, cwd, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with the hatchling of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = (
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    )
    run(sys.executable, *build, cwd=folder, **ALONE)
    (built,) = folder.glob("megaplug-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's contents and its commands; what it needs comes from this environment."""
    site = tmp_path_factory.mktemp("site")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        site,
        wheel,
        cwd=site,
        **ALONE,
    )
    return site


def test_the_wheel_carries_every_module_and_config_and_nothing_of_the_workshop(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {f"megaplug/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert ours
    # hatchling leaves out what .gitignore names
    ours |= {str(path.relative_to(ROOT)) for path in (ROOT / "megaplug").rglob("*.py")}
    assert ours - names == set()
    assert "megaplug/job/megatron_arguments.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megaplug"}


def test_a_persons_own_config_dir_composes_with_ours_outside_the_clone(installed, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "mine.yaml").write_text(
        "defaults: [tiny, _self_]\nname: mine\nnum_layers: 3\nhidden_size: 192\n"
    )
    where = run(
        sys.executable,
        "-c",
        "import megaplug; print(megaplug.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert Path(where.strip()).is_relative_to(installed)
    command = (
        installed / "bin" / "megaplug-train",
        "--config-dir",
        "mine",
        "model=mine",
        "topology=tp2",
        "--cfg",
        "job",
    )
    shown = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    for line in ("num_layers: 3", "hidden_size: 192", "num_attention_heads: 4", "tp: 2"):
        assert line in shown


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("megaplug-plan", "action=NAME"),
        ("megaplug-prepare", "train_tokenizer"),
        ("megaplug-checkpoint", "prune"),
        ("megaplug-runs", "compare"),
    ],
)
def test_the_other_commands_are_installed_too(command, says, installed, tmp_path):
    shown = run(installed / "bin" / command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert says in shown


def test_an_installed_planner_has_its_machines_and_its_constants(installed, tmp_path):
    words = ["model=llama3_8b", "topology=tp4_pp2", "cluster=h100", "precision=bf16", "train=pretrain"]
    shown = run(installed / "bin" / "megaplug-plan", *words, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "TP4 PP2" in shown and "a step ± " in shown


@pytest.mark.parametrize("extra", ["", "[te]"])
@pytest.mark.parametrize(
    "torch", ["2.11.0+custom", "2.11.0a0+eb65b36914.nv26.2", "2.13.0a0+5228986c39.nv26.8"]
)
def test_pip_replaces_neither_torch_nor_transformer_engine(wheel, tmp_path, torch, extra):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    (site,) = venv.glob("lib/python3*/site-packages")
    there = {"torch": torch, "transformer_engine": "2.11.0+c188b533"}
    for wanted in map(Requirement, needed(wheel)):
        if wanted.marker is None and wanted.name not in there:
            there[wanted.name] = metadata.version(wanted.name)
    for name, version in there.items():
        pretend_installed(site, name, version)
    # Whatever pip wanted to replace it could not find anywhere, and would fail.
    install = ("install", "--dry-run", "--quiet", "--report", "-", f"{wheel}{extra}")
    report = run(
        sys.executable, "-m", "pip", "--python", venv / "bin" / "python", *install, cwd=tmp_path, **ALONE
    )
    assert [item["metadata"]["name"] for item in json.loads(report)["install"]] == ["megaplug"]


def needed(wheel):
    """The lines `Requires-Dist` of a wheel."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]


def pretend_installed(site, name, version):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")
