"""Why a query tells something, or nothing: in numbers, and in words. Pure."""

from typing import Any

import numpy as np

from stream.session import Session
from stream.sources import SourceStatus
from stream.types import NS, Query


def why(session: Session, query: Query, source: SourceStatus) -> dict[str, Any]:
    """What one stream says to one query at present. Scores are in [0, 1], times in stream seconds."""
    threshold = session.threshold(query)
    told: dict[str, Any] = {"stream": session.stream, "state": source.state, "threshold": threshold}
    scores = session.scores(query.id)
    windows, values = scores.values() if scores else (np.zeros(0, np.int64), np.zeros(0, np.float32))
    if scores is None:
        return told | {"reason": "this query does not run on this stream (yet): subscribe to it"}
    if not len(values):
        waits = f"no picture has come: {source.reason}" if source.reason else "no window is complete yet"
        return told | {"reason": waits}
    best = int(values.argmax())
    told |= {
        "score": round(float(values[-1]), 4),
        "best": round(float(values[best]), 4),
        "best_s": float(windows[best] * session.hop_ns / NS),
        "windows": len(values),
    }
    if moment := session.open_moment(query.id):
        return told | {"reason": f"a moment is open since {moment.start_ns / NS:.1f} s", "moment_id": moment.id}
    if source.state != "connected":
        since = f", {source.reason}" if source.reason else ""
        return told | {"reason": f"there are no pictures: {source.state}{since}"}
    if values[-1] >= threshold:
        return told | {"reason": "the score is above the threshold: a moment opens once it has lasted long enough"}
    if values[best] >= threshold:
        return told | {"reason": "a moment was told and is over; the score is below the threshold"}
    span_s = len(values) * session.hop_ns / NS
    return told | {"reason": f"the best score of the last {span_s:.0f} s was {values[best]:.2f}, below {threshold:g}"}
