"""Events on the wire: CloudEvents attributes, times, numbers and gaps."""

import json
import random
import re
import zlib
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from stream.events import GapCounter, Sequencer, encode, rfc3339, to_cloudevent, to_json, topic, topic_prefix
from stream.types import NS, Clip, Event, Kind, Moment, Query

EPOCH_NS = 1_777_863_721_123_456_789  # 2026-05-04T03:02:01.123456789Z
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def query(text: str) -> Query:
    return Query(id=f"q{zlib.crc32(text.encode()):08x}", text=text, pooled=np.zeros(4, np.float32))


DOG = query("a dog runs")


def event(
    seq: int, stream: str = "door", asked: Query = DOG, kind: Kind = Kind.OPENED, end_ns: int | None = None
) -> Event:
    moment = Moment(f"m{seq}", stream, asked.id, 12_300_000_000, end_ns, 13 * NS, 0.75)
    return Event(kind, stream, seq, EPOCH_NS, EPOCH_NS + 14 * NS, asked, moment, 0.5, 456_789_000)


def status(seq: int, stream: str = "door", /, **more: object) -> Event:
    said = {"state": "reconnecting", **more}
    return Event(Kind.STATUS, stream, seq, EPOCH_NS, EPOCH_NS + 14 * NS, status=said)


def test_a_moment_is_a_cloudevent() -> None:
    message = to_cloudevent(event(3, kind=Kind.CLOSED, end_ns=20_000_000_001), "run1")
    assert message == {
        "specversion": "1.0",
        "type": "io.livemoments.moment.closed.v1",
        "source": "/livemoments/door",
        "id": f"run1/{DOG.id}/3",
        "time": "2026-05-04T03:02:15.123456Z",
        "datacontenttype": "application/json",
        "subject": DOG.id,
        "data": {
            "stream": "door",
            "query_id": DOG.id,
            "query": "a dog runs",
            "moment_id": "m3",
            "seq": 3,
            "start": "2026-05-04T03:02:13.423456Z",
            "end": "2026-05-04T03:02:21.123456Z",
            "start_s": 12.3,
            "end_s": 20.000000001,
            "peak_s": 13.0,
            "score": 0.75,
            "threshold": 0.5,
            "capture_to_publish_ms": 456.789,
        },
    }


def test_a_status_is_a_cloudevent_with_what_it_carries() -> None:
    message = to_cloudevent(status(2, reason="timeout", retry_s=4.0, seq=99), "run1")
    assert message["type"] == "io.livemoments.stream.status.v1"
    assert message["id"] == "run1/status/2"
    assert "subject" not in message
    assert message["data"] == {
        "state": "reconnecting",
        "reason": "timeout",
        "retry_s": 4.0,
        "seq": 2,
        "stream": "door",
    }


def test_an_event_of_a_log_tells_its_number_and_old_news_that_it_is_old() -> None:
    plain = to_cloudevent(event(3), "run1")
    assert to_cloudevent(event(3), "run1", 17) == {**plain, "lognumber": 17}
    assert json.loads(encode(status(1), "run1", 18))["lognumber"] == 18
    old = to_cloudevent(replace(event(3), backfill=True), "run1")
    assert old == {**plain, "data": {**plain["data"], "backfill": True}}


@pytest.mark.parametrize("kind", [Kind.OPENED, Kind.UPDATED, Kind.CLOSED, Kind.HIGHLIGHT])
def test_required_attributes(kind: Kind) -> None:
    message = json.loads(encode(event(1, stream="Tür 1/left", kind=kind), "run1"))
    assert all(re.fullmatch("[a-z0-9]+", name) for name in message)
    assert all(isinstance(message[name], str) and message[name] for name in ("id", "source", "type"))
    assert message["specversion"] == "1.0"
    assert message["type"] == f"io.livemoments.{kind}.v1"
    assert re.fullmatch(r"/livemoments/[A-Za-z0-9%._~-]+", message["source"])  # a URI reference: no space, no ü
    assert message["data"]["stream"] == "Tür 1/left"
    assert RFC3339.fullmatch(message["time"]) and RFC3339.fullmatch(message["data"]["start"])
    assert message["data"]["end"] is None and message["data"]["end_s"] is None


def test_a_clip_is_told_with_its_moment() -> None:
    closed = event(3, kind=Kind.CLOSED, end_ns=20 * NS)
    clip = Clip("door_q_20260504T030213.423Z", 7 * NS, 25_500_000_000, 1234, thumbnail=True)
    plain, message = to_cloudevent(closed, "run1"), to_cloudevent(replace(closed, kind=Kind.CLIP, clip=clip), "run1", 5)
    assert message["type"] == "io.livemoments.clip.ready.v1"
    told = message["data"].pop("clip")
    assert message["data"] == plain["data"]
    assert told == {
        "url": "/clips/door_q_20260504T030213.423Z.mp4",
        "thumbnail": "/clips/door_q_20260504T030213.423Z.jpg",
        "start": "2026-05-04T03:02:08.123456Z",
        "start_s": 7.0,
        "end_s": 25.5,
        "bytes": 1234,
        "complete": True,
    }
    short = replace(clip, thumbnail=False, missing="the service ended")
    told = to_cloudevent(replace(closed, kind=Kind.CLIP, clip=short), "run1")["data"]["clip"]
    assert (told["thumbnail"], told["complete"], told["missing"]) == (None, False, "the service ended")


def test_an_event_without_what_its_kind_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="query and a moment"):
        to_cloudevent(Event(Kind.OPENED, "door", 1, 0, 0, DOG), "run1")
    with pytest.raises(ValueError, match="needs a clip"):
        to_cloudevent(event(1, kind=Kind.CLIP), "run1")
    with pytest.raises(ValueError, match="state"):
        to_cloudevent(Event(Kind.STATUS, "door", 1, 0, 0, status={"reason": "x"}), "run1")


def test_rfc3339_round_trip() -> None:
    rng = random.Random(0)
    times = [0, 999, 1000, NS - 1, NS, 951_782_400 * NS - 1, 1_709_164_800 * NS, 4_102_444_800 * NS - 1]
    for utc_ns in times + [rng.randrange(4_000_000_000 * NS) for _ in range(2000)]:
        text = rfc3339(utc_ns)
        assert RFC3339.fullmatch(text)
        back = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
        back_us = (back.days * 86_400 + back.seconds) * 1_000_000 + back.microseconds
        assert back_us == utc_ns // 1000, text  # a float of seconds would be off by one here and there


def test_json_is_always_valid() -> None:
    payload = to_json({"query": "ein Hund läuft 🐕 \ud800", "line": "a\nb"})
    assert payload.count(b"\n") == 0
    assert json.loads(payload.decode("utf-8")) == {"query": "ein Hund läuft 🐕 ?", "line": "a\nb"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"retry_s": float("nan")})


def test_topics() -> None:
    assert topic(event(1)) == f"livemoments/door/{DOG.id}"
    assert topic(status(1)) == "livemoments/door/status"
    assert topic(event(1, stream="a/b")).startswith(topic_prefix("a/b"))
    assert not topic(event(1, stream="a/b")).startswith(topic_prefix("a"))
    assert not topic(event(1, stream="cam10")).startswith(topic_prefix("cam1"))
    assert topic(event(1, stream="cam10")).startswith(topic_prefix(None))


def test_sequencer_counts_each_stream_and_query_on_its_own() -> None:
    sequencer = Sequencer()
    keys = [("door", "q1"), ("door", "q1"), ("yard", "q1"), ("door", "q2"), ("door", None), ("door", "q1")]
    assert [sequencer.next(*key) for key in keys] == [1, 2, 1, 1, 1, 3]


def test_ids_never_repeat() -> None:
    sequencer, seen = Sequencer(), set()
    for run in ("run1", "run2"):
        for turn in range(50):
            stream = ("door", "yard")[turn % 2]
            for asked in (DOG, query("a cat")):
                message = to_cloudevent(event(sequencer.next(stream, asked.id), stream, asked), run)
                seen.add((message["source"], message["id"]))
            message = to_cloudevent(status(sequencer.next(stream, None), stream), run)
            seen.add((message["source"], message["id"]))
        sequencer = Sequencer()
    assert len(seen) == 2 * 50 * 3


def test_gap_counter() -> None:
    gaps = GapCounter()

    def missed(seq: int, stream: str = "door", run: str = "run1") -> int:
        return gaps.count(to_cloudevent(event(seq, stream), run))

    assert missed(7) == 0  # joined late: nothing is missed
    assert missed(8) == 0
    assert missed(11) == 2
    assert missed(1, "yard") == 0  # another stream counts on its own
    assert gaps.count(to_cloudevent(status(5), "run1")) == 0  # so does the status
    assert gaps.count(to_cloudevent(status(7), "run1")) == 1
    assert missed(3, run="run2") == 0  # the program was started again and counts from 1
    assert missed(5, run="run2") == 1
    assert missed(13, run="run3") == 0  # even when its numbers happen to go on from the old ones
    assert gaps.total == 4
