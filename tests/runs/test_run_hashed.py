"""What a writer says of its file is what the file holds."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import pytest

from megaplug.runs.hashed import HashedFile, Written, hashing_open, read_notes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "saving" / "iter_0000010" / "sub").mkdir(parents=True)
    return tmp_path / "saving"


def test_the_note_is_on_the_bytes_that_arrived(place: Path) -> None:
    chance = random.Random(3)
    names = ["__0_0.distcp", "sub/part", "empty"]
    for name in names:
        with hashing_open(place)(str(place / "iter_0000010" / name), "wb") as file:
            for size in [] if name == "empty" else [1, 7, 5000, 3 << 20, 4096, 0]:
                assert file.write(memoryview(chance.randbytes(size))) == size
            offset = file.tell()
        assert offset == (place / "iter_0000010" / name).stat().st_size
    found = read_notes(place / "iter_0000010")
    assert sorted(found) == sorted(names)
    for name in names:
        content = (place / "iter_0000010" / name).read_bytes()
        assert found[name] == Written(len(content), hashlib.sha256(content).hexdigest())


def test_everything_else_is_opened_as_ever(place: Path, tmp_path: Path) -> None:
    opened = hashing_open(place)
    (tmp_path / "saved").mkdir()
    for path, mode in ((tmp_path / "saved" / "x", "wb"), (place / "tracker", "wb"), (place / "text", "w")):
        with opened(path, mode) as file:
            file.write(b"x" if "b" in mode else "x")
        assert not isinstance(file, HashedFile) and path.read_bytes() == b"x"
    with opened(place / "text") as file:
        assert file.read() == "x"
    assert [path.name for path in place.iterdir() if "notes" in path.name] == []


def test_what_was_not_written_to_its_end_has_no_note(place: Path) -> None:
    opened, folder = hashing_open(place), place / "iter_0000010"
    with pytest.raises(ValueError, match="in the middle"), opened(folder / "broken", "wb") as file:
        file.write(b"some")
        raise ValueError("in the middle")
    assert file.closed and read_notes(folder) == {}


def test_a_full_disk_is_told_and_has_no_note(place: Path) -> None:
    (place / "iter_0000010" / "full").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match="No space left"),
        hashing_open(place)(place / "iter_0000010" / "full", "wb") as file,
    ):
        file.write(b"little")
    assert file.closed and read_notes(place / "iter_0000010") == {}


def test_nobody_goes_back_in_it(place: Path) -> None:
    with hashing_open(place)(place / "iter_0000010" / "x", "wb") as file:
        file.write(b"abc")
        assert not file.seekable()
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
