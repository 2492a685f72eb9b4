"""No program that was put into a checkpoint runs in a rank, even where the manifest agrees."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from small_checkpoints import (
    COMMON,
    STATE,
    craft_common,
    craft_metadata,
    craft_object,
    make_checkpoint,
    write_again,
)
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.api import CheckpointException

from megaplug.runs.checkpoints import faults_of
from megaplug.runs.manifest import verify_manifest
from megaplug.runs.object_scan import allowed
from megaplug.runtime.unpickling import restrict_metadata, restrict_objects


@pytest.fixture
def restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two repairs, for this test only."""
    planner = default_planner.DefaultLoadPlanner
    monkeypatch.setattr(filesystem, "pickle", pickle)
    monkeypatch.setattr(planner, "load_bytes", planner.load_bytes)
    restrict_metadata()
    restrict_objects()


def load(checkpoint: Path) -> dict[str, object]:
    """As Megatron loads what all ranks share: `dist_checkpointing.load_common_state_dict`."""
    state = {COMMON: io.BytesIO(), "output_layer.weight": torch.zeros(64, 32)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return state


def loads(checkpoint: Path) -> str:
    """Why it cannot be loaded; empty if it can."""
    try:
        load(checkpoint)
    except CheckpointException as error:
        return str(error)
    return ""


@pytest.mark.parametrize("craft", ["metadata", "object"])
def test_a_stock_load_runs_what_was_put_into_a_checkpoint(tmp_path: Path, craft: str) -> None:
    marker, checkpoint = tmp_path / "ran", make_checkpoint(tmp_path, 10)
    put(craft, checkpoint, marker)
    assert verify_manifest(checkpoint) == []
    loads(checkpoint)
    assert marker.exists()


def put(craft: str, checkpoint: Path, marker: Path) -> None:
    if craft == "metadata":
        craft_metadata(checkpoint, marker)
    elif craft == "object":
        craft_object(checkpoint, COMMON, marker)
    else:
        craft_common(checkpoint, marker)


@pytest.mark.parametrize("craft", ["metadata", "object"])
def test_with_the_repairs_it_is_refused(tmp_path: Path, craft: str, restricted: None) -> None:
    marker, checkpoint = tmp_path / "ran", make_checkpoint(tmp_path, 10)
    put(craft, checkpoint, marker)
    assert "open" in loads(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("craft", ["metadata", "object", "common"])
def test_it_is_found_before_a_rank_starts(tmp_path: Path, craft: str) -> None:
    marker, checkpoint = tmp_path / "ran", make_checkpoint(tmp_path, 10)
    assert faults_of(checkpoint) == []
    put(craft, checkpoint, marker)
    (fault,) = faults_of(checkpoint)
    named = {"metadata": ".metadata", "object": f"__0_0.distcp: {COMMON}", "common": "common.pt"}
    assert fault.startswith(named[craft]) and "would import _io.open" in fault
    assert not marker.exists()


def load_common(checkpoint: str) -> str:
    from megatron.core.dist_checkpointing.strategies import common

    try:
        return f"it was loaded: {common.load_common(checkpoint)}"
    except pickle.UnpicklingError as error:
        return str(error)


def test_megatron_s_common_pt_is_refused_by_torch_itself(tmp_path: Path) -> None:
    marker, checkpoint = tmp_path / "ran", make_checkpoint(tmp_path, 10)
    craft_common(checkpoint, marker)
    (said,) = run_ranks(1, load_common, str(checkpoint), folder=tmp_path / "ranks")
    assert "Unsupported global: GLOBAL _io.open" in said
    assert not marker.exists()


def allowed_by_torch() -> list[str]:
    import megatron.core  # noqa: F401  it registers its classes
    from torch import _weights_only_unpickler as torch_s

    return [*torch_s._get_allowed_globals(), *torch_s._get_user_allowed_globals()]


def test_with_the_repairs_all_comes_back_as_it_was_saved(tmp_path: Path, restricted: None) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    found = load(checkpoint)
    assert torch.equal(found["output_layer.weight"], torch.full((64, 32), 10.0))
    assert found[COMMON][0]["iteration"] == 10 and torch.equal(found[COMMON][0]["rng"], STATE["rng"])
    nested = {"outer": {"object": ""}}
    dcp.save({"outer": {"object": "hello"}}, checkpoint_id=tmp_path / "nested", no_dist=True)
    dcp.load(nested, checkpoint_id=tmp_path / "nested", no_dist=True)
    assert nested == {"outer": {"object": "hello"}}


def test_what_is_allowed_beforehand_is_what_torch_and_megatron_load(tmp_path: Path) -> None:
    (names,) = run_ranks(1, allowed_by_torch, folder=tmp_path / "ranks")
    assert len(names) > 100
    assert [name for name in names if not allowed(*name.rsplit(".", 1))] == []
    wrong = ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "io.open"]
    wrong += ["torch._utils._import_dotted_name", "torch.utils.Tensor", "torch.float32.__class__"]
    assert [name for name in wrong if allowed(*name.rsplit(".", 1))] == []


def test_a_checkpoint_that_reads_other_files_is_refused(tmp_path: Path) -> None:
    checkpoint, secret = make_checkpoint(tmp_path, 10), tmp_path / "secret.pt"
    (checkpoint / "__0_0.distcp").rename(secret)
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    metadata = checkpoint / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../secret.pt"))
    write_again(checkpoint)
    assert load(checkpoint)[COMMON], "stock torch reads it"
    (fault,) = faults_of(checkpoint)
    assert "'../secret.pt'" in fault
