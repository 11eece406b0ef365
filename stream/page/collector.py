"""What a report needs of a stream, collected while it runs: scores, moments, a small picture at each peak. No file.

All of it is bounded: a run may last for months. Pictures come from the frames that are looked at anyway.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stream.clips.pictures import WIDTH, encode
from stream.session import Session, Step
from stream.types import NS, Event, Frame, Kind, Saliency, Window

WINDOWS = 40_000
"""The newest that are kept: 11 hours at a hop of 1 s."""
LANES = 256
"""Queries that a stream may have had; those that come later are left out."""
MOMENTS = 4096
"""The newest of a stream that are kept."""
PICTURES = 300
"""Of a stream. The moments with the highest scores have theirs."""
_FRAMES = 6  # the newest, as they came: a window lasts for two hops or so
_CLIMB = 4  # pictures of the highest scores since the last moment, of one query

Spans = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Told:
    """A closed moment. Times in s of the stream."""

    id: str
    start_s: float
    end_s: float
    peak_s: float
    score: float
    late_ms: float | None  # from capture (recordings: from the frame) to the news that it is over
    highlights: Sequence[tuple[float, float]]  # time in s and score
    picture: bytes | None  # JPEG of the frame nearest to the peak


@dataclass(frozen=True)
class Lane:
    """One query."""

    text: str
    threshold: float
    scores: Sequence[float]  # of each window; NaN where it was not watched
    moments: Sequence[Told]  # by start
    truth: Spans | None  # s; None: nobody knows


@dataclass(frozen=True)
class Recording:
    """One stream as it was seen."""

    name: str
    origin_ns: int | None  # UTC at 0 s of a live stream; None for a recording
    hop_s: float
    times: Sequence[float]  # s: the middles of the windows
    lanes: Sequence[Lane]
    length_s: float = 0.0
    lost_lanes: int = 0  # queries that were one too many


@dataclass
class _Lane:
    text: str
    threshold: float
    scores: "array[float]" = field(default_factory=lambda: array("f"))
    climb: list[tuple[float, int, bytes]] = field(default_factory=list)  # rising scores: score, ns of the peak, JPEG
    highlights: list[tuple[float, float]] = field(default_factory=list)  # of the moment that is open


class Collector:
    """Collects one session's steps. truth: query id -> true windows in s."""

    def __init__(self, session: Session, *, recorded: bool, truth: Mapping[str, Spans] | None = None) -> None:
        self._session, self._recorded, self._truth = session, recorded, truth or {}
        self._epoch_ns: int | None = None
        self._times = array("d")
        self._lanes: dict[str, _Lane] = {}
        self._lost: set[str] = set()
        self._told: deque[tuple[str, Told]] = deque(maxlen=MOMENTS)
        self._frames: deque[Frame] = deque(maxlen=_FRAMES)

    def add(self, step: Step) -> None:
        """Take in what one frame led to."""
        if step.scores or step.events:
            self._meet()
        for window, saliencies in step.scores:
            self._see(window, saliencies)
        for event in step.events:
            if event.moment and event.moment.query in self._lanes:
                self._tell(event, self._lanes[event.moment.query])

    def recording(self, length_s: float = 0.0) -> Recording:
        """All of it so far. length_s: how long the stream is known to be."""
        lanes = []
        for key, lane in self._lanes.items():
            moments = sorted((told for query, told in self._told if query == key), key=lambda told: told.start_s)
            self._fill(lane)
            lanes.append(Lane(lane.text, lane.threshold, lane.scores, moments, self._truth.get(key)))
        hop_s = self._session.hop_ns / NS
        seen_s = self._times[-1] + hop_s / 2 if self._times else 0.0
        origin_ns = None if self._recorded else self._epoch_ns
        return Recording(
            self._session.stream, origin_ns, hop_s, self._times, lanes, max(length_s, seen_s), len(self._lost)
        )

    def _meet(self) -> None:
        for query in self._session.queries:
            if query.id in self._lanes:
                continue
            if len(self._lanes) == LANES:
                if len(self._lost) < LANES:
                    self._lost.add(query.id)
                continue
            self._lanes[query.id] = _Lane(query.text, self._session.threshold(query))

    def _see(self, window: Window, saliencies: Iterable[Saliency]) -> None:
        self._frames.extend(window.frames)
        self._epoch_ns = window.epoch_ns  # of a live stream an estimate, and the newest is the best
        centre_ns = (window.start_ns + window.end_ns) // 2
        self._times.append(centre_ns / NS)
        picture: bytes | None = None
        for saliency in saliencies:
            if (lane := self._lanes.get(saliency.query)) is None:
                continue
            self._fill(lane, 1)
            lane.scores.append(saliency.score)
            # A moment's peak is a window that scored higher than all of it before.
            if saliency.score < lane.threshold or (lane.climb and saliency.score <= lane.climb[-1][0]):
                continue
            picture = picture or self._picture(centre_ns)
            if picture:
                lane.climb = [*lane.climb[1 - _CLIMB :], (saliency.score, centre_ns, picture)]
        if len(self._times) > WINDOWS + WINDOWS // 8:
            for lane in self._lanes.values():
                self._fill(lane)
                del lane.scores[:-WINDOWS]
            del self._times[:-WINDOWS]

    def _fill(self, lane: _Lane, less: int = 0) -> None:
        """The windows that a query has not seen, up to the newest or `less` before it."""
        missing = len(self._times) - less - len(lane.scores)
        lane.scores.extend([float("nan")] * missing)

    def _tell(self, event: Event, lane: _Lane) -> None:
        moment = event.moment
        assert moment is not None
        if event.kind is Kind.HIGHLIGHT:
            lane.highlights.append((moment.peak_ns / NS, moment.score))
        if event.kind is not Kind.CLOSED or moment.end_ns is None:
            return
        picture = next((jpeg for _, at_ns, jpeg in lane.climb if at_ns == moment.peak_ns), None)
        told = Told(
            moment.id,
            moment.start_ns / NS,
            moment.end_ns / NS,
            moment.peak_ns / NS,
            moment.score,
            None if event.latency_ns is None else event.latency_ns / 1e6,
            lane.highlights,
            picture,
        )
        # What was seen after its end belongs to the next.
        lane.climb = [each for each in lane.climb if each[1] >= moment.end_ns]
        lane.highlights = []
        self._told.append((moment.query, told))
        pictured = [at for at, (_, each) in enumerate(self._told) if each.picture]
        if len(pictured) > PICTURES:
            weakest = min(pictured, key=lambda at: self._told[at][1].score)
            query_id, each = self._told[weakest]
            self._told[weakest] = query_id, replace(each, picture=None)

    def _picture(self, at_ns: int) -> bytes | None:
        """JPEG of the newest frames' nearest to a stream time; None where there is none around it."""
        if not self._frames:
            return None
        nearest = min(self._frames, key=lambda frame: abs(frame.pts_ns - at_ns))
        if abs(nearest.pts_ns - at_ns) > 2 * NS:
            return None
        return encode(nearest, WIDTH)
