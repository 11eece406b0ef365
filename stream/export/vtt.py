"""Moments as WebVTT: subtitles that players and browsers show. The only file importing webvtt."""

from collections.abc import Sequence
from html import escape

from webvtt import Caption, WebVTT
from webvtt.models import Timestamp

from stream.events import rfc3339
from stream.export.moments import ClosedMoment, origin_ns

_MS = 1_000_000


def to_vtt(stream: str, moments: Sequence[ClosedMoment]) -> str:
    """One cue a moment, named by its id. A NOTE at the top says in UTC from when the times count."""
    origin = origin_ns(moments)
    since = f"Times count from {rfc3339(origin)}." if moments else "There are no moments."
    # Escaped: no text may hold "-->".
    document = WebVTT(header_comments=[f"Moments of {escape(' '.join(stream.split()), quote=False)}. {since}"])
    for moment in moments:
        start_ms = max(0, round((moment.start_ns - origin) / _MS))
        end_ms = max(start_ms + 1, round((moment.end_ns - origin) / _MS))  # a cue must last
        text = f"{escape(moment.query, quote=False)} {moment.score:.2f}"
        start, end = (str(Timestamp.from_seconds(ms / 1000)) for ms in (start_ms, end_ms))
        document.captions.append(Caption(start, end, text, moment.id))
    return f"{document.content}\n"
