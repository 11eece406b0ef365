"""Windows -> features -> saliency of every query. The one place where a stream meets the engine."""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from kernels.engine import Engine
from kernels.errors import InputError
from kernels.saliency import saliency
from stream.clock import slot_of
from stream.types import NS, Features, Query, Saliency, Vector, Window, normalise, tidy


def make_query(engine: Engine, text: str, threshold: float | None = None) -> Query:
    """Encode a text once. The same text at the same threshold, whatever its case and spacing, is the same query.

    Args:
        threshold: a score in (0, 1] of its own; None is that of its stream.

    Raises:
        InputError: the text is empty, too long for the engine, or no text at all; no such threshold exists.
    """
    try:
        text.encode()  # half a surrogate pair is not printable either, but it deserves a word
        text = tidy(text)
        key = normalise(text).encode()
    except UnicodeEncodeError:
        raise InputError("the query is not text in UTF-8: check the terminal's encoding") from None
    if threshold is not None:
        if not 0.0001 <= threshold <= 1.0:
            raise InputError(f"a threshold lies above 0 and at most at 1, not at {threshold:g}")
        threshold = round(threshold, 4)
    encoded = engine.embed_texts([text])
    slug = re.sub(r"[^a-z0-9]+", "-", key.decode()).strip("-")[:32].rstrip("-")
    # Readable, and still unique where two long texts begin alike.
    name = f"{slug}-{hashlib.sha256(key).hexdigest()[:10]}".lstrip("-")
    return Query(
        name if threshold is None else f"{name}-at-{threshold:g}",
        text,
        encoded.pooled[0],
        float(encoded.level[0]),
        float(encoded.spread[0]),
        encoded.maps[0] if encoded.maps else None,
        threshold,
    )


class Detector:
    """The queries of one stream, and what a trained head remembers of it. The engine's weights are shared.

    Queries of one text, at several thresholds, share a row. Rows of several streams are judged stream by stream: their
    windows are seldom complete at one instant, and a row that waited for another stream's would be told late.

    Raises:
        InputError: the engine's trained head serves another hop.
    """

    def __init__(self, engine: Engine, stream: str, hop_ns: int) -> None:
        if engine.head and round(engine.head.shape.hop_s * NS) != hop_ns:
            raise InputError(
                f"this engine was trained at a hop of {engine.head.shape.hop_s:g} s and serves no other: "
                f"give --hop {engine.head.shape.hop_s:g}, not {hop_ns / NS:g}, or --zero-shot, which takes any"
            )
        self._engine, self._stream, self._hop_ns = engine, stream, hop_ns
        # Slot, embedding (D,) and, for a head, layers (K, 1+P, width) of the frames that windows still need.
        self._embedded: deque[tuple[int, tuple[Vector, ...]]] = deque()
        self._queries: list[Query] = []
        self._rows: list[str] = []  # normalised texts; row i of each of the following is text i
        self._row_of: list[int] = []  # of each query
        self._pooled: Vector = np.zeros((0, engine.manifest.width), np.float32)  # (R, D)
        self._background: Vector = np.zeros((0, 2), np.float32)  # (R, 2) level and spread
        self._state = engine.head.new_state() if engine.head else None

    def add(self, query: Query) -> None:
        """Open a row, which remembers nothing; the others are left alone."""
        self._queries.append(query)
        if (text := normalise(query.text)) in self._rows:
            self._row_of.append(self._rows.index(text))
            return
        self._row_of.append(len(self._rows))
        self._rows.append(text)
        self._pooled = np.concatenate([self._pooled, query.pooled[None]])
        self._background = np.concatenate([self._background, np.array([[query.level, query.spread]], np.float32)])
        if self._state is not None:
            assert query.maps is not None, "a query of another engine"
            self._state.add(query.maps)

    def remove(self, query_id: str) -> None:
        """Close a row; the others are left alone."""
        (query,) = (query for query in self._queries if query.id == query_id)
        self._queries.remove(query)
        if (text := normalise(query.text)) not in (normalise(other.text) for other in self._queries):
            self._close(text)
        self._index()

    def adopt(self, other: "Detector") -> None:
        """Take over the queries of another detector of this stream that has seen the same windows; it is used up."""
        for text in set(self._rows) & set(other._rows):
            other._close(text)  # this row knows no less
        self._queries += other._queries
        self._rows += other._rows
        self._index()
        self._pooled = np.concatenate([self._pooled, other._pooled])
        self._background = np.concatenate([self._background, other._background])
        if self._state is not None and other._state is not None:
            self._state.absorb(other._state)

    def features(self, window: Window) -> Features:
        """Embed what is new in a window, each frame once, and average over all that it holds."""
        return see(self._engine, [(self, window)])[0]

    def saliency(self, features: Features) -> list[Saliency]:
        """One score per query, in the order in which they were added. A head must see each window once, in order."""
        if not self._queries:
            return []
        raw, score = self._zero_shot(features) if features.mapped is None else self._trained(features)
        return [
            Saliency(self._stream, query.id, features.window.index, float(score[row]), float(raw[row]))
            for query, row in zip(self._queries, self._row_of, strict=True)
        ]

    def _take(self, window: Window, embedded: Iterable[tuple[Vector, ...]]) -> Features:
        """What a window gives, once its new frames are embedded."""
        if window.discontinuity:
            self._embedded.clear()
        slots = [slot_of(frame.pts_ns, self._hop_ns) for frame in window.frames]
        self._embedded.extend(zip(slots, embedded, strict=True))
        while self._embedded[0][0] < window.index:
            self._embedded.popleft()
        pooled, *layers = (np.mean(each, axis=0) for each in zip(*(part for _, part in self._embedded), strict=True))
        return Features(window, pooled, self._engine.head.map_video(layers[0], pooled) if self._engine.head else None)

    def _zero_shot(self, features: Features) -> tuple[Vector, Vector]:
        level, spread = self._background.T
        return saliency(
            features.pooled, self._pooled, level, spread, self._engine.calibration, self._engine.distractors
        )

    def _trained(self, features: Features) -> tuple[Vector, Vector]:
        head, state = self._engine.head, self._state
        assert head is not None and state is not None and features.mapped is not None
        if features.window.discontinuity:
            state.reset()
        raw = head.step(features.mapped, state)["saliency"]
        return raw, head.score(raw)

    def _index(self) -> None:
        self._row_of = [self._rows.index(normalise(query.text)) for query in self._queries]

    def _close(self, text: str) -> None:
        row = self._rows.index(text)
        del self._rows[row]
        self._pooled, self._background = (np.delete(each, row, 0) for each in (self._pooled, self._background))
        if self._state is not None:
            self._state.remove(row)


def see(engine: Engine, windows: Sequence[tuple[Detector, Window]]) -> list[Features]:
    """What windows of several streams give, at most one of each: all their new frames are embedded in one call."""
    frames = [frame.pixels for _, window in windows for frame in window.frames]
    parts: Iterator[tuple[Vector, ...]] = iter(())
    if frames:
        found = engine.embed_frames(frames)
        parts = zip(*((found.pooled,) if found.layers is None else (found.pooled, found.layers)), strict=True)
    return [detector._take(window, islice(parts, len(window.frames))) for detector, window in windows]
