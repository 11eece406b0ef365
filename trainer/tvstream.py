"""Data sets of the tvstream form: pooled features of keyframes, with the classes that a detector saw on each.

    index.json         {"classes": [names], "splits": {"train": [vids], "val": [..], "test": [..]}}
    text.safetensors   text (classes, D): the backbone's embedding of "a {class}"
    <vid>.safetensors  pts (n,) s, ascending; features (n, D); label_frame, label_class (m,): class c is on frame f

A query is a class that is on at least 3 and at most 20% of a video's keyframes; a moment is a run of such keyframes,
from midpoint to midpoint. One layer, no patches, one word: what is learned here is time, not depth.
"""

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kernels.errors import InputError
from trainer.dataset import WINDOW_S, Dataset, Sample, Text, Video, distances
from trainer.resample import first_windows, resample

BACKBONE = "openai/clip-vit-base-patch32"
UNSEEN_EVERY = 8
"""Classes whose index is a multiple of it are never trained on."""
FEWEST, LARGEST_SHARE = 3, 0.2  # keyframes of a class that make it a query

Arrays = dict[str, NDArray[Any]]


def load_tvstream(folder: Path, hop_s: float, splits: Sequence[str] = ("train", "val", "test")) -> Dataset:
    """All videos of the splits, in memory.

    Raises:
        InputError: a file is missing or malformed.
    """
    index = _index(folder)
    classes: list[str] = index["classes"]
    text = _read(folder / "text.safetensors", {"text": 2})["text"].astype(np.float32)
    if len(text) != len(classes):
        raise InputError(f"{folder}/text.safetensors has {len(text)} texts, index.json names {len(classes)} classes")
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    # Two classes of one name are two queries; where either is unseen, the other is not trained on.
    queries = [f"{name} ({place})" if classes.count(name) > 1 else name for place, name in enumerate(classes)]
    unseen = frozenset(queries[::UNSEEN_EVERY])
    kept_out = {queries[place] for place, name in enumerate(classes) if name in classes[::UNSEEN_EVERY]}
    videos: dict[str, Video] = {}
    samples: dict[str, list[Sample]] = {}
    for split in splits:
        found: list[Sample] = []
        for vid in index["splits"].get(split, []):
            videos[vid], asked = _load(folder, vid, queries, text.shape[1], hop_s)
            found += [sample for sample in asked if split != "train" or sample.query not in kept_out]
        samples[split] = found
    places = {query: place for place, query in enumerate(queries)}

    @cache
    def encoded(query: str) -> Text:
        vector = text[places[query]]
        return Text(vector[None, None].astype(np.float16), np.append(vector, np.float32(0)))

    return Dataset(hop_s, BACKBONE, samples, videos.__getitem__, encoded, unseen=unseen)


def _load(folder: Path, vid: str, queries: Sequence[str], width: int, hop_s: float) -> tuple[Video, list[Sample]]:
    path = folder / f"{vid}.safetensors"
    arrays = _read(path, {"pts": 1, "features": 2, "label_frame": 1, "label_class": 1})
    pts, features = arrays["pts"].astype(np.float64), arrays["features"].astype(np.float32)
    count = len(pts)
    if len(features) != count or not count or features.shape[1] != width or (np.diff(pts) <= 0).any():
        raise InputError(f"{path}: expected ascending pts (n,) and features (n, {width}), got {features.shape}")
    frame, label = arrays["label_frame"].astype(np.intp), arrays["label_class"].astype(np.intp)
    if len(frame) != len(label) or not ((frame >= 0) & (frame < count) & (label >= 0) & (label < len(queries))).all():
        raise InputError(f"{path}: label_frame and label_class must pair frames of the video with classes of the index")
    # One frame a hop is looked at, as live: the newest.
    looked = np.flatnonzero(np.diff(np.floor(pts / hop_s), append=np.inf))
    windows, found = resample(pts[looked], features[looked], hop_s)
    newest = np.where(found < 0, -1, looked[found])
    shown = np.zeros((len(queries), count), bool)
    shown[label, frame] = True
    number = shown.sum(1)
    asked = np.flatnonzero((number >= FEWEST) & (number <= LARGEST_SHARE * count))
    # The score at a keyframe is that of the first window which holds it.
    holder = first_windows(pts, hop_s)
    make = partial(_sample, vid, pts=pts, newest=newest, holder=holder, hop_s=hop_s)
    halves = windows.astype(np.float16)
    return Video(halves[:, None, None], halves), [make(queries[place], shown[place]) for place in asked.tolist()]


def _sample(
    vid: str,
    query: str,
    shown: NDArray[np.bool_],
    *,
    pts: NDArray[np.float64],
    newest: NDArray[np.intp],
    holder: NDArray[np.intp],
    hop_s: float,
) -> Sample:
    # Keyframe i owns [middles[i], middles[i + 1]).
    middles = np.concatenate([pts[:1], (pts[1:] + pts[:-1]) / 2, pts[-1:]])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shown, [False]]).astype(np.int8))).reshape(-1, 2)
    moments = middles[edges]
    # What a window shows is its newest keyframe, though its middle may lie a little before that one's moment.
    held = newest.clip(0)
    within = shown[held] & (newest >= 0)
    at = np.arange(len(newest)) * hop_s + WINDOW_S / 2
    owned = np.clip(at, middles[held], np.nextafter(middles[held + 1], 0))
    counted = np.zeros(len(newest), bool)
    counted[holder] = True
    away = distances(owned, moments, hop_s)
    return Sample(vid, query, moments, float(pts[-1]), within, away, within.astype(np.float32), counted, holder, shown)


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
        names, splits = index["classes"], index["splits"]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("classes must be names")
        if not all(isinstance(vid, str) for vids in splits.values() for vid in vids):
            raise ValueError("splits must hold lists of vids")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: a folder of the tvstream form has one") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is malformed: {error}") from None
    return {"classes": names, "splits": splits}


def _read(path: Path, axes: dict[str, int]) -> Arrays:
    """Named arrays of a file, each with so many axes and all numbers finite."""
    try:
        arrays: Arrays = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    for name, count in axes.items():
        if name not in arrays or arrays[name].ndim != count:
            raise InputError(f"{path}: expected an array {name!r} of {count} axes")
        if not np.isfinite(arrays[name]).all():
            raise InputError(f"{path}: {name} holds what is not a number")
    return arrays
