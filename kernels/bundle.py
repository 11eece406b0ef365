"""An engine bundle: a folder with engines, a tokenizer and a manifest that says what they are. Format only.

    manifest.json   model, target, shapes, preprocessing, precision, parity, sources, sha256 and size of each file
    image           crops (N, size, size, 3) uint8 -> pooled (N, D)
    text            tokens, mask (N, L) int64 -> pooled (N, D) unit norm, level (N,), spread (N,)
    tokenizer.json
    distractors.npy texts (M, D) that a zero-shot score is held against, where the calibration has a temperature

A bundle with a trained head (models/r2.py, mode causal) gives the last K layers of both towers too, and holds

    image           .. and layers (N, K, 1+P, width)
    text            .. and layers (N, K, L, width), sentence (N, D + 1), its embedding (models/backbone.py)
    video           layers and embedding of windows -> what every query reads of them
    query           layers, embedding and mask of texts -> what every window reads of them
    head            one window and all its rows -> their saliency, and what to remember

Engines are `.onnx` for the target onnxruntime and `.engine` for tensorrt-rtx and tensorrt. Those begin with pixels
(N, 3, size, size) fp16, less `mean` and over `std`, in place of crops, and their head serves many streams. They were
built where they could not be run, so they also hold what torch gave for some samples, to be checked at first load:

    reference.npz   "<engine>/in/<name>" and "<engine>/out/<name>"

`kernels/engine.py` runs a bundle, `kernels/build.py` makes one.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernels.errors import BundleError

FORMAT = 2
EMBEDDED = Path(__file__).parent / "bundles" / "lite"
"""The bundle that travels with the project."""
GPU_TARGETS = ("tensorrt-rtx", "tensorrt")
TARGETS = ("onnxruntime", *GPU_TARGETS)


@dataclass(frozen=True)
class HeadShape:
    """What the run half must know of a trained head."""

    depth: int  # K
    window: int  # W: windows that each of the K rings holds
    width: int  # C
    heads: int
    reach: int  # windows that the history holds
    column: int  # E: numbers that it holds of each
    hop_s: float  # seconds between windows: it serves no other hop
    centre: float  # saliency that makes a score of 0.5
    slope: float  # of the logistic curve there


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds, as manifest.json says it."""

    model: str
    target: str  # what runs it: "onnxruntime", "tensorrt-rtx" or "tensorrt"
    width: int  # D of both towers
    image_resize: int  # short side of the scaled frame, pixels
    image_size: int  # side of the crop, pixels
    mean: list[float]  # of red, green and blue, which count from 0 to 255
    std: list[float]
    max_tokens: int  # longest query, special tokens included
    calibration: dict[str, float]  # of the saliency, see kernels/saliency.py
    precision: dict[str, str]  # how the weights of each engine are stored
    parity: dict[str, float] | str  # worst cosine to torch of each output; "pending" until it ran on a GPU
    versions: dict[str, str]  # of the tools that built it
    sources: list[dict[str, str]]  # where the weights come from: package, version, licence
    files: dict[str, dict[str, Any]]  # name -> {"sha256": hex, "bytes": size}
    head: HeadShape | None = None  # None: zero-shot
    profiles: dict[str, list[int]] = field(default_factory=dict)  # GPU: axis -> least, usual and largest length
    compute_capabilities: list[str] = field(default_factory=list)  # GPU: such as "8.6"; none: that which built it
    parity_on: str = ""  # GPU: the one on which it was found
    onnx_parity: dict[str, float] = field(default_factory=dict)  # GPU: of the ONNX that the engines were made from

    def write(self, folder: Path) -> None:
        """Put it into the folder, whole or not at all: a bundle without it is lost."""
        scratch = folder / f".manifest.{os.getpid()}"
        try:
            scratch.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
            scratch.replace(folder / "manifest.json")
        finally:
            scratch.unlink(missing_ok=True)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a bundle but the manifest."""
    return {
        path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }


def check_place(out: Path) -> None:
    """
    Raises:
        BundleError: something stands there that is not a bundle and nothing but one.
    """
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else None
        if not out.exists() or names == set():
            return
        fields = json.loads((out / "manifest.json").read_text())
        if names and "format" in fields and names <= {"manifest.json", *fields["files"]}:
            return
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise BundleError(f"{out} is there, and is no engine bundle or more than one: give another --out")


def load_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and check every file against it.

    Raises:
        BundleError: no such bundle, another format, a field missing, a file missing or changed.
    """
    if not folder.is_dir():
        raise BundleError(f"no engine bundle at {folder}: there is no such folder")
    try:
        fields = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise BundleError(f"{folder} is not an engine bundle: it has no manifest.json") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder}/manifest.json cannot be read: {error}") from None
    if not isinstance(fields, dict) or (found := fields.pop("format", None)) != FORMAT:
        found = found if isinstance(fields, dict) else None
        raise BundleError(f"{folder} is a bundle of format {found}, this version reads {FORMAT}: build it again")
    try:
        head = fields.pop("head", None)
        manifest = Manifest(**fields, head=None if head is None else HeadShape(**head))
    except TypeError as error:
        problem = str(error).partition("__init__() ")[2] or str(error)
        raise BundleError(f"{folder}/manifest.json is damaged: {problem}; build it again") from None
    if wrong := _unsound(manifest):
        raise BundleError(f"{folder}/manifest.json is damaged: {wrong}; build it again")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"engine bundle {folder} is damaged: {name} is missing; build it again")
        if _sha256(path) != expected["sha256"]:
            raise BundleError(f"engine bundle {folder} is damaged: {name} does not match its hash; build it again")
    return manifest


def _unsound(m: Manifest) -> str | None:
    """The first field that cannot be right."""
    files, calibration, wanted = m.files, m.calibration, {"floor", "centre", "slope"}
    checks = {
        "files": isinstance(files, dict)
        and all(isinstance(file, dict) and {"sha256", "bytes"} <= file.keys() for file in files.values()),
        "calibration": isinstance(calibration, dict)
        and wanted <= calibration.keys() <= wanted | {"temperature"}
        and all(map(_number, calibration.values()))
        and calibration.get("temperature", 0) >= 0,
        "head": m.head is None or all(map(_number, asdict(m.head).values())),
        "width, image_resize, image_size or max_tokens": all(
            isinstance(each, int) and each > 0 for each in (m.width, m.image_resize, m.image_size, m.max_tokens)
        ),
        "mean or std": all(
            isinstance(each, list) and len(each) == 3 and all(map(_number, each)) for each in (m.mean, m.std)
        ),
        "precision, profiles or compute_capabilities": isinstance(m.precision, dict)
        and isinstance(m.profiles, dict)
        and isinstance(m.compute_capabilities, list),
    }
    return next((name for name, sound in checks.items() if not sound), None)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
