"""A small folder of the tvstream form, made up: what a class looks like only half resembles its text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

CLASSES, WIDTH = 16, 32


def make_tvstream(folder: Path, *, videos: int = 6, frames: int = 80, seed: int = 0) -> Path:
    """The last two videos are val and test."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    text, looks = (_unit(rng.normal(size=(CLASSES, WIDTH))) for _ in range(2))
    vids = [f"v{number}" for number in range(videos)]
    for vid in vids:
        pts = np.cumsum(rng.uniform(1.0, 5.0, frames)) - 1.0
        shown = np.zeros((CLASSES, frames), bool)
        for row in shown:
            start = rng.integers(0, frames - 8)
            row[start : start + rng.integers(3, 8)] = True
        content = shown.T @ (0.5 * text + looks) + 2.0 * rng.normal(size=(frames, WIDTH)) / WIDTH**0.5
        label, frame = np.nonzero(shown)
        arrays: dict[str, NDArray[Any]] = {
            "pts": pts.astype(np.float32),
            "features": _unit(content).astype(np.float16),
            "label_frame": frame.astype(np.int32),
            "label_class": label.astype(np.int16),
        }
        save_file(arrays, folder / f"{vid}.safetensors")
    save_file({"text": text.astype(np.float32)}, folder / "text.safetensors")
    splits = {"train": vids[:-2], "val": vids[-2:-1], "test": vids[-1:]}
    names = [f"thing {number}" for number in range(CLASSES)]
    (folder / "index.json").write_text(json.dumps({"classes": names, "splits": splits}))
    return folder


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / lengths
