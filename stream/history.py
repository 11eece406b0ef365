"""What is kept of the last windows of a stream, so that a new query can be answered for the past. Pure.

Features do not depend on the query. They are kept as fp16, and a live stream is judged by what is kept, so that a
query that comes later reads the same numbers. All of it is allocated with the first window and never grows.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stream.types import Features, Saliency, Window


class History:
    """The features of the newest `capacity` windows, by ordinal: `start`, ..., `stop` - 1, counted from the first."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a history holds at least one window, not {capacity}")
        self.capacity, self.stop = capacity, 0
        self._windows: list[Window | None] = [None] * capacity
        self._pooled: NDArray[np.float16] | None = None
        self._mapped: dict[str, NDArray[np.float16]] | None = None

    @property
    def start(self) -> int:
        return max(0, self.stop - self.capacity)

    @property
    def nbytes(self) -> int:
        """Of the features; 0 before the first window."""
        arrays = [] if self._pooled is None else [self._pooled, *(self._mapped or {}).values()]
        return sum(array.nbytes for array in arrays)

    def keep(self, features: Features) -> Features:
        """Put a window behind the others, the oldest goes; the window as it will be read from here."""
        if self._pooled is None:
            self._pooled = np.full((self.capacity, *features.pooled.shape), 0, np.float16)  # taken at once
            self._mapped = None if features.mapped is None else self._like(features.mapped)
        slot = self.stop % self.capacity
        self._windows[slot] = replace(features.window, frames=())  # without their pixels
        self._pooled[slot] = features.pooled
        for name, ring in (self._mapped or {}).items():
            assert features.mapped is not None
            ring[slot] = features.mapped[name]
        self.stop += 1
        return replace(self.at(self.stop - 1), window=features.window)

    def at(self, ordinal: int) -> Features:
        """
        Raises:
            IndexError: that window is not kept any more, or not yet.
        """
        if not self.start <= ordinal < self.stop or self._pooled is None:
            raise IndexError(f"window {ordinal} is not among {self.start} to {self.stop - 1}")
        slot = ordinal % self.capacity
        window, mapped = self._windows[slot], self._mapped
        assert window is not None
        return Features(
            window,
            self._pooled[slot].astype(np.float32),
            None if mapped is None else {name: ring[slot].astype(np.float32) for name, ring in mapped.items()},
        )

    def _like(self, mapped: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float16]]:
        return {name: np.full((self.capacity, *each.shape), 0, np.float16) for name, each in mapped.items()}


class Scores:
    """The newest scores of one query. Allocated once. One thread appends, any may read."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # One more than is given out: the oldest may be written over while somebody reads.
        self._score = np.full(capacity + 1, np.nan, np.float32)
        self._window = np.full(capacity + 1, -1, np.int64)
        self._count = 0

    def append(self, saliency: Saliency) -> None:
        slot = self._count % len(self._score)
        self._score[slot], self._window[slot] = saliency.score, saliency.window
        self._count += 1

    @property
    def newest(self) -> float | None:
        """None before the first."""
        return float(self._score[(self._count - 1) % len(self._score)]) if self._count else None

    def values(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Windows (n,), oldest first, and their scores (n,)."""
        return self.since(0)[:2]

    def since(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
        """Windows (n,) and scores (n,) of what came after the first `count`, as far as it is kept; how many there were.

        The third is what to ask with next time.
        """
        stop = self._count
        order = np.arange(max(count, stop - self._capacity), stop) % len(self._score)
        return self._window[order], self._score[order], stop
