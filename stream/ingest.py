"""Video sources: files, network streams, cameras and raw descriptions in, `Frame` out, whatever happens on the way.

Passive: no threads of its own; GStreamer decodes in its threads, `read` collects. What GStreamer does is in
`stream/pipeline.py`; here a source gets its time, loses frames by rule, dies and comes back.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from kernels.errors import SourceError
from stream.clips.ring import INTERRUPTED, Ring
from stream.clock import Sampler, StreamClock
from stream.pipeline import Pipeline, pixels, require_plugins
from stream.sources import Source, SourceKind, SourceStatus, cannot_open
from stream.types import NS, WINDOW_NS, Frame

_POLL_S = 0.05  # how late an error may be noticed; frames wake `read` at once
_DRAIN_NS = NS // 2  # after an error, decoders that stay silent for so long have given all they had
_IN_FLIGHT = 256  # entries kept for frames on their way; far more than queue and sink can hold
_HEALTHY_NS = 10 * NS
_BACKOFF_S = (0.5, 30.0)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A frame that the probe let through, until its pixels come out of the sink."""

    pts: int  # of the buffer: what the two are matched by
    index: int
    time_ns: int
    arrival_ns: int
    wall_ns: int
    discontinuity: bool


def open_source(
    source: Source,
    *,
    hop_ns: int | None,
    pace: Literal["real", "max"] = "real",
    name: str | None = None,
    stall_s: float = 10.0,
    ring: Ring | None = None,
) -> "VideoSource":
    """Connect to `source` and wait for its first picture.

    hop_ns: take one frame per hop, see `clock.Sampler`; None takes all.
    pace: how fast a recording runs; live sources keep their own pace.
    name: stream name of the frames; None takes `source.name`.
    stall_s: a live source silent for so long is reconnected; the first connection may take twice that.
    ring: takes the video as it comes, encoded; its `source` has been told of this one.

    Raises:
        SourceError: GStreamer or a plugin is missing, or the source cannot be opened or has no video.
    """
    require_plugins()
    return VideoSource(source, hop_ns, pace, name or source.name, stall_s, ring)


class VideoSource:
    """An open source. Read it from one thread, to the end; `close` may come from any.

    Recordings: nothing is ever lost. A slow reader stops the decoder: queue and sink (3 frames) wait.
    Live: the decoder is never stopped. A slow reader gets the newest two frames; the older are lost, `dropped`
    counts them and `Frame.index` shows the gap. A converter slower than the decoder loses frames the same way.
    Live sources that fail, end or stall are opened again, after 0.5 s, then twice as long each time up to 30 s, for
    ever; descriptions and test pictures end with their EOS. A recording that breaks off gives what it has, then
    `ended` with the reason.

    Wall time. File: its modification time + stream time, so two runs give the same events. Other recordings: time
    of opening + stream time. Live: what the sender's clock said, when RTSP tells (from its first RTCP report on, after
    some seconds) and it is within 5 s of ours; otherwise the local clock less the time spent in the pipeline.
    """

    def __init__(
        self,
        source: Source,
        hop_ns: int | None,
        pace: Literal["real", "max"],
        name: str,
        stall_s: float,
        ring: Ring | None = None,
    ) -> None:
        self.name = name
        self.decoded = 0  # frames that left the decoder
        self.taken = 0  # of these, chosen for looking at
        self.dropped = 0  # of these, lost to a slow reader or to a connection that died
        self.reconnects = 0  # times the source came back
        self.ended = False  # nothing more will come
        self._source = source
        self._stall_ns = int(stall_s * NS)
        self._sampler = Sampler(hop_ns)
        self._ring = ring
        self._offset_ns: int | None = None  # stream time - running time, as the ring knows it
        self._news: deque[SourceStatus] = deque()
        self._lock = threading.Lock()  # guards _flight and what is counted with it
        self._flight: deque[_Taken] = deque()
        self._broken = False  # a discontinuity not yet told by a frame
        self._closed = threading.Event()
        self._switch = threading.Lock()  # pipelines start and stop under it: `close` may come from another thread
        self._attempt = 0  # tries since the last healthy stretch
        self._retry_ns = 0  # while there is no pipeline: monotonic time of the next try
        self._last_ns = time.monotonic_ns()  # when the last frame was decoded, or the pipeline started
        self._time_ns = 0  # stream time of the last frame decoded
        self._step_ns = 0  # its distance from the one before
        self._pipeline: Pipeline | None = None
        self._connected_ns: int | None = None  # None until the present pipeline gave its first frame
        pipeline = Pipeline(source)
        try:
            self._first_picture(pipeline)
            self.live = pipeline.is_live()
            self.duration_ns = None if self.live else pipeline.duration_ns()
            self._clock = StreamClock(live=self.live)
            self._epoch_ns = source.path.stat().st_mtime_ns if source.path else time.time_ns()
            self._paced = pipeline.adaptive if self.live else pace == "real"
            self._pipeline = pipeline
            self._connect(pipeline)
        except BaseException:
            pipeline.stop()
            raise

    def __iter__(self) -> Iterator[Frame | SourceStatus]:
        """Everything until the end or `close`, waiting as long as it takes."""
        while not self.ended:
            if (item := self.read(_POLL_S)) is not None:
                yield item

    def read(self, timeout_s: float) -> Frame | SourceStatus | None:
        """The next frame, or what happened to the source; None when there is neither within `timeout_s`.

        After `ended` there is only None, at once.

        Raises:
            SourceError: a source that was opened again gives what cannot be used, such as frames without timestamps.
        """
        deadline_ns = time.monotonic_ns() + int(timeout_s * NS)
        while True:
            if self._news:
                return self._news.popleft()
            if self.ended:
                return None
            left_ns = max(deadline_ns - time.monotonic_ns(), 0)
            if (pipeline := self._pipeline) is None:
                self._wait_for_retry(left_ns)
            else:
                if self._connected_ns is None and pipeline.first.is_set():
                    self._connect(pipeline)
                    continue
                if (frame := self._collect(pipeline, min(left_ns, int(_POLL_S * NS)))) is not None:
                    return frame
                self._check(pipeline)
            if left_ns == 0 and not self._news:
                return None

    def close(self) -> None:
        """Let go of the source. A `read` in another thread returns; none gives anything afterwards."""
        self._closed.set()
        with self._switch:
            if self._pipeline is not None:
                self._pipeline.stop()
                self._pipeline = None
        self.ended = True
        self._news.clear()

    # -- opening

    def _first_picture(self, pipeline: Pipeline) -> None:
        """Wait until a frame stands at the gate."""
        self._start(pipeline)
        deadline_ns = time.monotonic_ns() + 2 * self._stall_ns
        while not pipeline.first.wait(_POLL_S):
            at_end = pipeline.at_end()  # before the bus: a source that fails says why, then ends
            if (problem := pipeline.problem()) is None and at_end:
                problem = "it ended before its first picture"
            elif problem is None and time.monotonic_ns() > deadline_ns:
                problem = f"no picture came within {2 * self._stall_ns / NS:g} s"
            if problem is not None:
                raise SourceError(cannot_open(self._source, problem))

    def _connect(self, pipeline: Pipeline) -> None:
        """The first frame is there: let it and all others flow."""
        if pipeline.fault is not None:
            raise pipeline.fault
        if self._attempt > 0:
            self.reconnects += 1
        self._last_ns = self._connected_ns = time.monotonic_ns()
        self._news.append(SourceStatus("connected"))
        pipeline.release(leaky=self.live, paced=self._paced)

    def _wait_for_retry(self, left_ns: int) -> None:
        wait_ns = self._retry_ns - time.monotonic_ns()
        if self._closed.wait(max(min(wait_ns, left_ns), 0) / NS) or wait_ns > left_ns:
            return
        pipeline = Pipeline(self._source)
        with self._switch:
            if self._closed.is_set():
                return
            self._last_ns = time.monotonic_ns()
            self._pipeline = pipeline
            self._clock.interrupt()
            if self._ring:
                self._ring.begin(INTERRUPTED)
                self._offset_ns = None
            self._start(pipeline)

    def _start(self, pipeline: Pipeline) -> None:
        pipeline.start(self._decoded, self._ring.put if self._ring else None)

    # -- in GStreamer's streaming thread

    def _decoded(self, pipeline: Pipeline, buffer: Any, running_ns: int) -> bool:
        """Give a decoded frame its time; whether it will be looked at."""
        arrival_ns = time.monotonic_ns()
        tick = self._clock.tick(running_ns, arrival_ns)
        self.decoded += 1
        self._step_ns, self._last_ns, self._time_ns = tick.time_ns - self._time_ns, arrival_ns, tick.time_ns
        self._broken |= tick.discontinuity
        if self._ring and tick.offset_ns != self._offset_ns:
            self._offset_ns = tick.offset_ns
            self._ring.mark(running_ns, tick.offset_ns)
        if not self._sampler.take(tick.time_ns):
            return False
        wall_ns = pipeline.captured_ns(buffer, running_ns) if self.live else self._epoch_ns + tick.time_ns
        with self._lock:
            self._flight.append(_Taken(buffer.pts, self.taken, tick.time_ns, arrival_ns, wall_ns, self._broken))
            self.taken += 1
            self._broken = False
            if len(self._flight) > _IN_FLIGHT:  # nobody reads: the oldest left the queue long ago
                self._lose_oldest()
        return True

    # -- in the reader's thread

    def _collect(self, pipeline: Pipeline, timeout_ns: int) -> Frame | None:
        pipeline.problem()  # keeps the bus empty when there are always frames to collect
        sample = pipeline.pull(timeout_ns)
        if sample is None:
            return None
        pts = sample.get_buffer().pts
        with self._lock:
            if all(entry.pts != pts for entry in self._flight):
                return None  # given up for lost while nobody read
            while self._flight[0].pts != pts:  # the queue dropped those before it
                self._lose_oldest()
            entry = self._flight.popleft()
        when = entry.time_ns, entry.arrival_ns, entry.wall_ns
        return Frame(self.name, entry.index, *when, pixels(sample), entry.discontinuity)

    def _lose_oldest(self) -> None:
        lost = self._flight.popleft()
        self.dropped += 1
        if lost.discontinuity and self._flight:  # the break must not get lost with the frame that told it
            self._flight[0] = replace(self._flight[0], discontinuity=True)

    def _check(self, pipeline: Pipeline) -> None:
        """Nothing to collect: is it over?"""
        if pipeline.fault is not None:
            raise pipeline.fault
        at_end = pipeline.at_end()  # before the bus: a source that fails says why, then ends
        problem = pipeline.problem()
        silent_ns = time.monotonic_ns() - self._last_ns
        patience_ns = self._stall_ns * (2 if self._connected_ns is None else 1)
        if at_end or (problem is not None and silent_ns > _DRAIN_NS):
            self._over(problem, at_end)
        elif self.live and silent_ns > patience_ns:
            self._over(f"no picture for {patience_ns / NS:g} s", at_end=False)

    def _over(self, problem: str | None, at_end: bool) -> None:
        """The present pipeline gives nothing more."""
        with self._switch:
            if self._closed.is_set() or self._pipeline is None:
                return
            self._pipeline.stop()
            self._pipeline = None
        with self._lock:
            while self._flight:
                self._lose_oldest()
        endless = self._source.kind in (SourceKind.NETWORK, SourceKind.DEVICE)
        if self.live and (endless or not at_end):
            self._schedule_retry(problem or "the far end closed the stream")
            return
        due_ns = self._time_ns + max(WINDOW_NS, 2 * self._step_ns)
        if problem is None and self.duration_ns is not None and due_ns < self.duration_ns:
            shown_s, whole_s = self._time_ns / NS, self.duration_ns / NS
            problem = f"its pictures stop at {shown_s:.1f} s of {whole_s:.1f} s: it may be truncated"
        self.ended = True
        self._news.append(SourceStatus("ended", problem))

    def _schedule_retry(self, reason: str) -> None:
        if self._connected_ns is not None and self._last_ns - self._connected_ns > _HEALTHY_NS:
            self._attempt = 0
        shortest_s, longest_s = _BACKOFF_S
        wait_s = min(shortest_s * 2**self._attempt, longest_s)
        self._attempt = min(self._attempt + 1, 16)  # beyond, only the power would grow
        self._retry_ns = time.monotonic_ns() + int(wait_s * NS)
        self._connected_ns = None
        self._news.append(SourceStatus("reconnecting", reason, wait_s))
