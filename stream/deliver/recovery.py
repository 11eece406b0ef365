"""What a killed process could not say any more: the end of the moments it had open. Pure: payloads in, payload out."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from stream.events import rfc3339, to_json
from stream.types import NS, Kind

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OPENED, _CLOSED = (f"io.livemoments.{kind}.v1" for kind in (Kind.OPENED, Kind.CLOSED))
_LATE_NS = 60 * NS
"""A moment that is told for the first time so long after its start is none of a live stream's present."""


def interrupted(payloads: Sequence[bytes], seq: int, number: int, now_ns: int) -> tuple[bytes, int]:
    """The CLOSED event of a moment that was told by `payloads` (oldest first, at least one) and never closed.

    It speaks in the name of the run that told the newest of them, as its event `seq`, and ends the moment when that
    one was told: nobody knows more. Score and peak are the highest told. `number` is its own in the log, `now_ns` UTC.
    Returns the payload, and the UTC ns of the end.
    """
    told: list[dict[str, Any]] = [json.loads(payload) for payload in payloads]
    newest = told[-1]
    data = {**newest["data"], "seq": seq, "capture_to_publish_ms": None, "interrupted": True}
    # A highlight tells a peak, which is not always the highest of its moment.
    best = max((message["data"] for message in told), key=lambda each: float(each["score"]))
    data["score"], data["peak_s"] = best["score"], best["peak_s"]
    start_ns = utc_ns(data["start"])
    epoch_ns = start_ns - round(data["start_s"] * NS)
    told_ns, first_ns = utc_ns(newest["time"]), utc_ns(told[0]["time"])
    if told[0]["type"] == _OPENED and first_ns - start_ns > _LATE_NS:
        told_ns = start_ns + told_ns - first_ns  # a recording's own time, which may lie in another year
    end_ns = max(told_ns, start_ns, epoch_ns + round(data["peak_s"] * NS))
    data["end"], data["end_s"] = rfc3339(end_ns), (end_ns - epoch_ns) / NS
    message = {
        **newest,
        "type": _CLOSED,
        "id": f"{newest['id'].rpartition('/')[0]}/{seq}",
        "time": rfc3339(now_ns),
        "lognumber": number,
        "data": data,
    }
    return to_json(message), end_ns


def utc_ns(text: str) -> int:
    """UTC ns of an RFC 3339 time, in integers."""
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1) * 1000
