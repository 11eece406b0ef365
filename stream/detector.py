"""Windows -> features -> saliency of every query. The one place where a stream meets the engine."""

import hashlib
import re
from collections import deque

import numpy as np

from kernels.engine import Engine
from kernels.errors import InputError
from kernels.saliency import saliency
from stream.clock import slot_of
from stream.types import NS, Features, Query, Saliency, Vector, Window, normalise, tidy


def make_query(engine: Engine, text: str) -> Query:
    """Encode a text once. The same text, whatever its case and spacing, is the same query.

    Raises:
        InputError: the text is empty, too long for the engine, or no text at all.
    """
    try:
        text.encode()  # half a surrogate pair is not printable either, but it deserves a word
        text = tidy(text)
        key = normalise(text).encode()
    except UnicodeEncodeError:
        raise InputError("the query is not text in UTF-8: check the terminal's encoding") from None
    encoded = engine.embed_texts([text])
    slug = re.sub(r"[^a-z0-9]+", "-", key.decode()).strip("-")[:32].rstrip("-")
    # Readable, and still unique where two long texts begin alike.
    return Query(
        f"{slug}-{hashlib.sha256(key).hexdigest()[:10]}".lstrip("-"),
        text,
        encoded.pooled[0],
        float(encoded.level[0]),
        float(encoded.spread[0]),
        encoded.maps[0] if encoded.maps else None,
    )


class Detector:
    """The queries of one stream, and what a trained head remembers of it. The engine's weights are shared.

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
        # Row i of each is query i.
        self._pooled: Vector = np.zeros((0, engine.manifest.width), np.float32)  # (Q, D)
        self._background: Vector = np.zeros((0, 2), np.float32)  # (Q, 2) level and spread
        self._state = engine.head.new_state() if engine.head else None

    def add(self, query: Query) -> None:
        """Open a row, which remembers nothing; the others are left alone."""
        self._stack([*self._queries, query])
        if self._state is not None:
            assert query.maps is not None, "a query of another engine"
            self._state.add(query.maps)

    def remove(self, query_id: str) -> None:
        """Close a row; the others are left alone."""
        row = [query.id for query in self._queries].index(query_id)
        self._stack(self._queries[:row] + self._queries[row + 1 :])
        if self._state is not None:
            self._state.remove(row)

    def features(self, window: Window) -> Features:
        """Embed what is new in a window, each frame once, and average over all that it holds."""
        if window.discontinuity:
            self._embedded.clear()
        if window.frames:
            found = self._engine.embed_frames([frame.pixels for frame in window.frames])
            parts = (found.pooled,) if found.layers is None else (found.pooled, found.layers)
            slots = [slot_of(frame.pts_ns, self._hop_ns) for frame in window.frames]
            self._embedded.extend(zip(slots, zip(*parts, strict=True), strict=True))
        while self._embedded[0][0] < window.index:
            self._embedded.popleft()
        pooled, *layers = (np.mean(each, axis=0) for each in zip(*(part for _, part in self._embedded), strict=True))
        return Features(window, pooled, self._engine.head.map_video(layers[0], pooled) if self._engine.head else None)

    def saliency(self, features: Features) -> list[Saliency]:
        """One score per query, in the order in which they were added. A head must see each window once, in order."""
        if not self._queries:
            return []
        raw, score = self._zero_shot(features) if features.mapped is None else self._trained(features)
        return [
            Saliency(self._stream, query.id, features.window.index, float(s), float(r))
            for query, s, r in zip(self._queries, score, raw, strict=True)
        ]

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

    def _stack(self, queries: list[Query]) -> None:
        self._queries = queries
        self._pooled = np.array([q.pooled for q in queries], np.float32).reshape(len(queries), self._pooled.shape[1])
        self._background = np.array([(q.level, q.spread) for q in queries], np.float32).reshape(len(queries), 2)
