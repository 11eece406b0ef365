"""The scores of one query on one stream, as they are drawn. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.history import Scores
from stream.session import Session
from stream.types import NS, WINDOW_NS, Query


@dataclass(frozen=True, eq=False)
class Curve:
    """What is kept of it; it goes on growing."""

    stream: str
    query: Query
    threshold: float
    hop_ns: int
    epoch_ns: int  # UTC at stream time 0
    scores: Scores

    def message(self, windows: NDArray[np.int64], scores: NDArray[np.float32], *, anew: bool) -> dict[str, Any]:
        """Windows (n,) and scores (n,) of it, on the wire; see `Switchboard`."""
        # A window averages over its frames: its score stands for its middle.
        middles_ms = (self.epoch_ns + WINDOW_NS // 2 + windows * self.hop_ns) // (NS // 1000)
        return {
            "op": "curve",
            "stream": self.stream,
            "query_id": self.query.id,
            "query": self.query.text,
            "threshold": self.threshold,
            "hop_s": self.hop_ns / NS,
            **({"anew": True} if anew else {}),
            "times": middles_ms.tolist(),
            "scores": [round(score, 4) for score in scores.tolist()],
        }


def curves_of(session: Session) -> Iterator[Curve]:
    """One for each query of a stream that has seen a window. Any thread may ask."""
    if (epoch_ns := session.epoch_ns) is None:
        return
    for query in session.queries:
        if scores := session.scores(query.id):
            yield Curve(session.stream, query, session.threshold(query), session.hop_ns, epoch_ns, scores)
