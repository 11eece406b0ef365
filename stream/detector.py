"""Windows -> features -> saliency of every query. The one place where a stream meets the engine."""

import hashlib
import re
from collections import deque

import numpy as np

from kernels.engine import Engine
from kernels.errors import InputError
from kernels.saliency import Calibration, saliency
from stream.clock import slot_of
from stream.types import Features, Query, Saliency, Vector, Window, normalise, tidy


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
    )


class Detector:
    """The queries of one stream. The engine's weights are shared, this is the state."""

    def __init__(self, engine: Engine, stream: str, hop_ns: int) -> None:
        self._engine, self._stream, self._hop_ns = engine, stream, hop_ns
        self._calibration = Calibration(**engine.manifest.calibration)
        self._embedded: deque[tuple[int, Vector]] = deque()  # (slot, (D,)) of the frames that windows still need
        self._queries: list[Query] = []
        # Row i of each is query i.
        self._pooled: Vector = np.zeros((0, engine.manifest.width), np.float32)  # (Q, D)
        self._background: Vector = np.zeros((0, 2), np.float32)  # (Q, 2) level and spread

    def add(self, query: Query) -> None:
        """Open a row; the others are left alone."""
        self._stack([*self._queries, query])

    def remove(self, query_id: str) -> None:
        """Close a row."""
        self._stack([query for query in self._queries if query.id != query_id])

    def features(self, window: Window) -> Features:
        """Embed what is new in a window, each frame once, and average over all that it holds."""
        if window.discontinuity:
            self._embedded.clear()
        if window.frames:
            vectors = self._engine.embed_frames([frame.pixels for frame in window.frames])
            slots = [slot_of(frame.pts_ns, self._hop_ns) for frame in window.frames]
            self._embedded.extend(zip(slots, vectors, strict=True))
        while self._embedded[0][0] < window.index:
            self._embedded.popleft()
        return Features(window, np.mean([vector for _, vector in self._embedded], axis=0))

    def saliency(self, features: Features) -> list[Saliency]:
        """One score per query, in the order in which they were added."""
        level, spread = self._background.T
        raw, score = saliency(features.pooled, self._pooled, level, spread, self._calibration)
        window = features.window
        return [
            Saliency(self._stream, query.id, window.index, float(s), float(r))
            for query, s, r in zip(self._queries, score, raw, strict=True)
        ]

    def _stack(self, queries: list[Query]) -> None:
        self._queries = queries
        self._pooled = np.array([q.pooled for q in queries], np.float32).reshape(len(queries), self._pooled.shape[1])
        self._background = np.array([(q.level, q.spread) for q in queries], np.float32).reshape(len(queries), 2)
