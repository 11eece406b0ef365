"""One stream from frame to event: windows, features, saliency, moments, numbering. No thread, no socket, no gi.

`livemoments run`, the benchmarks and the tests all go through here, so what is measured is what is served.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kernels.engine import Engine
from stream.backfill import Backfill
from stream.detector import Detector, see
from stream.events import Sequencer
from stream.history import History, Scores
from stream.moments import Change, MomentOptions, Tracker
from stream.timings import Timings
from stream.types import Event, Features, Frame, Kind, Moment, Query, Saliency, Window
from stream.window import Windower


@dataclass(frozen=True)
class Step:
    """What one frame led to."""

    time_ns: int  # of the frame
    scores: list[tuple[Window, list[Saliency]]]  # per window, one saliency per query
    events: list[Event]


class Session:
    """One stream with its queries."""

    def __init__(
        self,
        engine: Engine,
        stream: str,
        hop_ns: int,
        options: MomentOptions,
        *,
        recorded: bool,
        tell: Callable[[Event], None] = lambda event: None,
        history: History | None = None,
        sequencer: Sequencer | None = None,
    ) -> None:
        """
        Args:
            recorded: the frames come from a recording, whose capture lies in the past: latency then counts from
                the moment a frame is pushed.
            tell: called with each event the moment it exists, before the next window is looked at.
            history: keeps the last windows, so that queries that come later can be answered for them.
            sequencer: numbers the events; one for all streams of a program, where a stream may come back.
        """
        self.stream = stream
        self.timings = Timings()
        self.looked_at = 0  # frames
        self.events = Counter[Kind]()  # told since the beginning
        self.events_of: dict[str, Counter[Kind]] = {}  # of each query, since it is watched for
        self.history = history
        self._engine, self.options, self.hop_ns = engine, options, hop_ns
        self.recorded, self._tell = recorded, tell
        self._windower = Windower(stream, hop_ns)
        self._detector = Detector(engine, stream, hop_ns)
        self._trackers: dict[str, Tracker] = {}
        self._queries: dict[str, Query] = {}
        self._scores: dict[str, Scores] = {}
        self._told: dict[str, int] = {}  # of queries that went, the stream time up to which their moments were told
        # UTC at stream time 0 when the newest moment of a query opened: the estimate moves, a moment's start must not.
        self._epochs: dict[str, int] = {}
        self._sequencer = sequencer or Sequencer()
        self._window: Window | None = None  # the newest
        self._interrupted = False  # no window since the source has gone
        self._pushed_ns = 0  # time.monotonic_ns() of the newest frame's arrival here

    @property
    def queries(self) -> list[Query]:
        """What is watched for, in the order in which it was added."""
        return list(self._queries.values())

    @property
    def epoch_ns(self) -> int | None:
        """UTC at stream time 0, as the newest window has it; None before the first."""
        return self._window.epoch_ns if self._window else None

    @property
    def captured_ns(self) -> int | None:
        """UTC capture of the newest frame that has been judged; None before the first."""
        return self._window.captured_ns if self._window else None

    def threshold(self, query: Query) -> float:
        """What its score is held against."""
        return self.options.threshold if query.threshold is None else query.threshold

    def add(self, query: Query) -> None:
        """Watch for a query from the next window on. One that is watched already stays as it is."""
        if query.id not in self._queries:
            self._detector.add(query)
            self._admit(query, self._tracker(query), Scores(self.history.capacity if self.history else 1))

    def backfill(self, queries: Sequence[Query]) -> Backfill:
        """Begin to watch for queries from the oldest window that is kept on: `adopt` it once it is done.

        Raises:
            ValueError: nothing is kept.
        """
        if self.history is None:
            raise ValueError(f"{self.stream} keeps no history")
        detector = Detector(self._engine, self.stream, self.hop_ns)
        return Backfill(self.history, detector, queries, self._tracker, self._told)

    def adopt(self, backfill: Backfill) -> list[Event]:
        """Watch for its queries from the next window on; what they found is told now.

        Raises:
            ValueError: it is not done.
        """
        if not backfill.done:
            raise ValueError("a window would be left out")
        self._detector.adopt(backfill.detector)
        for query in backfill.queries:
            self._admit(query, backfill.trackers[query.id], backfill.scores[query.id])
        over = {change.moment.id for _, _, change in backfill.found if change.kind is Kind.CLOSED}
        events = [
            event
            for window, query_id, change in backfill.found
            for event in self._seal(query_id, [change], window, past=True, over=change.moment.id in over)
        ]
        return events + (self.interrupt().events if self._interrupted else [])

    def remove(self, query_id: str) -> list[Event]:
        """Watch for it no longer; a moment that is open closes."""
        if query_id not in self._queries:
            return []
        events = self._seal(query_id, self._trackers[query_id].drain(), self._window)
        for table in (self._queries, self._trackers, self._scores, self._epochs, self.events_of):
            table.pop(query_id, None)
        self._detector.remove(query_id)
        if self.history and self._window:
            self._told[query_id] = self._window.end_ns
            oldest_ns = self.history.at(self.history.start).window.start_ns
            self._told = {each: end_ns for each, end_ns in self._told.items() if end_ns > oldest_ns}
        return events

    def scores(self, query_id: str) -> Scores | None:
        """What a query scored lately, None if it is not watched."""
        return self._scores.get(query_id)

    def open_moment(self, query_id: str) -> Moment | None:
        """The moment of a query that lasts now and was told."""
        tracker = self._trackers.get(query_id)
        return tracker.open_moment if tracker else None

    def push(self, frame: Frame) -> Step:
        """Look at one frame."""
        return push_all([(self, frame)])[0]

    def drain(self) -> Step:
        """End of stream: what is left over is looked at, and open moments close."""
        step = Step(self._window.end_ns if self._window else 0, [], [])
        _look(self._engine, [(self, step, deque(self._windower.drain()))])
        step.events.extend(self.interrupt().events)
        return step

    def interrupt(self) -> Step:
        """The source is gone, perhaps for long: open moments close now, and not when it comes back."""
        step = Step(self._window.end_ns if self._window else 0, [], [])
        self._interrupted = True
        for query_id, tracker in self._trackers.items():
            step.events.extend(self._seal(query_id, tracker.drain(), self._window))
        return step

    def status(self, state: str, **details: str | float) -> Event:
        """An event about the stream itself."""
        event = Event(
            kind=Kind.STATUS,
            stream=self.stream,
            seq=self._sequencer.next(self.stream, None),
            epoch_ns=self.epoch_ns or 0,
            emitted_ns=time.time_ns(),
            status={"state": state, **details},
        )
        self.events[event.kind] += 1
        self._tell(event)
        return event

    def _tracker(self, query: Query) -> Tracker:
        own = self.options if query.threshold is None else replace(self.options, threshold=query.threshold)
        return Tracker(self.stream, query.id, self.hop_ns, own)

    def _admit(self, query: Query, tracker: Tracker, scores: Scores) -> None:
        self._queries[query.id], self._trackers[query.id], self._scores[query.id] = query, tracker, scores
        self.events_of[query.id] = Counter()

    def _judge(self, step: Step, features: Features, image_ns: int) -> None:
        """What a window, whose features took so long, says to every query."""
        before_ns = time.monotonic_ns()
        window = self._window = features.window
        self._interrupted = False
        if self.history:
            features = self.history.keep(features)
        saliencies = self._detector.saliency(features)
        changes = [(s.query, self._trackers[s.query].push(s, window)) for s in saliencies]
        judged_ns = time.monotonic_ns()
        for query_id, found in changes:
            step.events.extend(self._seal(query_id, found, window))
        for each in saliencies:
            self._scores[each.query].append(each)
        step.scores.append((window, saliencies))
        self.timings.image.append(image_ns)
        self.timings.head.append(judged_ns - before_ns)
        self.timings.publish.append(time.monotonic_ns() - judged_ns)

    def _seal(
        self, query_id: str, changes: list[Change], window: Window | None, *, past: bool = False, over: bool = False
    ) -> list[Event]:
        """Number, time and tell.

        Args:
            window: the one that made the changes.
            past: it was found by a backfill.
            over: and is over by now.
        """
        events = []
        for change in changes:
            assert window is not None
            now_ns = time.time_ns()
            if change.kind is Kind.OPENED:
                self._epochs[query_id] = window.epoch_ns
            event = Event(
                kind=change.kind,
                stream=self.stream,
                seq=self._sequencer.next(self.stream, query_id),
                epoch_ns=self._epochs[query_id],
                emitted_ns=now_ns,
                query=self._queries[query_id],
                moment=change.moment,
                threshold=self._trackers[query_id].options.threshold,
                latency_ns=None if past else self._latency_ns(window.captured_ns, now_ns),
                backfill=over,
            )
            self.events[event.kind] += 1
            self.events_of[query_id][event.kind] += 1
            self._tell(event)
            events.append(event)
        return events

    def _latency_ns(self, captured_ns: int, now_ns: int) -> int:
        return time.monotonic_ns() - self._pushed_ns if self.recorded else now_ns - captured_ns


def push_all(frames: Sequence[tuple[Session, Frame]]) -> list[Step]:
    """Look at one frame of each of several streams of one engine: all of them in one call of its image tower."""
    work = []
    for session, frame in frames:
        session.looked_at += 1
        session._pushed_ns = time.monotonic_ns()
        work.append((session, Step(frame.pts_ns, [], []), deque(session._windower.push(frame))))
    if work:
        _look(work[0][0]._engine, work)
    for (session, frame), (_, step, _) in zip(frames, work, strict=True):
        if step.scores:
            total_ns = session._latency_ns(frame.wall_ns, time.time_ns())
            session.timings.total.append(total_ns)
            if not session.recorded:
                session.timings.wait.append(session._pushed_ns - frame.arrival_ns)
                session.timings.decode.append(total_ns - (time.monotonic_ns() - frame.arrival_ns))
    return [step for _, step, _ in work]


def _look(engine: Engine, work: Sequence[tuple[Session, Step, deque[Window]]]) -> None:
    """Window by window of each stream, as a head must see them, and of all streams side by side."""
    while waiting := [(session, step, windows.popleft()) for session, step, windows in work if windows]:
        before_ns = time.monotonic_ns()
        found = see(engine, [(session._detector, window) for session, _, window in waiting])
        image_ns = time.monotonic_ns() - before_ns  # each waited for all
        for (session, step, _), features in zip(waiting, found, strict=True):
            session._judge(step, features, image_ns)
