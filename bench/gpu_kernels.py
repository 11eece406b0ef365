"""Every CUDA kernel of ours on a GPU, with fresh random inputs, against its reference in numpy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import ring, saliency
from kernels.bundle import Manifest
from kernels.device import Device
from kernels.gpu_kernels import Crops
from kernels.preprocess import COLOURS, crop, normalise, nv12_to_rgb, plan
from kernels.saliency import Calibration

_BLOCK = 128  # threads
_LANES = 16  # threads that share a row, in row_saliency
_EXACT = ("append", "append_half", "gather_rows", "advance")
_ALLOWED = 1e-4
_HALF = 4e-3  # where something is stored as fp16, or is a byte

Errors = Mapping[str, tuple[float, float]]
"""By kernel: its largest error, over the largest number of the reference, and what is allowed."""


def check_kernels(device: Device, manifest: Manifest, seed: int, rows: int = 300) -> Errors:
    """
    Args:
        manifest: of any bundle, for the size and scale of its pixels.
    """
    rng, found = np.random.default_rng(seed), dict[str, float]()
    with device.current():
        for check in (_crops, _nv12, _rings, _moves, _saliency):
            for name, error in check(device, manifest, rng, rows).items():
                found[name] = max(error, found.get(name, 0.0))
    return {name: (error, _allowed(name)) for name, error in found.items()}


def _allowed(name: str) -> float:
    if name in _EXACT:
        return 0.0
    return _HALF if name.endswith("half") or name.startswith("resample") else _ALLOWED


def _crops(device: Device, manifest: Manifest, rng: np.random.Generator, _rows: int) -> dict[str, float]:
    """Frames that lie, stand and are smaller than the crop, in one batch."""
    frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((270, 480), (160, 90), (31, 43))]
    [given] = device.read([Crops(device, manifest)(frames)])
    want = np.stack([_normalised(frame, manifest) for frame in frames])
    return {"resample, RGB": _error(given, want)}


def _nv12(device: Device, manifest: Manifest, rng: np.random.Generator, _rows: int) -> dict[str, float]:
    height, width, size = 135, 241, manifest.image_size
    luma = rng.integers(0, 256, (height, width), np.uint8)
    chroma = rng.integers(0, 256, (-(-height // 2), -(-width // 2), 2), np.uint8)
    p = plan(height, width, resize=manifest.image_resize, size=size)
    narrow, colour = device.empty((3, p.row_count, size), np.uint8), COLOURS["bt709"]
    device.kernel("preprocess", "resample_rows", "PiPiPPPiiiiP")(
        *((-(-size // p.per_block), p.row_count), _BLOCK),
        *(device.upload(luma), width, device.upload(chroma), chroma.strides[0], device.upload(colour)),
        *(device.upload(p.columns.first), device.upload(p.columns.weights), len(p.columns.weights), size),
        *(p.per_block, p.first_row, narrow),
    )
    [given] = device.read([narrow])
    # The same kernel on the same picture in RGB, which `_crops` holds against Pillow.
    rgb, again = nv12_to_rgb(luma, chroma, colour), device.empty(narrow.shape, np.uint8)
    device.kernel("preprocess", "resample_rows", "PiPiPPPiiiiP")(
        *((-(-size // p.per_block), p.row_count), _BLOCK),
        *(device.upload(rgb), 3 * width, None, 0, None),
        *(device.upload(p.columns.first), device.upload(p.columns.weights), len(p.columns.weights), size),
        *(p.per_block, p.first_row, again),
    )
    [want] = device.read([again])
    return {"resample, NV12": _error(given, want)}


def _rings(device: Device, _manifest: Manifest, rng: np.random.Generator, rows: int) -> dict[str, float]:
    """Rings of every fill, and rows that have no new window."""
    heads, window, size = 4, 16, 32
    count = rng.integers(0, 3 * window, rows)
    active = (rng.random(rows) < 0.8).astype(np.uint8)
    base = 10_000.0 ** (-np.arange(0, size, 2) / size)
    rates = np.concatenate([base, base]).astype(np.float32)
    query, key, value = (_normal(rng, rows, heads, size) for _ in range(3))
    found: dict[str, float] = {}
    for suffix in ("", "_half"):
        keys, values = (_stored(_normal(rng, rows, heads, window, size), suffix) for _ in range(2))
        ours, mixed = [device.upload(each) for each in (keys, values)], device.empty(query.shape, np.float32)
        columns = _normal(rng, rows, heads, size)
        device.kernel("ring", f"append{suffix}", "PPPPiii")(
            *((rows, 1), _BLOCK),
            *(ours[0], device.upload(columns), device.upload(count), device.upload(active), heads, window, size),
        )
        ring.append(keys, columns, count, active)
        found[f"append{suffix}"] = _error(device.read(ours[:1])[0], keys)
        device.kernel("ring", f"ring_attention{suffix}", "PPPPPPPPiiP")(
            *((heads, rows), _BLOCK),
            *(device.upload(query), device.upload(key), device.upload(value), *ours, device.upload(count)),
            *(device.upload(rates), device.upload(active), window, size, mixed),
        )
        want = ring.ring_attention(query, key, value, keys, values, count, rates, active)
        found[f"ring_attention{suffix}"] = max(map(_error, device.read([mixed, *ours]), (want, keys, values)))
    return found


def _moves(device: Device, _manifest: Manifest, rng: np.random.Generator, rows: int) -> dict[str, float]:
    old, place = _normal(rng, rows, 3, 7), rng.integers(-1, rows, rows + 5).astype(np.int32)
    new, count = device.empty((len(place), 3, 7), np.float32), rng.integers(0, 2**40, rows)
    active = (rng.random(rows) < 0.5).astype(np.uint8)
    device.kernel("ring", "gather_rows", "PPPi")(
        (len(place), 1), _BLOCK, device.upload(old), new, device.upload(place), 21
    )
    moved = device.upload(count)
    device.kernel("ring", "advance", "PPi")((-(-rows // _BLOCK), 1), _BLOCK, moved, device.upload(active), rows)
    ring.advance(count, active)
    given = device.read([new, moved])
    return {"gather_rows": _error(given[0], ring.gather_rows(old, place)), "advance": _error(given[1], count)}


def _saliency(device: Device, _manifest: Manifest, rng: np.random.Generator, rows: int) -> dict[str, float]:
    streams, width, texts = 5, 96, 130
    calibration = Calibration(0.5, 1.0, 1.2, 0.05)
    windows, distractors, queries = (_normal(rng, each, width) for each in (streams, texts, rows))
    distractors, queries = (saliency.units(each, 0.0) for each in (distractors, queries))
    level, spread = _normal(rng, rows) * np.float32(0.1), (rng.random(rows) + 0.1).astype(np.float32)
    threshold, state = rng.random(rows).astype(np.float32), rng.integers(0, 2, rows).astype(np.uint8)
    stream = rng.integers(0, streams, rows).astype(np.int32)
    unit, background = device.empty((streams, width), np.float32), device.empty((streams,), np.float32)
    crossed, crossed_rows = device.empty((1,), np.int32), device.empty((rows,), np.int32)
    crossed_scores, scores, states = (*(device.empty((rows,), np.float32) for _ in range(2)), device.upload(state))
    device.kernel("saliency", "stream_background", "PPiiffPPP")(
        *((streams, 1), _BLOCK),
        *(device.upload(windows), device.upload(distractors), texts, width, calibration.floor, calibration.temperature),
        *(unit, background, crossed),
    )
    device.kernel("saliency", "row_saliency", "PPPPPPPiiffPPPPP")(
        *((-(-rows // (_BLOCK // _LANES)), 1), _BLOCK),
        *(unit, background, device.upload(stream), device.upload(queries), device.upload(level), device.upload(spread)),
        *(device.upload(threshold), rows, width, calibration.centre, calibration.slope),
        *(states, crossed, crossed_rows, crossed_scores, scores),
    )
    units = saliency.units(windows, calibration.floor)
    levels = saliency.background(units, distractors, calibration.temperature)
    _, want = saliency.row_saliency(windows, stream, queries, level, spread, calibration, distractors)
    given = device.read([unit, background, scores, states, crossed, crossed_rows, crossed_scores])
    # Which rows crossed is held against the kernel's own scores: at the threshold the last bit decides.
    changed = saliency.crossings(given[2], threshold, state)
    order = np.argsort(given[5][: len(changed)])
    same = int(given[4][0]) == len(changed) and np.array_equal(given[5][: len(changed)][order], changed)
    told = same and np.array_equal(given[6][: len(changed)][order], given[2][changed])
    return {
        "stream_background": max(_error(given[0], units), _error(given[1], levels)),
        "row_saliency": _error(given[2], want) if told and np.array_equal(given[3], state) else np.inf,
    }


def _normalised(frame: NDArray[np.uint8], manifest: Manifest) -> NDArray[np.float16]:
    mean, std = ([value / 255 for value in each] for each in (manifest.mean, manifest.std))
    return normalise(crop(frame, resize=manifest.image_resize, size=manifest.image_size), mean, std)


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.normal(size=shape).astype(np.float32)


def _stored(values: NDArray[np.float32], suffix: str) -> ring.Ring:
    return values.astype(np.float16) if suffix else values


def _error(given: NDArray[Any], want: NDArray[Any]) -> float:
    """The largest, over the largest number that is wanted; infinite where something is not a number."""
    apart = np.abs(given.astype(np.float64) - want.astype(np.float64)).max()
    error = float(apart / max(np.abs(want.astype(np.float64)).max(), 1e-9))
    return error if np.isfinite(error) else np.inf
