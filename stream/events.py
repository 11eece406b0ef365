"""Events on the wire: CloudEvents 1.0 JSON, the same bytes on every transport. Pure: no clock, no socket, no thread.

An event's `id` is `<run>/<query id>/<seq>`, so (`source`, `id`) never repeats as long as each run of the program has
a name of its own, and a receiver on several transports can tell that it has seen an event already.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from stream.types import NS, Clip, Event, Kind

TOPIC_ROOT = "livemoments"
STATUS = "status"
"""Stands where the query id would, in topics and ids of status events."""
LOST_TYPE = "io.livemoments.client.lost.v1"
"""Type of the notice that a server puts in the place of messages it had to drop for one slow client."""


def rfc3339(utc_ns: int) -> str:
    """UTC nanoseconds as `2026-05-04T03:02:01.000123Z`: microseconds, rounded down, all in integers."""
    seconds, rest_ns = divmod(utc_ns, NS)
    # Only whole seconds go through datetime, so that no float touches the fraction. Six digits, not nine: parsers of
    # several languages refuse more.
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest_ns // 1000:06d}Z"


def topic(event: Event) -> str:
    """`livemoments/<stream>/<query id>`, or `livemoments/<stream>/status`; the stream is percent-encoded."""
    return topic_prefix(event.stream) + (event.query.id if event.query else STATUS)


def topic_prefix(stream: str | None) -> str:
    """What the topics of one stream, or of all (None), begin with. Ends in a slash: `cam1` is not `cam10`."""
    return f"{TOPIC_ROOT}/" if stream is None else f"{TOPIC_ROOT}/{quote(stream, safe='', errors='replace')}/"


def to_cloudevent(event: Event, source_run: str, number: int | None = None) -> dict[str, Any]:
    """The event as a CloudEvents 1.0 dict.

    `source_run` names this run of the program and must be new each time it starts; `number` is that of the event in
    the log, if it is kept in one. Raises ValueError for an event that lacks what its kind needs. The values of a
    status must be JSON values: `to_json` refuses NaN.
    """
    message: dict[str, Any] = {
        "specversion": "1.0",
        "type": f"io.livemoments.{event.kind}.v1",
        "source": f"/{TOPIC_ROOT}/{quote(event.stream, safe='', errors='replace')}",
        "id": f"{source_run}/{event.query.id if event.query else STATUS}/{event.seq}",
        "time": rfc3339(event.emitted_ns),
        "datacontenttype": "application/json",
    }
    if number is not None:
        message["lognumber"] = number
    if event.kind is Kind.STATUS:
        if event.status is None or "state" not in event.status:
            raise ValueError(f"a status event needs a status with a state, got {event.status}")
        return {**message, "data": {**event.status, "stream": event.stream, "seq": event.seq}}
    if event.query is None or event.moment is None:
        raise ValueError(f"an event of kind {event.kind} needs a query and a moment")
    moment, epoch_ns, end_ns = event.moment, event.epoch_ns, event.moment.end_ns
    data: dict[str, Any] = {
        "stream": event.stream,
        "query_id": event.query.id,
        "query": event.query.text,
        "moment_id": moment.id,
        "seq": event.seq,
        "start": rfc3339(epoch_ns + moment.start_ns),
        "end": None if end_ns is None else rfc3339(epoch_ns + end_ns),
        # int / int is rounded once, to the nearest double, whose shortest form is what JSON shows.
        "start_s": moment.start_ns / NS,
        "end_s": None if end_ns is None else end_ns / NS,
        "peak_s": moment.peak_ns / NS,
        "score": float(moment.score),
        "threshold": None if event.threshold is None else float(event.threshold),
        "capture_to_publish_ms": None if event.latency_ns is None else event.latency_ns / 1_000_000,
    }
    if event.backfill:
        data["backfill"] = True
    if event.kind is Kind.CLIP:
        if event.clip is None:
            raise ValueError(f"an event of kind {event.kind} needs a clip")
        data["clip"] = _clip(event.clip, epoch_ns)
    return {**message, "subject": event.query.id, "data": data}


def encode(event: Event, source_run: str, number: int | None = None) -> bytes:
    """The event as it travels: one line of JSON, UTF-8."""
    return to_json(to_cloudevent(event, source_run, number))


def to_json(message: Mapping[str, Any]) -> bytes:
    """One line of compact JSON in valid UTF-8. ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A text from a command line or a client may hold half a surrogate pair, which UTF-8 cannot: "?" then.
    return text.encode("utf-8", errors="replace")


def _clip(clip: Clip, epoch_ns: int) -> dict[str, Any]:
    described = {
        "url": f"/clips/{clip.name}.mp4",
        "thumbnail": f"/clips/{clip.name}.jpg" if clip.thumbnail else None,
        "start": rfc3339(epoch_ns + clip.start_ns),
        "start_s": clip.start_ns / NS,
        "end_s": clip.end_ns / NS,
        "bytes": clip.nbytes,
        "complete": clip.missing is None,
    }
    return described if clip.missing is None else {**described, "missing": clip.missing}


def lost_notice(lost: int, notice_id: str) -> bytes:
    """What a slow client is sent in the place of `lost` messages. `notice_id` must be new each time."""
    return to_json(
        {
            "specversion": "1.0",
            "type": LOST_TYPE,
            "source": f"/{TOPIC_ROOT}",
            "id": notice_id,
            "datacontenttype": "application/json",
            "data": {"lost": lost},
        }
    )


class Sequencer:
    """Numbers the events of one run: 1, 2, 3 ... for each (stream, query), and for each stream's status.

    It never forgets a key, because a number given twice would make an event id repeat: about 200 bytes for each pair
    that was ever used. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, str | None], int] = {}

    def next(self, stream: str, query_id: str | None) -> int:
        """The number of the next event; `query_id` None is for status events."""
        seq = self._last.get((stream, query_id), 0) + 1
        self._last[stream, query_id] = seq
        return seq


class GapCounter:
    """Tells a subscriber how many events it missed, from the `seq` of those that came.

    The first event of a (stream, query) says nothing: a subscriber may join at any time. Nor does the first of a new
    run of the program, which counts from 1 again.
    """

    def __init__(self) -> None:
        self.total = 0
        self._last: dict[tuple[str, str], tuple[str, int]] = {}

    def count(self, message: Mapping[str, Any]) -> int:
        """How many events are missing between this one and the one before it of the same (stream, query)."""
        data = message["data"]
        run, query_id, _ = message["id"].rsplit("/", 2)
        seq: int = data["seq"]
        last_run, last_seq = self._last.get((data["stream"], query_id), (run, seq - 1))
        self._last[data["stream"], query_id] = run, seq
        missed = max(0, seq - last_seq - 1) if run == last_run else 0
        self.total += missed
        return missed
