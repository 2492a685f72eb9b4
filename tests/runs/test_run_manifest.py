"""A manifest tells a whole checkpoint from any other."""

from __future__ import annotations

import _thread
import hashlib
import json
import os
from pathlib import Path

import pytest

from megaplug.errors import UserError
from megaplug.runs.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "iter_0000010"
    (folder / "sub").mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 100)
    (folder / "metadata.json").write_text("{}")
    (folder / "sub" / "part").write_bytes(b"part")
    write_manifest(folder, {"fingerprint": "abc"})
    return folder


def test_an_untouched_checkpoint_is_whole(checkpoint):
    assert verify_manifest(checkpoint) == []
    manifest = read_manifest(checkpoint)
    assert manifest["extra"] == {"fingerprint": "abc"} and set(manifest["files"]) == {
        "__0_0.distcp",
        "metadata.json",
        "sub/part",
    }
    part = manifest["files"]["sub/part"]
    assert part == {"size": 4, "sha256": hashlib.sha256(b"part").hexdigest()}


def test_one_flipped_bit_is_found(checkpoint):
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[12345] ^= 1
    shard.write_bytes(content)
    assert verify_manifest(checkpoint) == ["__0_0.distcp has other bytes than were saved"]


def test_all_faults_of_the_files_are_listed_at_once(checkpoint):
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    (checkpoint / "metadata.json").unlink()
    (checkpoint / "sub" / "more").write_text("")
    faults = "\n".join(verify_manifest(checkpoint))
    assert "metadata.json is missing" in faults and "sub/more is not in the manifest" in faults
    assert "has 5 bytes in place of 25600" in faults


def test_a_link_is_a_fault_even_to_the_same_bytes(checkpoint, tmp_path):
    (checkpoint / "sub" / "part").rename(tmp_path / "elsewhere")
    (checkpoint / "sub" / "part").symlink_to(tmp_path / "elsewhere")
    assert "sub/part is neither file nor folder" in verify_manifest(checkpoint)
    (checkpoint / "loop").symlink_to(checkpoint)
    assert "loop is neither file nor folder" in verify_manifest(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[" * 9999, '{"version": 1, "files": {"a": 1}}', '{"version": 3, "files": {}}']
)
def test_a_manifest_that_cannot_be_understood_is_a_fault(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    assert verify_manifest(checkpoint) == ["its manifest.json cannot be understood"]


def test_no_byte_of_the_manifest_changes_unseen(checkpoint):
    path = checkpoint / MANIFEST
    text = path.read_bytes()
    for place in range(0, len(text), 5):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        (fault,) = verify_manifest(checkpoint)
        assert fault in ("its manifest.json was changed", "its manifest.json cannot be understood"), place
        assert read_manifest(checkpoint) is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["extra"].update(fingerprint="abd"),
        lambda content: content["files"].pop("sub/part"),
        lambda content: content.update(version=1),
        lambda content: content.update(sha256="0" * 64),
        lambda content: content.pop("sha256"),
    ],
)
def test_an_edited_manifest_is_named(checkpoint, edit):
    content = json.loads((checkpoint / MANIFEST).read_text())
    edit(content)
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    assert verify_manifest(checkpoint) == ["its manifest.json was changed"]


def test_a_manifest_of_the_time_before_it_had_a_hash_is_understood(checkpoint):
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["sha256"]
    (checkpoint / MANIFEST).write_text(json.dumps({**content, "version": 1}, indent=2) + "\n")
    assert verify_manifest(checkpoint) == []


def test_how_far_the_reading_is_can_be_watched(checkpoint):
    told = []
    assert verify_manifest(checkpoint, told.append) == []
    assert sum(told) == sum(entry["size"] for entry in read_manifest(checkpoint)["files"].values())


def test_a_ctrl_c_does_not_wait_until_all_is_read(tmp_path):
    for number in range(16):
        with (tmp_path / f"{number}").open("wb") as file:
            file.truncate(32 << 20)
    write_manifest(tmp_path)
    told = []

    def tell(num_bytes):
        if not told:
            _thread.interrupt_main()
        told.append(num_bytes)

    with pytest.raises(KeyboardInterrupt):
        verify_manifest(tmp_path, tell)
    assert sum(told) < (16 * 32 << 20) // 2


def test_without_a_manifest_one_that_has_its_name_is_not_said_to_be_half_written(tmp_path):
    said = []
    for place in ("saving/iter_0000010", "copies/.iter_0000010.copying", "checkpoints/iter_0000010"):
        (tmp_path / place).mkdir(parents=True)
        said += verify_manifest(tmp_path / place)
    assert said == [
        "it has no manifest.json: saving it was never completed",
        "it has no manifest.json: saving it was never completed",
        "it has no manifest.json: it was removed, or plain Megatron wrote this",
    ]


def test_a_link_is_not_saved(checkpoint):
    (checkpoint / "link").symlink_to("/etc")
    with pytest.raises(UserError, match="link"):
        write_manifest(checkpoint)


def test_every_file_is_durable_before_the_manifest_has_its_name(checkpoint, monkeypatch):
    (checkpoint / MANIFEST).unlink()
    synced = []
    real = os.fsync

    def fsync(fd):
        synced.append((str(Path(f"/proc/self/fd/{fd}").readlink()), (checkpoint / MANIFEST).exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_manifest(checkpoint)
    before = {path for path, named in synced if not named}
    assert {str(checkpoint / name) for name in ("__0_0.distcp", "metadata.json", "sub/part", "sub")} <= before
    assert (str(checkpoint), False) in synced and synced[-1] == (str(checkpoint), True)


def test_a_manifest_can_be_written_again(checkpoint):
    (checkpoint / "metadata.json").write_text('{"new": 1}')
    write_manifest(checkpoint)
    assert (
        verify_manifest(checkpoint) == [] and json.loads((checkpoint / MANIFEST).read_text())["extra"] == {}
    )
