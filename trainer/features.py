"""Features on disk: one file a video or text, .safetensors, .npy or .npz, and the manifest of a folder of our own.

A folder that `livemoments extract` made:

    features.json                 Manifest
    video/<vid>.safetensors       layers (T, K, 1+P, width) and embedding (T, D) fp16, counted (T,) bool
    text/<hash>.safetensors       layers (K, L, width) fp16, embedding (D + 1,) fp32; the text itself in the metadata
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kernels.errors import InputError

FORMAT = 1
"""Raised when an older program would misread the folder."""
ENDINGS = (".safetensors", ".npy", ".npz")
ONLY = "features"
"""What the array of a file is called that does not name it."""
_MANIFEST = "features.json"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Manifest:
    """What a folder of our own was made with."""

    backbone: str
    """As `models.backbone.load_backbone` takes it."""
    depth: int
    """K."""
    hop_s: float
    patches: int
    """P."""
    video_width: int
    text_width: int
    embedding: int
    """D."""
    floor: float
    """See models.r2.R2Config."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None if the folder is not one of ours. Raises InputError if it is and cannot be understood."""
        path = folder / _MANIFEST
        try:
            content = json.loads(path.read_bytes())
            if (found := content.pop("format")) != FORMAT:
                raise InputError(f"{path} has format {found}, this program reads {FORMAT}: extract the features anew")
            return cls(**content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read ({error}): extract the features anew") from None

    def write(self, folder: Path) -> None:
        with whole(folder / _MANIFEST) as scratch:
            scratch.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch file that takes the place of `path` if all goes well. Who is killed leaves it to who comes next."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def video_file(folder: Path, vid: str) -> Path:
    """In a folder of ours."""
    return folder / "video" / f"{vid}.safetensors"


def text_file(folder: Path, query: str) -> Path:
    """In a folder of ours; a text need not be a file's name, nor fit in one."""
    return folder / "text" / f"{hashlib.sha256(query.encode()).hexdigest()[:32]}.safetensors"


def find(folder: Path, *stems: str) -> Path | None:
    """The file of one of these names, with any of the endings."""
    paths = (folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, str] | None = None) -> None:
    """All of it or nothing. Raises OSError."""
    with whole(path) as scratch:
        try:
            save_file(arrays, scratch, dict(metadata or {}))
        except SafetensorError as error:  # how it says that the disk is full
            raise OSError(str(error)) from None


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the arrays in a file, from its head alone. Raises InputError."""
    with _reading(path):
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if path.suffix == ".npy":
            with path.open("rb") as stream:
                return {ONLY: _npy_shape(stream)}
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as stream:
                    found[name.removesuffix(".npy")] = _npy_shape(stream)
            return found


def read(path: Path) -> Arrays:
    """All arrays of a file; those of .npy and .safetensors are mapped, not read. Raises InputError."""
    with _reading(path):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:  # torch's are mapped, those of numpy would be copied
                return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        if path.suffix == ".npy":
            return {ONLY: npy.open_memmap(path, mode="r")}
        with path.open("rb") as stream, np.load(stream) as archive:  # by name, NumPy leaves a broken file open
            return dict(archive)


def _npy_shape(stream: Any) -> tuple[int, ...]:
    version = npy.read_magic(stream)
    shape, _, _ = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    return tuple(shape)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as features: {reason}") from None
