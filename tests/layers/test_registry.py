from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder, MetadataPathFinder
from pathlib import Path

import pytest

from megaplug.errors import UserError
from megaplug.layers import registry
from megaplug.layers.registry import CORE_ATTENTION, AttentionSizes, Limits, Plugin
from megaplug.layers.registry.needs import is_found
from megaplug.layers.registry.store import _REGISTERED

ROOT = Path(__file__).parents[2]

DECLARATION = """
from megaplug.layers.registry import CORE_ATTENTION, Parameter, Plugin

plugin = Plugin(
    name="echo",
    kind=CORE_ATTENTION,
    target="{package}.module:Echo",
    parameters={{"gain": Parameter(float, 1.0, "factor on the values")}},
)
"""

MODULE = """
import torch

class Echo(torch.nn.Module):
    def __init__(self, config, layer_number, attn_mask_type, attention_type, gain, **kwargs):
        super().__init__()
        self.gain = gain
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a package: its files, and a dist-info with an entry point."""
    known = dict(_REGISTERED)

    def install(package="echo_layers", name="echo", declaration=DECLARATION):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "declaration.py").write_text(declaration.format(package=package))
        (tmp_path / package / "module.py").write_text(MODULE)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[megaplug.layers]\n{name} = {package}.declaration:plugin\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    _REGISTERED.clear()
    _REGISTERED.update(known)
    for module in [module for module in sys.modules if module.partition(".")[0] in {"echo_layers", "broken"}]:
        del sys.modules[module]


def test_asking_the_registry_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from megaplug.layers import registry;"
        "plugin = registry.lookup('core_attention', 'flash');"
        "registry.limits_problems(plugin, device='cpu', dtype='fp32', head_dim=64);"
        "print(sorted({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_built_in_attentions_are_known():
    assert {"flash", "local", "te"} <= set(registry.names(CORE_ATTENTION))


def test_a_misspelt_name_is_answered_with_the_likeliest_and_all_known():
    with pytest.raises(UserError) as caught:
        registry.lookup(CORE_ATTENTION, "flsh")
    assert "'flsh'" in caught.value.message
    assert "did you mean 'flash'" in caught.value.hint
    assert "dilated, flash, local, ring, ring_dilated, te" in caught.value.hint


def test_one_name_cannot_be_declared_for_two_targets(installed):
    flash = registry.lookup(CORE_ATTENTION, "flash")
    assert registry.register(flash) is flash
    with pytest.raises(UserError, match=r"declared twice.*flash:FlashAttention.*other:Other"):
        registry.register(replace(flash, target="other:Other"))
    with pytest.raises(UserError, match="target"):
        registry.register(Plugin("odd", CORE_ATTENTION, "no_attribute"))


def test_every_wrong_parameter_is_listed_with_what_would_be_right():
    flash = registry.lookup(CORE_ATTENTION, "flash")
    unknown, wrong = registry.validate_params(flash, {"cuda_kernl": "auto", "cuda_kernel": 3})
    assert unknown.key == "attention.params.cuda_kernl"
    assert "did you mean 'cuda_kernel'" in unknown.hint
    assert "3 is int, but str is needed" in wrong.message
    (choice,) = registry.validate_params(flash, {"cuda_kernel": "math"})
    assert "auto, flash, cudnn, efficient" in choice.hint
    with pytest.raises(UserError, match="'math' is not possible"):
        registry.resolve_params(flash, {"cuda_kernel": "math"})
    assert registry.resolve_params(flash, {}) == {"cuda_kernel": "auto"}


def test_a_package_outside_the_repository_is_found_through_its_entry_point(installed):
    installed()
    plugin = registry.lookup(CORE_ATTENTION, "echo")
    assert plugin.target == "echo_layers.module:Echo"
    assert "echo" in registry.names(CORE_ATTENTION)
    assert "echo_layers.module" not in sys.modules
    assert registry.load_target(plugin).__name__ == "Echo"
    assert registry.resolve_params(plugin, {"gain": 2}) == {"gain": 2}
    assert registry.validate_params(plugin, {"gain": True})


def test_a_package_in_an_archive_is_found_too(installed, tmp_path, monkeypatch):
    installed()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    with pytest.raises(UserError, match="no core_attention called 'echo'"):
        registry.lookup(CORE_ATTENTION, "echo")
    archive = shutil.make_archive(str(tmp_path.parent / f"{tmp_path.name}_packages"), "zip", tmp_path)
    monkeypatch.syspath_prepend(archive)
    assert registry.lookup(CORE_ATTENTION, "echo").target == "echo_layers.module:Echo"


def test_a_package_that_only_a_finder_of_its_own_knows_is_found_too(installed, tmp_path, monkeypatch):
    installed()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])

    class Finder:
        def find_spec(self, name, path=None, target=None):
            return PathFinder.find_spec(name, [str(tmp_path)]) if name == "echo_layers" else None

        def find_distributions(self, context):
            return MetadataPathFinder.find_distributions(DistributionFinder.Context(path=[str(tmp_path)]))

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    assert registry.lookup(CORE_ATTENTION, "echo").target == "echo_layers.module:Echo"


def test_the_metadata_of_packages_is_not_read_where_none_declares_a_layer():
    code = (
        "import sys; from megaplug.layers import registry;"
        "print(len(registry.names('core_attention')), 'importlib.metadata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(registry.names(CORE_ATTENTION))), "False"]


def test_a_broken_package_stops_only_who_names_it_and_is_named(installed):
    installed("broken", "ruin", "raise ValueError('half installed')")
    assert registry.lookup(CORE_ATTENTION, "flash").name == "flash"
    with pytest.raises(UserError, match=r"ruin.*of broken cannot be imported.*half installed"):
        registry.lookup(CORE_ATTENTION, "ruin")
    with pytest.raises(UserError) as caught:
        registry.lookup(CORE_ATTENTION, "other")
    assert "half installed" in caught.value.hint


def test_an_entry_point_that_takes_a_built_in_name_or_names_no_plugin_is_refused(installed):
    installed(name="flash", declaration=DECLARATION.replace('"echo"', '"flash"'))
    with pytest.raises(UserError, match="declared twice"):
        registry.lookup(CORE_ATTENTION, "flash")
    installed("broken", "ruin", "plugin = 3")
    with pytest.raises(UserError, match="is int"):
        registry.lookup(CORE_ATTENTION, "ruin")


def test_a_target_that_cannot_be_imported_is_a_users_error_with_the_cause():
    for target, cause in (("no_such_module:X", "no_such_module"), ("json:Missing", "Missing")):
        with pytest.raises(UserError, match=cause):
            registry.load_target(Plugin("odd", CORE_ATTENTION, target))
    needy = Plugin("odd", CORE_ATTENTION, "json:loads", limits=Limits(requires=("no_such_module",)))
    with pytest.raises(UserError, match="needs no_such_module"):
        registry.load_target(needy)


def keys(name, **asked):
    return [
        problem.key for problem in registry.limits_problems(registry.lookup(CORE_ATTENTION, name), **asked)
    ]


def test_limits_name_every_problem_of_a_job_at_once():
    asked = {
        "attention_dropout": 0.1,
        "context_parallel_size": 2,
        "packed_sequences": True,
        "mask": "padding",
    }
    assert keys("flash", device="cpu", **asked) == [
        "model.attention_dropout",
        "topology.cp",
        "attention.name",
        "attention.name",
    ]
    assert keys("flash", device="cpu", head_dim=64, dtype="bf16") == []


def test_limits_depend_on_the_device_and_ask_only_the_certain_where_it_is_unknown():
    assert keys("flash", device="cuda", attention_dropout=0.1) == []
    assert keys("flash", device=None, attention_dropout=0.1) == []
    assert keys("flash", device="cuda", head_dim=512) == ["model.kv_channels"]
    assert keys("flash", device="cuda", head_dim=20) == ["model.kv_channels"]
    assert keys("flash", device="cpu", head_dim=500) == []
    assert keys("flash", device="cuda", dtype="fp64") == ["precision"]
    assert "attention.name" in keys("te", device="cpu")


def test_costs_are_those_of_a_triangle_and_of_a_square():
    sizes = AttentionSizes(
        batch_size=2, seq_length=4, num_heads=8, num_kv_heads=2, head_dim=16, element_size=2
    )
    flash, local = (registry.lookup(CORE_ATTENTION, name) for name in ("flash", "local"))
    assert flash.forward_flops(sizes) == 4 * 2 * 8 * 16 * 10
    assert local.forward_flops(sizes) == 4 * 2 * 8 * 16 * 16
    assert flash.saved_bytes_per_token(sizes) == 2 * (8 + 2) * 16 * 2 + 4 * 8
    assert local.saved_bytes_per_token(sizes) == 8 * (3 * 16 * 2 + 4 * 6)


def test_a_module_is_looked_for_without_importing_the_package_above_it(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_mine").mkdir()
    (tmp_path / "kernels_of_mine" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "kernels_of_mine" / "cute").mkdir()
    (tmp_path / "kernels_of_mine" / "cute" / "interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert is_found("kernels_of_mine.cute.interface")
    assert not is_found("kernels_of_mine.cute.other") and not is_found("kernels_of_mine.other.interface")
    assert not is_found("no_kernels_of_mine.cute")
