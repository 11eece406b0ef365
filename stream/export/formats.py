"""What moments can be exported as. The library of a format is imported when it is asked for."""

from collections.abc import Iterable, Mapping
from typing import Literal

from stream.deliver.log import EventLog
from stream.export.moments import Wanted, collect, payloads

Format = Literal["vtt", "otio", "jsonl"]
FORMATS: tuple[Format, ...] = ("vtt", "otio", "jsonl")
TYPES = {"vtt": "text/vtt; charset=utf-8", "otio": "application/json", "jsonl": "application/x-ndjson"}


def export(log: EventLog, stream: str, kind: Format, given: Mapping[str, str] | None = None, base: str = "") -> bytes:
    """The closed moments of a stream, for an open log of which any thread may read.

    Args:
        given: `query`, `since` and `until` as a URL has them; other names are left alone.
        base: the address under which clips are found, as http://HOST:PORT.

    Raises:
        InputError: a time in `given` is none.
        LogError: the disk fails.
    """
    return render(payloads(log, stream), stream, kind, Wanted.parse(given or {}), base)


def render(told: Iterable[bytes], stream: str, kind: Format, wanted: Wanted, base: str = "") -> bytes:
    """The same of the payloads of events."""
    moments = collect(told, wanted)
    match kind:
        case "vtt":
            from stream.export.vtt import to_vtt

            text = to_vtt(stream, moments)
        case "otio":
            from stream.export.otio import to_otio

            text = to_otio(stream, moments, base)
        case "jsonl":
            from stream.export.jsonl import to_rows

            text = to_rows(stream, moments)
    return text.encode("utf-8", errors="replace")
