"""The folder of the clips: names, what it may take of the disk, and what goes when that is used up.

A clip is NAME.mp4 with its thumbnail NAME.jpg; what is being written ends in .part. Files of other names are none of
ours: they are neither counted nor removed.
"""

import contextlib
import fcntl
import os
import re
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

from kernels.errors import InputError
from stream.types import NS

FREE_BYTES = 64 << 20
"""Left on the disk for others, or a 20th of a disk that is smaller than 20 times that."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}_[A-Za-z0-9._-]{1,128}_\d{8}T\d{6}\.\d{3}Z(-\d+)?")
_FILE = re.compile(rf"(?P<name>{_NAME.pattern})\.(mp4|jpg)(?P<part>(\.media)?\.part)?")


class Shelf:
    """The clips in one folder, the oldest first. Any thread may call."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Makes the folder if there is none; what a killed process has left half written is removed.

        Raises:
            InputError: it cannot be used, or another process uses it.
        """
        self.folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        try:
            folder.mkdir(exist_ok=True)
            self._held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"the folder of the clips {folder} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sizes = self._look()
        except OSError as error:
            os.close(self._held)
            reason = "another livemoments uses it" if isinstance(error, BlockingIOError) else error.strerror
            raise InputError(f"the folder of the clips {folder} cannot be used: {reason}") from None
        self.make_room(0)

    @property
    def nbytes(self) -> int:
        """Of all clips that are whole, with their thumbnails."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Lets others have the folder."""
        os.close(self._held)

    def name(self, stream: str, query_id: str, utc_ns: int) -> str:
        """A new name for a clip of a moment that began then."""
        seconds, rest = divmod(utc_ns, NS)
        query = re.sub(r"[^A-Za-z0-9._-]", "-", query_id)[:128]
        stem = f"{stream}_{query}_{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}.{rest // 1_000_000:03d}Z"
        name, number = stem, 1
        while any(self.folder.glob(f"{name}.mp4*")):
            number += 1
            name = f"{stem}-{number}"
        return name

    def video(self, name: str) -> Path:
        """Where a clip goes."""
        return self.folder / f"{name}.mp4"

    def add(self, name: str, thumbnail: bytes | None) -> tuple[int, bool]:
        """Takes a clip whose video is whole: its bytes, and whether it has a thumbnail. That may find no room."""
        size, part = self.video(name).stat().st_size, self.folder / f"{name}.jpg.part"
        has_thumbnail = False
        if thumbnail is not None:
            try:
                part.write_bytes(thumbnail)
                part.replace(part.with_suffix(""))
                size, has_thumbnail = size + len(thumbnail), True
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        with self._lock:
            self._sizes[name] = size
        return size, has_thumbnail

    def make_room(self, coming: int) -> bool:
        """Removes the oldest until `coming` bytes more are within the budget, and leave others some of the disk.

        False: they never would be, and nothing is removed for them.

        Raises:
            OSError: the folder has gone.
        """
        with self._lock:
            held = sum(self._sizes.values())
            disk = shutil.disk_usage(self.folder)
            # What is over, of the budget and of the disk; only what is to come takes of the latter.
            over = held + coming - self._max_bytes
            if coming:
                over = max(over, coming + min(FREE_BYTES, disk.total // 20) - disk.free)
            if over > held:
                return False
            while over > 0:
                over -= self._remove(next(iter(self._sizes)))
            return True

    def find(self, name: str) -> Path | None:
        """The file of a clip or a thumbnail, by its name alone; None: there is none."""
        stem, _, ending = name.rpartition(".")
        if ending not in ("mp4", "jpg") or not _NAME.fullmatch(stem):
            return None
        path = self.folder / name
        return path if path.is_file() and not path.is_symlink() else None

    def _remove(self, name: str) -> int:
        """Its bytes."""
        for ending in ("mp4", "jpg"):
            with contextlib.suppress(OSError):  # somebody else's hand: what is left is found at the next start
                (self.folder / f"{name}.{ending}").unlink()
        return self._sizes.pop(name)

    def _look(self) -> dict[str, int]:
        """The sizes of what is there, the oldest first."""
        found: dict[str, tuple[int, int]] = {}
        for path in self.folder.iterdir():
            if not (match := _FILE.fullmatch(path.name)):
                continue
            stem = match["name"]
            if match["part"] or not self.video(stem).exists():
                path.unlink(missing_ok=True)
            else:
                stat = path.stat()
                age, size = found.get(stem, (stat.st_mtime_ns, 0))
                found[stem] = min(age, stat.st_mtime_ns), size + stat.st_size
        return {stem: size for stem, (_, size) in sorted(found.items(), key=lambda each: each[1])}
