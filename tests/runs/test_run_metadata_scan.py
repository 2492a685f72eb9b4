"""A `.metadata` may import what a checkpoint needs and nothing else."""

from __future__ import annotations

import _compat_pickle
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megaplug.runs.metadata_scan import ALLOWED_GLOBALS, scan_metadata


def _scan(tmp_path, content: bytes):
    path = tmp_path / ".metadata"
    path.write_bytes(content)
    return scan_metadata(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp")
    state = {
        "weight": torch.zeros(3, 4),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "step": torch.tensor(3),
        "args": {"list": [1, "two"]},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder / ".metadata"


@pytest.mark.filterwarnings("ignore")
def test_what_torch_writes_is_harmless(real, tmp_path):
    assert scan_metadata(real) == []
    with real.open("rb") as file:
        metadata = pickle.load(file)  # noqa: S301  our own
    for protocol in range(2, 6):
        assert _scan(tmp_path, pickle.dumps(metadata, protocol)) == []
    assert _scan(tmp_path, pickle.dumps([OrderedDict(a=1), Path("x")])) == []


class _Runs:
    def __reduce__(self):
        return subprocess.run, (["touch", "/tmp/never"],)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_program_is_refused(tmp_path, protocol):
    content = pickle.dumps({"a": torch.Size([1]), "b": _Runs()}, protocol)
    assert any("would import" in fault and ".run" in fault for fault in _scan(tmp_path, content))


def test_no_allowed_name_means_another_in_an_old_pickle():
    """Below protocol 3 Python renames what it is asked for."""
    assert not any(name in _compat_pickle.NAME_MAPPING for name in ALLOWED_GLOBALS)
    assert not any(module in _compat_pickle.IMPORT_MAPPING for module, _ in ALLOWED_GLOBALS)


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    "content",
    [
        # names taken from the memo
        b"\x80\x04" + _text("os") + b"\x94" + _text("system") + b"\x940" + b"0h\x00h\x01\x93.",
        # a memo entry overwritten after it was read as harmless
        b"\x80\x04" + _text("torch") + b"q\x000" + _text("os") + b"q\x000h\x00" + _text("Size") + b"\x93.",
        # names hidden behind other instructions: a swapped order, a computed text
        b"\x80\x04" + _text("os") + _text("x") + b"0" + _text("system") + b"\x93.",
        b"\x80\x04" + b"U\x02os" + b"U\x06system" + b"\x93.",
        # the harmless pair is not what is on top of the stack
        b"\x80\x04" + _text("os") + _text("system") + _text("torch") + _text("Size") + b"00\x93.",
        # other ways to call something
        b"(ios\nsystem\n.",
        b"(cos\nsystem\no.",
        b"\x82\x01.",
        b"Pid\n.",
        # an attribute of something allowed
        b"\x80\x04" + _text("torch") + _text("Size.__class__") + b"\x93.",
        # a memo of billions of entries
        b"\x80\x04" + _text("x") + b"r\xff\xff\xff\xff.",
        # broken
        b"",
        b"\x80\x04",
        b"hello",
        b"\x80\x04\x95\xff",
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, content):
    assert _scan(tmp_path, content)


def test_what_was_planted_after_a_harmless_pickle_is_never_read(tmp_path):
    assert _scan(tmp_path, pickle.dumps({"a": 1}) + pickle.dumps(_Runs())) == []
