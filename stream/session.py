"""One stream from frame to event: windows, features, saliency, moments, numbering. No thread, no socket, no gi.

`livemoments run`, the benchmarks and the tests all go through here, so what is measured is what is served.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernels.engine import Engine
from stream.detector import Detector
from stream.events import Sequencer
from stream.moments import Change, MomentOptions, Tracker
from stream.types import Event, Frame, Kind, Query, Saliency, Window
from stream.window import Windower

KEPT_TIMINGS = 10_000  # windows whose timings are remembered: enough for a p99, and bounded


class Durations:
    """The last KEPT_TIMINGS durations in ns. Allocated once: a detector that runs for months must not grow."""

    def __init__(self) -> None:
        self._ring = np.full(KEPT_TIMINGS, 0, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return min(self._count, KEPT_TIMINGS)

    def append(self, ns: int) -> None:
        self._ring[self._count % KEPT_TIMINGS] = ns
        self._count += 1

    def values(self) -> NDArray[np.int64]:
        """(n,) in no order."""
        return self._ring[: len(self)]


@dataclass
class Timings:
    """How long the last windows took, stage by stage."""

    decode: Durations = field(default_factory=Durations)  # live only: capture -> out of the decoder
    wait: Durations = field(default_factory=Durations)  # live only: decoder -> this session, conversion included
    image: Durations = field(default_factory=Durations)  # crop and image engine
    head: Durations = field(default_factory=Durations)  # saliency and moments, all queries
    publish: Durations = field(default_factory=Durations)  # events handed to the sockets
    total: Durations = field(default_factory=Durations)  # capture (recordings: push) -> all of it done


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
    ) -> None:
        """
        Args:
            recorded: the frames come from a recording, whose capture lies in the past: latency then counts from
                the moment a frame is pushed.
            tell: called with each event the moment it exists, before the next window is looked at.
        """
        self.stream = stream
        self.timings = Timings()
        self._options, self._hop_ns, self._recorded, self._tell = options, hop_ns, recorded, tell
        self._windower = Windower(stream, hop_ns)
        self._detector = Detector(engine, stream, hop_ns)
        self._trackers: dict[str, Tracker] = {}
        self._queries: dict[str, Query] = {}
        # UTC at stream time 0 when the newest moment of a query opened: the estimate moves, a moment's start must not.
        self._epochs: dict[str, int] = {}
        self._sequencer = Sequencer()
        self._window: Window | None = None  # the newest
        self._pushed_ns = 0  # time.monotonic_ns() of the newest frame's arrival here

    @property
    def queries(self) -> list[Query]:
        """What is watched for, in the order in which it was added."""
        return list(self._queries.values())

    def add(self, query: Query) -> None:
        """Watch for a query from the next window on. One that is watched already stays as it is."""
        if query.id not in self._queries:
            self._queries[query.id] = query
            self._trackers[query.id] = Tracker(self.stream, query.id, self._hop_ns, self._options)
            self._detector.add(query)

    def remove(self, query_id: str) -> list[Event]:
        """Watch for it no longer; a moment that is open closes."""
        events = self._seal(query_id, self._trackers[query_id].drain()) if query_id in self._trackers else []
        if self._queries.pop(query_id, None):
            del self._trackers[query_id]
            self._epochs.pop(query_id, None)
            self._detector.remove(query_id)
        return events

    def push(self, frame: Frame) -> Step:
        """Look at one frame."""
        self._pushed_ns = time.monotonic_ns()
        step = self._look(frame.pts_ns, self._windower.push(frame))
        if step.scores:
            total_ns = self._latency_ns(frame.wall_ns, time.time_ns())
            self.timings.total.append(total_ns)
            if not self._recorded:
                self.timings.wait.append(self._pushed_ns - frame.arrival_ns)
                self.timings.decode.append(total_ns - (time.monotonic_ns() - frame.arrival_ns))
        return step

    def drain(self) -> Step:
        """End of stream: what is left over is looked at, and open moments close."""
        step = self._look(self._window.end_ns if self._window else 0, self._windower.drain())
        step.events.extend(self.interrupt().events)
        return step

    def interrupt(self) -> Step:
        """The source is gone, perhaps for long: open moments close now, and not when it comes back."""
        step = Step(self._window.end_ns if self._window else 0, [], [])
        for query_id, tracker in self._trackers.items():
            step.events.extend(self._seal(query_id, tracker.drain()))
        return step

    def status(self, state: str, **details: str | float) -> Event:
        """An event about the stream itself."""
        event = Event(
            kind=Kind.STATUS,
            stream=self.stream,
            seq=self._sequencer.next(self.stream, None),
            epoch_ns=self._window.epoch_ns if self._window else 0,
            emitted_ns=time.time_ns(),
            status={"state": state, **details},
        )
        self._tell(event)
        return event

    def _look(self, time_ns: int, windows: Iterable[Window]) -> Step:
        step = Step(time_ns, [], [])
        for window in windows:
            self._window = window
            before_ns = time.monotonic_ns()
            features = self._detector.features(window)
            seen_ns = time.monotonic_ns()
            saliencies = self._detector.saliency(features)
            changes = [(s.query, self._trackers[s.query].push(s, window)) for s in saliencies]
            judged_ns = time.monotonic_ns()
            for query_id, found in changes:
                step.events.extend(self._seal(query_id, found))
            step.scores.append((window, saliencies))
            self.timings.image.append(seen_ns - before_ns)
            self.timings.head.append(judged_ns - seen_ns)
            self.timings.publish.append(time.monotonic_ns() - judged_ns)
        return step

    def _seal(self, query_id: str, changes: list[Change]) -> list[Event]:
        """Number, time and tell."""
        events = []
        for change in changes:
            assert self._window is not None
            now_ns = time.time_ns()
            if change.kind is Kind.OPENED:
                self._epochs[query_id] = self._window.epoch_ns
            event = Event(
                kind=change.kind,
                stream=self.stream,
                seq=self._sequencer.next(self.stream, query_id),
                epoch_ns=self._epochs[query_id],
                emitted_ns=now_ns,
                query=self._queries[query_id],
                moment=change.moment,
                threshold=self._options.threshold,
                latency_ns=self._latency_ns(self._window.captured_ns, now_ns),
            )
            self._tell(event)
            events.append(event)
        return events

    def _latency_ns(self, captured_ns: int, now_ns: int) -> int:
        return time.monotonic_ns() - self._pushed_ns if self._recorded else now_ns - captured_ns
