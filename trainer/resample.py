"""Features at irregular times onto the grid of the live path, without looking ahead. numpy only.

Window t is [t hop, t hop + 2 s). Times become integer nanoseconds first: 2.3 s is not in [0.3, 2.3), and floating
point would say otherwise.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream.types import NS, WINDOW_NS
from stream.window import hop_from_seconds

Ints = NDArray[np.int64]


def first_windows(pts: ArrayLike, hop_s: float) -> Ints:
    """(n,) index of the first window that holds each time, in seconds.

    Raises:
        InputError: the hop does not divide a window.
    """
    return _first(_ns(pts), hop_from_seconds(hop_s))


def resample(pts: ArrayLike, features: NDArray[Any], hop_s: float) -> tuple[NDArray[Any], Ints]:
    """A window is the mean of its frames; without any it is the newest frame before its end, and zero before the first.

    The last window is the first that holds the last frame: a live stream would know no more.

    Args:
        pts: (n,) seconds, at least 0, in order.
        features: (n, ...) floats of the frames.
    Returns:
        (T, ...) in the same precision, and (T,) the newest frame that each window holds or has held; -1 before the
        first.
    Raises:
        InputError: the hop does not divide a window.
        ValueError: the times are not finite, run backwards, begin before 0, or are not as many as the features.
    """
    hop_ns, times = hop_from_seconds(hop_s), _ns(pts)
    if times.shape != features.shape[:1] or (np.diff(times, prepend=0) < 0).any():
        raise ValueError(f"expected {len(features)} times in order from 0 on, got {times.shape}")
    count = int(_first(times[-1:], hop_ns)[0]) + 1 if len(times) else 0
    starts = np.arange(count) * hop_ns
    # [begin, end) are a window's frames; before `end` lie all that it knows of.
    begin, end = np.searchsorted(times, starts), np.searchsorted(times, starts + WINDOW_NS)
    windows = np.zeros_like(features, shape=(count, *features.shape[1:]))
    for row, (held, known) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        if known:
            windows[row] = features[min(held, known - 1) : known].mean(0, dtype=np.float32)
    return windows, end.astype(np.int64) - 1


def _first(times_ns: Ints, hop_ns: int) -> Ints:
    return np.maximum(0, (times_ns - WINDOW_NS) // hop_ns + 1)


def _ns(pts: ArrayLike) -> Ints:
    seconds = np.asarray(pts, np.float64)
    if not np.isfinite(seconds).all():
        raise ValueError("a time is not a finite number")
    return np.rint(seconds * NS).astype(np.int64)
