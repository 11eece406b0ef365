"""The trained head of a bundle: one window against all queries of a stream, with what it remembers. numpy only.

`Head` holds the weights and serves any number of streams; `HeadState` is what one stream remembers, a row a query. What
travels between the graphs is named as models/graphs.py names it.

Letters: N texts, R rows, K layers, P patches, L tokens, C width, H heads, W band, E width of the history.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.bundle import HeadShape
from kernels.saliency import Floats, logistic

Maps = Mapping[str, Floats]
"""Tensors by their name in the graphs: of a window (without an axis of streams) or of a query (without one of rows)."""
Graph = Callable[..., Mapping[str, NDArray[Any]]]

# What to put behind a shorter query: nothing is the largest there, nothing is attended to. The rest, 0, is never read.
_PADDING = {"word_tokens": -np.inf, "query_bias": -np.inf}
_WORD_AXES = {"word_tokens": 0, "word_pooling": 0, "word_keys": 1, "word_values": 1, "query_bias": 0}  # where L lies


class HeadState:
    """The queries of one stream, in the order in which they were added, and what each remembers of it.

    Rings are written in place. Rows move when queries came or went, at the next window and all at once: however many
    do, each ring is copied once.
    """

    def __init__(self, shape: HeadShape) -> None:
        size = shape.width // shape.heads
        rings = [f"{name}_{k}" for name in ("keys", "values") for k in range(shape.depth)]
        self.rings: dict[str, Floats] = {
            name: np.zeros((0, shape.heads, shape.window, size), np.float32) for name in rings
        }
        self.rings["history"] = np.zeros((0, shape.reach, shape.column), np.float32)
        self.count = np.zeros(0, np.int64)  # (R,) windows seen
        self._queries: list[Maps] = []
        self._stacked: dict[str, Floats] = {}  # the same, R at once
        self._places: list[int] = []  # of each row, where it lies in the rings; -1 where it is new
        self._moved = False

    def add(self, query: Maps) -> None:
        """Open a row, behind the others, that remembers nothing."""
        self._queries.append(query)
        self._places.append(-1)
        self._moved = True

    def remove(self, row: int) -> None:
        """Close a row; those behind it move up."""
        del self._queries[row], self._places[row]
        self._moved = True

    def reset(self) -> None:
        """Forget the stream, in all rows."""
        self._places = [-1] * len(self._places)
        self._moved = True

    def inputs(self) -> dict[str, NDArray[Any]]:
        """What a step reads of the queries and of the past."""
        if self._moved:
            self._settle()
        return {**self._stacked, **self.rings, "count": self.count}

    def append(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Take in one window: the columns among what a step gave for `inputs`."""
        rows = np.arange(len(self.count))
        for name, ring in self.rings.items():
            slots = np.moveaxis(ring, -2, 1)  # a view: (R, length, ..)
            slots[rows, self.count % slots.shape[1]] = outputs[f"new_{name}"]
        self.count += 1

    def _settle(self) -> None:
        places = np.array(self._places, np.int64)
        old = places >= 0
        for name, ring in self.rings.items():
            self.rings[name] = np.zeros((len(self._places), *ring.shape[1:]), np.float32)
            self.rings[name][old] = ring[places[old]]
        count = np.zeros(len(self._places), np.int64)
        count[old] = self.count[places[old]]
        self.count = count
        self._stacked = _stack(self._queries)
        self._places, self._moved = list(range(len(self._places))), False


class Head:
    """Weights only. Any number of streams share it."""

    def __init__(self, shape: HeadShape, video: Graph, query: Graph, step: Graph) -> None:
        self.shape = shape
        self._video, self._query, self._step = video, query, step

    def map_video(self, layers: Floats, embedding: Floats) -> Maps:
        """What a window is to every query: layers (K, 1+P, width), embedding (D,), of the backbone."""
        return {name: each[0] for name, each in self._video(layers=layers[None], embedding=embedding[None]).items()}

    def map_queries(self, layers: Floats, embedding: Floats, mask: NDArray[np.bool_]) -> list[Maps]:
        """What texts are to every window: layers (N, K, L, width), embedding (N, D + 1), mask (N, L)."""
        maps = self._query(layers=layers, embedding=embedding, mask=mask)
        rows = ({name: each[row] for name, each in maps.items()} for row in range(len(mask)))
        return [_unpadded(row, int(length)) for row, length in zip(rows, mask.sum(1), strict=True)]

    def new_state(self) -> HeadState:
        """Of a stream that has no query yet."""
        return HeadState(self.shape)

    def step(self, video: Maps, state: HeadState) -> Mapping[str, NDArray[Any]]:
        """All that the head says of one window to every row, `saliency` (R,) for one; `state` goes a window on.

        At least one row is needed.
        """
        outputs = self._step(**{name: each[None] for name, each in video.items()}, **state.inputs())
        state.append(outputs)
        return outputs

    def score(self, saliency: Floats) -> Floats:
        """(R,) -> [0, 1]: one threshold serves all queries."""
        return logistic(saliency, self.shape.centre, self.shape.slope)


def _unpadded(maps: Maps, length: int) -> Maps:
    """Of one query, its `length` tokens alone."""
    return {
        name: each if (axis := _word_axis(name)) is None else np.take(each, range(length), axis)
        for name, each in maps.items()
    }


def _stack(queries: Sequence[Maps]) -> dict[str, Floats]:
    """Queries of any lengths -> (R, ..), padded to the longest."""
    stacked = {}
    for name in queries[0] if queries else ():
        axis, each = _word_axis(name), [query[name] for query in queries]
        if axis is not None:
            longest = max(array.shape[axis] for array in each)
            each = [_padded(array, axis, longest, _PADDING.get(_plain(name), 0.0)) for array in each]
        stacked[name] = np.stack(each)
    return stacked


def _padded(array: Floats, axis: int, length: int, value: float) -> Floats:
    widths = [(0, length - size if place == axis else 0) for place, size in enumerate(array.shape)]
    return np.pad(array, widths, constant_values=value)


def _word_axis(name: str) -> int | None:
    """Which axis of a query's map counts its tokens."""
    return _WORD_AXES.get(_plain(name))


def _plain(name: str) -> str:
    """`word_keys_3` -> `word_keys`."""
    return name.rstrip("0123456789").rstrip("_")
