"""The trained head of a bundle: one window against all queries of a stream, with what it remembers. numpy only.

`Head` holds the weights and serves any number of streams; `HeadState` is what one stream remembers, a row a query. It
knows which row is whose; where the rows lie is the runtime's choice: here in `HostRows`, on a GPU in
kernels/gpu_runtime.py. What travels between the graphs is named as models/graphs.py names it.

Letters: N texts, R rows, K layers, P patches, L tokens, C width, H heads, W band, E width of the history.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kernels.bundle import HeadShape
from kernels.ring import append, gather_rows
from kernels.saliency import Floats, logistic

Maps = Mapping[str, Floats]
"""Tensors by their name in the graphs: of a window (without an axis of streams) or of a query (without one of rows)."""


class Graph(Protocol):
    """One graph of a bundle in whatever runs it. Raises BundleError for a shape that it was not built for."""

    inputs: list[str]

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """All outputs by name. Arrays are numpy's, but for what `Rows` of the same runtime hands in and takes back."""


class Rows(Protocol):
    """What the rows of one stream remember and what a step reads of their queries, wherever that lies.

    Rings are named as the inputs of a step: `keys_k`, `values_k` (R, H, W, C / H) and `history` (R, reach, E). On a GPU
    none of it comes back between windows.
    """

    rings: dict[str, Any]

    def settle(self, places: NDArray[np.int64], queries: Sequence[Maps]) -> None:
        """Rows have moved: row i, of queries[i], goes on from what is now row places[i], or anew where that is -1."""

    def inputs(self) -> Mapping[str, Any]:
        """The rings, and the maps of all queries (R, ..), padded to the longest: what a step reads but the count."""

    def absorb(self, other: Self) -> None:
        """Take the rings of other rows behind one's own, where neither is empty; `settle` comes next."""

    def append(self, outputs: Mapping[str, Any], count: NDArray[np.int64]) -> None:
        """Write `new_keys_k`, `new_values_k` and `new_history` of a step into the rings of rows that saw `count`."""


# What to put behind a shorter query: nothing is the largest there, nothing is attended to. The rest, 0, is never read.
_PADDING = {"word_tokens": -np.inf, "query_bias": -np.inf}
_WORD_AXES = {"word_tokens": 0, "word_pooling": 0, "word_keys": 1, "word_values": 1, "query_bias": 0}  # where L lies


class HostRows:
    """Rows in this process's memory. Rings are written in place; when rows moved, each is copied once."""

    def __init__(self, shape: HeadShape) -> None:
        self.rings: dict[str, Floats] = {
            name: np.zeros((0, *size), np.float32) for name, size in ring_shapes(shape).items()
        }
        self._stacked: dict[str, Floats] = {}

    def settle(self, places: NDArray[np.int64], queries: Sequence[Maps]) -> None:
        self.rings = {name: gather_rows(ring, places) for name, ring in self.rings.items()}
        self._stacked = stack(queries)

    def inputs(self) -> Mapping[str, Floats]:
        return {**self._stacked, **self.rings}

    def absorb(self, other: Self) -> None:
        self.rings = {name: np.concatenate([ring, other.rings[name]]) for name, ring in self.rings.items()}

    def append(self, outputs: Mapping[str, Floats], count: NDArray[np.int64]) -> None:
        for name, ring in self.rings.items():
            columns, rows = outputs[f"new_{name}"], len(count)
            flat = ring.reshape(rows, -1, *ring.shape[-2:])  # a view: it is written in place
            append(flat, columns.reshape(rows, -1, columns.shape[-1]), count)


class HeadState:
    """The queries of one stream, in the order in which they were added, and what each remembers of it.

    Rows move when queries came or went, at the next window and all at once.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.count = np.zeros(0, np.int64)  # (R,) windows seen
        self._queries: list[Maps] = []
        self._places: list[int] = []  # of each row, where it lies in the rings; -1 where it is new
        self._moved = False

    @property
    def rings(self) -> Mapping[str, Any]:
        """See `Rows`; queries added or removed since the last window are not in them yet."""
        return self._rows.rings

    def add(self, query: Maps) -> None:
        """Open a row, behind the others, that remembers nothing."""
        self._queries.append(query)
        self._places.append(-1)
        self._moved = True

    def remove(self, row: int) -> None:
        """Close a row; those behind it move up."""
        del self._queries[row], self._places[row]
        self._moved = True

    def absorb(self, other: "HeadState") -> None:
        """Open the rows of another state of this head, behind the others, with what they remember; it is used up."""
        for state in (self, other):
            if state._moved:
                state._settle()
        if len(self.count) and len(other.count):
            self._rows.absorb(other._rows)
        elif len(other.count):
            self._rows = other._rows
        self.count = np.concatenate([self.count, other.count])
        self._queries += other._queries
        self._places, self._moved = list(range(len(self.count))), True

    def reset(self) -> None:
        """Forget the stream, in all rows."""
        self._places = [-1] * len(self._places)
        self._moved = True

    def inputs(self) -> dict[str, Any]:
        """What a step reads of the queries and of the past."""
        if self._moved:
            self._settle()
        return {**self._rows.inputs(), "count": self.count}

    def append(self, outputs: Mapping[str, Any]) -> None:
        """Take in one window: the columns among what a step gave for `inputs`."""
        self._rows.append(outputs, self.count)
        self.count += 1

    def _settle(self) -> None:
        places = np.array(self._places, np.int64)
        self._rows.settle(places, self._queries)
        self.count = gather_rows(self.count, places)
        self._places, self._moved = list(range(len(places))), False


class Head:
    """Weights only. Any number of streams share it."""

    def __init__(
        self,
        shape: HeadShape,
        video: Graph,
        query: Graph,
        step: Graph,
        rows: Callable[[HeadShape], Rows] = HostRows,
    ) -> None:
        """rows: makes what a state keeps its rows in, of the runtime that the graphs are of."""
        self.shape = shape
        self._video, self._query, self._step, self._rows = video, query, step, rows

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
        return HeadState(self._rows(self.shape))

    def step(self, video: Maps, state: HeadState) -> Mapping[str, Any]:
        """All that the head says of one window to every row, `saliency` (R,) for one; `state` goes a window on.

        At least one row is needed.
        """
        given = {name: each[None] for name, each in video.items()} | state.inputs()
        if "row_stream" in self._step.inputs:  # a graph that can tell streams apart: all rows watch this one
            given["row_stream"] = np.zeros(len(state.count), np.int64)
        outputs = self._step(**given)
        state.append(outputs)
        return outputs

    def score(self, saliency: Floats) -> Floats:
        """(R,) -> [0, 1]: one threshold serves all queries."""
        return logistic(saliency, self.shape.centre, self.shape.slope)


def ring_shapes(shape: HeadShape) -> dict[str, tuple[int, int, int] | tuple[int, int]]:
    """Of each ring, by its name, what one row takes: (H, W, C / H), and (reach, E) of the history."""
    each = shape.heads, shape.window, shape.width // shape.heads
    names = [f"{name}_{k}" for name in ("keys", "values") for k in range(shape.depth)]
    return {**dict.fromkeys(names, each), "history": (shape.reach, shape.column)}


def _unpadded(maps: Maps, length: int) -> Maps:
    """Of one query, its `length` tokens alone."""
    return {
        name: each if (axis := _word_axis(name)) is None else np.take(each, range(length), axis)
        for name, each in maps.items()
    }


def stack(queries: Sequence[Maps]) -> dict[str, Floats]:
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
