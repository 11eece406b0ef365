"""The closed moments of a stream, out of what the event log holds. Pure: payloads in, moments out."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kernels.errors import InputError, LogError
from stream.deliver.log import EventLog
from stream.deliver.recovery import utc_ns
from stream.types import NS, Kind, normalise

CLIP = "clip.ready"
"""The kind of event that says where the video of a closed moment lies."""
KINDS = (str(Kind.CLOSED), CLIP)
_SLICE = 256
_SAME_NS = 2000  # times on the wire are rounded to the microsecond


@dataclass(frozen=True)
class Wanted:
    """Which moments: those of one query, and those that touch a stretch of time. None: no bound."""

    query: str | None = None
    since_ns: int | None = None  # UTC
    until_ns: int | None = None

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> "Wanted":
        """Of `query`, `since` and `until` as text; other names do not count. InputError for a time that is none."""
        since_ns, until_ns = (_time(name, given[name]) if name in given else None for name in ("since", "until"))
        if since_ns is not None and until_ns is not None and since_ns >= until_ns:
            raise InputError(f"since {given['since']} is not before until {given['until']}")
        return cls(given.get("query"), since_ns, until_ns)

    def has(self, moment: "ClosedMoment") -> bool:
        return (
            (self.query is None or normalise(moment.query) == normalise(self.query))
            and (self.since_ns is None or moment.end_ns > self.since_ns)
            and (self.until_ns is None or moment.start_ns < self.until_ns)
        )


@dataclass(frozen=True)
class ClosedMoment:
    """A moment as it was told in the end."""

    query: str
    start_ns: int  # UTC
    end_ns: int  # never before the start
    peak_ns: int
    epoch_ns: int  # UTC at which its stream began to count
    told: Mapping[str, Any]  # the data of its event
    clip: Mapping[str, Any] | None  # what the event about its clip says of that

    @property
    def id(self) -> str:
        return str(self.told["moment_id"])

    @property
    def score(self) -> float:
        return float(self.told["score"])


def payloads(log: EventLog, stream: str) -> Iterator[bytes]:
    """What a log tells of a stream's closed moments, oldest first. LogError if the disk fails."""
    after = 0
    while entries := log.read(after, _SLICE):
        after = entries[-1].number
        yield from (entry.payload for entry in entries if entry.stream == stream and entry.kind in KINDS)


def collect(told: Iterable[bytes], wanted: Wanted) -> list[ClosedMoment]:
    """The moments that `told` closes, oldest first; one that was told again, as when a recording is played again, as
    it was told last. LogError for what is not an event.
    """
    closed: dict[tuple[str, str], ClosedMoment] = {}
    clips: dict[tuple[str, str], Mapping[str, Any]] = {}
    for payload in told:
        try:
            message = json.loads(payload)
            data = message["data"]
            key = data["query_id"], data["moment_id"]
            if f".{CLIP}." in message["type"]:
                clips[key] = data["clip"]
            else:
                closed[key] = _moment(data)
        except (ValueError, KeyError, TypeError) as error:
            raise LogError(f"an event in the log is damaged ({type(error).__name__}: {error})") from error
    moments = [
        ClosedMoment(each.query, each.start_ns, each.end_ns, each.peak_ns, each.epoch_ns, each.told, clips.get(key))
        for key, each in closed.items()
    ]
    return sorted(filter(wanted.has, moments), key=lambda each: (each.start_ns, each.end_ns, each.id))


def is_recording(moments: Sequence[ClosedMoment]) -> bool:
    """Whether their stream has one beginning, to the microsecond. A live stream's is an estimate that moves, and it
    begins anew with every start of the program.
    """
    begun = [moment.epoch_ns for moment in moments]
    return bool(begun) and max(begun) - min(begun) <= _SAME_NS


def origin_ns(moments: Sequence[ClosedMoment]) -> int:
    """UTC from which exports count: a recording's beginning; for a live stream the start of the first moment."""
    if not moments:
        return 0
    return moments[0].epoch_ns if is_recording(moments) else moments[0].start_ns


def _moment(data: Mapping[str, Any]) -> ClosedMoment:
    start_ns, end_ns = utc_ns(data["start"]), utc_ns(data["end"])
    epoch_ns = start_ns - round(data["start_s"] * NS)
    peak_ns = epoch_ns + round(data["peak_s"] * NS)
    return ClosedMoment(data["query"], start_ns, max(start_ns, end_ns), peak_ns, epoch_ns, data, None)


def _time(name: str, text: str) -> int:
    try:
        at = datetime.fromisoformat(text.strip())
        # Through text: a float of seconds would lose the microseconds.
        return utc_ns((at if at.tzinfo else at.replace(tzinfo=UTC)).isoformat())
    except (ValueError, OverflowError):
        raise InputError(f"{name} must be a time such as 2026-11-21T10:53:08Z, got {text}") from None
