"""Moments as OpenTimelineIO: a timeline that editors open. The only file importing opentimelineio.

A track a query; on it clips where its moments are and gaps between them, a marker at each peak. A clip refers to its
mp4 where one was cut, and has no media otherwise: editors show its name and let it be linked. The rate is one that
editors have timecode for; the exact times stand in the metadata.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any
from urllib.parse import urljoin

import opentimelineio as otio

from stream.events import rfc3339
from stream.export.moments import ClosedMoment, is_recording, origin_ns
from stream.types import NS

RATE = 25
DAY_NS = 86_400 * NS
NAMESPACE = "livemoments"


def to_otio(stream: str, moments: Sequence[ClosedMoment], base: str = "") -> str:
    """JSON of a timeline. It begins where the times count from: at 0 for a recording, at the UTC time of day for a
    live stream. base: the server's address, in front of the paths of clips.
    """
    origin = origin_ns(moments)
    timeline = otio.schema.Timeline(stream, metadata={NAMESPACE: {"stream": stream}})
    if moments:
        timeline.metadata[NAMESPACE]["origin"] = rfc3339(origin)
    timeline.global_start_time = otio.opentime.RationalTime(
        0 if is_recording(moments) else _frames(origin % DAY_NS), RATE
    )
    by_query = sorted(moments, key=lambda moment: str(moment.told["query_id"]))
    for _, group in groupby(by_query, key=lambda moment: moment.told["query_id"]):
        for lane in _lanes(list(group), origin):
            timeline.tracks.append(_track(lane, origin, base))
    text: str = timeline.to_json_string()
    return f"{text}\n"


def _lanes(moments: Sequence[ClosedMoment], origin: int) -> list[list[ClosedMoment]]:
    """One lane unless moments overlap, as those of two programs may that watched one recording."""
    lanes: list[list[ClosedMoment]] = []
    for moment in moments:
        free = (lane for lane in lanes if _span(lane[-1], origin)[1] <= _span(moment, origin)[0])
        if (lane := next(free, None)) is None:
            lanes.append(lane := [])
        lane.append(moment)
    return lanes


def _track(moments: Sequence[ClosedMoment], origin: int, base: str) -> Any:
    track = otio.schema.Track(moments[0].query, kind=otio.schema.TrackKind.Video)
    at = 0
    for moment in moments:
        start, end = _span(moment, origin)
        if start > at:
            track.append(otio.schema.Gap(source_range=_range(0, start - at)))
        track.append(_clip(moment, end - start, base))
        at = end
    return track


def _clip(moment: ClosedMoment, frames: int, base: str) -> Any:
    first, media = 0, otio.schema.MissingReference()
    if moment.clip:
        length = max(1, _frames(round((moment.clip["end_s"] - moment.clip["start_s"]) * NS)))
        media = otio.schema.ExternalReference(urljoin(base, moment.clip["url"]), _range(0, length))
        first = max(0, _frames(round((moment.told["start_s"] - moment.clip["start_s"]) * NS)))
    clip = otio.schema.Clip(moment.query, media, _range(first, frames), metadata={NAMESPACE: dict(moment.told)})
    peak = min(frames - 1, max(0, _frames(moment.peak_ns - moment.start_ns)))
    clip.markers.append(otio.schema.Marker(f"peak {moment.score:.2f}", _range(first + peak, 0)))
    return clip


def _span(moment: ClosedMoment, origin: int) -> tuple[int, int]:
    """First frame and the one after the last: a clip lasts for one at least."""
    start = max(0, _frames(moment.start_ns - origin))
    return start, max(start + 1, _frames(moment.end_ns - origin))


def _frames(ns: int) -> int:
    return round(ns * RATE / NS)


def _range(start: int, frames: int) -> Any:
    return otio.opentime.TimeRange(otio.opentime.RationalTime(start, RATE), otio.opentime.RationalTime(frames, RATE))
