"""The folder of the clips: names, what is found by them, and what is none of its business."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.errors import InputError
from stream.clips.shelf import Shelf

UTC_NS = 1_777_863_721_123_456_789
NAME = "cam.mp4_a-ball-at-0.5_20260504T030201.123Z"


def put(folder: Path, name: str, size: int, age_s: int) -> None:
    path = folder / name
    path.write_bytes(bytes(size))
    os.utime(path, (1_700_000_000 - age_s,) * 2)


def test_names_are_new_and_safe(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "clips", 1000)
    assert shelf.name("cam.mp4", "a-ball-at-0.5", UTC_NS) == NAME
    (shelf.folder / f"{NAME}.mp4.part").touch()
    assert shelf.name("cam.mp4", "a-ball-at-0.5", UTC_NS) == f"{NAME}-2"
    assert shelf.name("a", "../b/c", UTC_NS) == "a_..-b-c_20260504T030201.123Z"
    shelf.close()


def test_only_clips_are_found(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "clips", 1000)
    (tmp_path / "secret").write_text("x")
    for name in (f"{NAME}.mp4", f"{NAME}.jpg", f"{NAME}-2.mp4.part", "notes.mp4"):
        (shelf.folder / name).write_text("x")
    (shelf.folder / f"{NAME}-3.mp4").symlink_to(tmp_path / "secret")
    assert shelf.find(f"{NAME}.mp4") == shelf.folder / f"{NAME}.mp4"
    assert shelf.find(f"{NAME}.jpg") == shelf.folder / f"{NAME}.jpg"
    others = f"{NAME}-2.mp4.part", "notes.mp4", f"{NAME}-3.mp4", f"{NAME}-4.mp4", "../secret", f"../clips/{NAME}.mp4"
    for name in (*others, "", ".", "..", f"{NAME}.mp4\n", f"{NAME}.mp4\0", f"/{NAME}.mp4"):
        assert shelf.find(name) is None, name
    shelf.close()


def test_a_restart_finds_what_is_there_and_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    stems = [NAME, *(f"{NAME}-{number}" for number in (2, 3, 4))]
    for number, stem in enumerate(stems):
        put(tmp_path, f"{stem}.mp4", 100, 50 - number)
    put(tmp_path, f"{stems[0]}.jpg", 20, 50)
    for name in ("mine.mp4", "mine.mp4.part", "events.db"):
        put(tmp_path, name, 5000, 99)
    for name in (f"{NAME}-9.mp4.part", f"{NAME}-9.mp4.media.part", f"{NAME}-8.jpg", f"{NAME}-7.jpg.part"):
        put(tmp_path, name, 5000, 1)
    shelf = Shelf(tmp_path, 330)
    left = {"mine.mp4", "mine.mp4.part", "events.db"}
    assert {path.name for path in tmp_path.iterdir()} == left | {f"{stem}.mp4" for stem in stems[1:]}
    assert shelf.nbytes == 300
    assert shelf.make_room(30) and shelf.nbytes == 300
    assert not shelf.make_room(400) and shelf.nbytes == 300  # for what never fits nothing goes
    (tmp_path / f"{stems[1]}.mp4").unlink()  # by somebody else's hand
    assert shelf.make_room(200) and shelf.nbytes == 100
    assert {path.name for path in tmp_path.iterdir()} == left | {f"{stems[3]}.mp4"}
    (tmp_path / f"{NAME}-5.mp4").write_bytes(bytes(50))
    assert shelf.add(f"{NAME}-5", bytes(7)) == (57, True) and shelf.nbytes == 157
    shelf.close()


def test_one_process_uses_the_folder(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 1000)
    script = f"from pathlib import Path; from stream.clips.shelf import Shelf; Shelf(Path({str(tmp_path)!r}), 9)"
    words = [sys.executable, "-c", script]
    assert "another livemoments uses it" in subprocess.run(words, capture_output=True, text=True).stderr
    shelf.close()
    assert subprocess.run(words).returncode == 0
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used"):
        Shelf(tmp_path / "file", 1000)
