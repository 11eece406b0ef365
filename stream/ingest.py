"""Video sources through GStreamer: files, network streams, cameras and raw descriptions in, `Frame` out.

The only file that imports gi. Passive: no threads of its own; GStreamer decodes in its threads, `read` collects.

    uridecodebin | description -> clocksync -> [probe] -> queue -> videoconvert -> videoflip -> RGB -> appsink

The probe sees every decoded frame, gives it its time and lets through only those that will be looked at, so the
rest are neither converted nor copied. Audio is never decoded. Which decoder runs is GStreamer's own choice by rank
(va, nv, v4l2 before libav); queue and converter take system memory only, so a hardware decoder negotiates to
download. Raise or lower a decoder with GST_PLUGIN_FEATURE_RANK.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from kernels.errors import SourceError
from stream.clock import Sampler, StreamClock
from stream.sources import NO_VIDEO, Source, SourceKind, SourceStatus, cannot_open, explain, one_line
from stream.types import NS, WINDOW_NS, Frame, Pixels

_PACKAGES = (
    "python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly gstreamer1.0-libav"
)
try:
    import gi

    for _namespace in ("Gst", "GstApp", "GstVideo"):
        gi.require_version(_namespace, "1.0")
    from gi.repository import GLib, Gst, GstApp, GstVideo  # noqa: F401 - GstApp gives the appsink its methods
except (ImportError, ValueError) as error:
    raise SourceError(f"GStreamer is missing for Python ({error}): apt install {_PACKAGES}") from error

# `lm_decoded` is where decoders and descriptions end: anything but raw video does not link.
_TAIL = (
    "capsfilter name=lm_decoded caps=video/x-raw(ANY) ! clocksync name=lm_pacer sync=false "
    "! queue name=lm_queue max-size-buffers=2 max-size-bytes=0 max-size-time=0 "
    "! videoconvert ! videoflip video-direction=auto ! capsfilter caps=video/x-raw,format=RGB "
    "! appsink name=lm_sink sync=false max-buffers=1 drop=false enable-last-sample=false"
)
_ELEMENTS = ("uridecodebin", "clocksync", "queue", "videoconvert", "videoflip", "appsink")
_POLL_S = 0.05  # how late an error may be noticed; frames wake `read` at once
_DRAIN_NS = NS // 2  # after an error, decoders that stay silent for so long have given all they had
_IN_FLIGHT = 256  # entries kept for frames on their way; far more than queue and sink can hold
_HEALTHY_NS = 10 * NS
_BACKOFF_S = (0.5, 30.0)
_NTP_TO_UNIX_NS = 2_208_988_800 * NS
_PLAUSIBLE_NS = 5 * NS  # between a capture time and now; beyond, somebody's clock is wrong


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
) -> "VideoSource":
    """Connect to `source` and wait for its first picture.

    hop_ns: take the first frame of each slot of this length; None takes all.
    pace: how fast a recording runs; live sources keep their own pace.
    name: stream name of the frames; None takes `source.name`.
    stall_s: a live source silent for so long is reconnected; the first connection may take twice that.

    Raises:
        SourceError: GStreamer or a plugin is missing, or the source cannot be opened or has no video.
    """
    if not Gst.is_initialized():
        Gst.init(None)
    if missing := [element for element in _ELEMENTS if Gst.ElementFactory.find(element) is None]:
        raise SourceError(f"GStreamer lacks {', '.join(missing)}: apt install {_PACKAGES}")
    return VideoSource(source, hop_ns, pace, name or source.name, stall_s)


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
        self, source: Source, hop_ns: int | None, pace: Literal["real", "max"], name: str, stall_s: float
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
        self._pipeline: _Pipeline | None = None
        self._connected_ns: int | None = None  # None until the present pipeline gave its first frame
        pipeline = _Pipeline(source)
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

    def _first_picture(self, pipeline: "_Pipeline") -> None:
        """Wait until a frame stands at the gate."""
        pipeline.start(self._decoded)
        deadline_ns = time.monotonic_ns() + 2 * self._stall_ns
        while not pipeline.first.wait(_POLL_S):
            at_end = pipeline.sink.is_eos()  # before the bus: a source that fails says why, then ends
            if (problem := pipeline.problem()) is None and at_end:
                problem = "it ended before its first picture"
            elif problem is None and time.monotonic_ns() > deadline_ns:
                problem = f"no picture came within {2 * self._stall_ns / NS:g} s"
            if problem is not None:
                raise SourceError(cannot_open(self._source, problem))

    def _connect(self, pipeline: "_Pipeline") -> None:
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
        pipeline = _Pipeline(self._source)
        with self._switch:
            if self._closed.is_set():
                return
            self._last_ns = time.monotonic_ns()
            self._pipeline = pipeline
            self._clock.interrupt()
            pipeline.start(self._decoded)

    # -- in GStreamer's streaming thread

    def _decoded(self, pipeline: "_Pipeline", buffer: Any, running_ns: int) -> bool:
        """Give a decoded frame its time; whether it will be looked at."""
        arrival_ns = time.monotonic_ns()
        tick = self._clock.tick(running_ns, arrival_ns)
        self.decoded += 1
        self._last_ns, self._time_ns = arrival_ns, tick.time_ns
        self._broken |= tick.discontinuity
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

    def _collect(self, pipeline: "_Pipeline", timeout_ns: int) -> Frame | None:
        pipeline.problem()  # keeps the bus empty when there are always frames to collect
        sample = pipeline.sink.try_pull_sample(timeout_ns)
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
        return Frame(self.name, entry.index, *when, _pixels(sample), entry.discontinuity)

    def _lose_oldest(self) -> None:
        lost = self._flight.popleft()
        self.dropped += 1
        if lost.discontinuity and self._flight:  # the break must not get lost with the frame that told it
            self._flight[0] = replace(self._flight[0], discontinuity=True)

    def _check(self, pipeline: "_Pipeline") -> None:
        """Nothing to collect: is it over?"""
        if pipeline.fault is not None:
            raise pipeline.fault
        at_end = pipeline.sink.is_eos()  # before the bus: a source that fails says why, then ends
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
        if problem is None and self.duration_ns is not None and self._time_ns + WINDOW_NS < self.duration_ns:
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


class _Pipeline:
    """One GStreamer pipeline from start to stop; a reconnect makes another.

    The first decoded frame waits at a gate until `release`: how frames are queued depends on whether the source is
    live, and some sources show that no earlier. `fault` is what went wrong in a streaming thread, where nobody could
    catch it.
    """

    def __init__(self, source: Source) -> None:
        self.first = threading.Event()  # a frame stands at the gate, or `fault` is set
        self.fault: Exception | None = None
        self.adaptive = False  # HLS or DASH: segments come in bursts, so the pacer must spread them
        self._source = source
        self._gate = threading.Event()
        self._stopped = False
        self._no_preroll = False  # GStreamer's word for live
        self._no_video = False
        self._problem: str | None = None
        self._demuxer: Any = None  # the last one plugged in
        self._on_decoded: Callable[[_Pipeline, Any, int], bool]
        self._segment = Gst.Segment.new()
        self._ntp = Gst.Caps.from_string("timestamp/x-ntp")
        described = source.kind in (SourceKind.TEST, SourceKind.LAUNCH)
        try:
            self._bin = Gst.parse_launch(f"{source.locator} ! {_TAIL}" if described else _TAIL)
        except GLib.Error as error:
            raise SourceError(f"cannot open {source.shown}: {one_line(error.message)}") from error
        self._bus = self._bin.get_bus()
        self.sink = self._bin.get_by_name("lm_sink")
        self._entry = self._bin.get_by_name("lm_decoded").get_static_pad("sink")
        self._gate_pad = self._bin.get_by_name("lm_queue").get_static_pad("sink")
        self._decoder = None if described else Gst.ElementFactory.make("uridecodebin")
        if self._decoder is not None:
            self._decoder.set_property("uri", source.locator)
            self._decoder.set_property("caps", Gst.Caps.from_string("video/x-raw(ANY)"))
            self._decoder.set_property("expose-all-streams", False)
            self._bin.add(self._decoder)

    def start(self, on_decoded: "Callable[[_Pipeline, Any, int], bool]") -> None:
        """Set off; `on_decoded(self, buffer, running_ns)` is asked about every frame, in a streaming thread."""
        self._on_decoded = on_decoded
        self._probes = [
            self._gate_pad.add_probe(Gst.PadProbeType.EVENT_DOWNSTREAM, self._see_event),
            self._gate_pad.add_probe(Gst.PadProbeType.BUFFER, self._see_buffer),
        ]
        self._handlers: list[tuple[Any, int]] = []
        if self._decoder is not None:
            self._handlers = [
                (self._bin, self._bin.connect("deep-element-added", self._see_element)),
                (self._decoder, self._decoder.connect("pad-added", self._see_pad)),
                (self._decoder, self._decoder.connect("no-more-pads", self._see_last_pad)),
            ]
        self._no_preroll = self._bin.set_state(Gst.State.PAUSED) == Gst.StateChangeReturn.NO_PREROLL
        self._bin.set_state(Gst.State.PLAYING)  # takes effect once prerolled; a failure is told on the bus

    def release(self, *, leaky: bool, paced: bool) -> None:
        """Open the gate. leaky: full queues drop their oldest frame; paced: frames pass at their running time."""
        if leaky:
            self._bin.get_by_name("lm_queue").set_property("leaky", 2)  # downstream: the oldest goes
            # The sink must not block either, or its frame and the one behind it age until the reader comes.
            self.sink.set_property("drop", True)
            self.sink.set_property("max-buffers", 2)
        self._bin.get_by_name("lm_pacer").set_property("sync", paced)
        self._gate.set()

    def stop(self) -> None:
        """Stop all streaming threads. Nothing is asked or given afterwards."""
        self._stopped = True
        self._gate.set()
        self._bin.set_state(Gst.State.NULL)
        # What GStreamer holds of Python the garbage collector cannot see: each reconnect would leak a pipeline.
        for probe in self._probes:
            self._gate_pad.remove_probe(probe)
        for owner, handler in self._handlers:
            owner.disconnect(handler)
        self._probes, self._handlers = [], []

    def is_live(self) -> bool:
        """Whether pictures come when they happen. Known once the first frame stands at the gate."""
        if self._no_preroll or self._source.kind is not SourceKind.NETWORK:
            return self._no_preroll
        assert self._decoder is not None
        if self.duration_ns() is not None:
            return False
        # A file without an index does not tell its duration, but the server tells its size. A playlist has a size too.
        return self.adaptive or not self._decoder.get_property("source").query_duration(Gst.Format.BYTES)[0]

    def duration_ns(self) -> int | None:
        known, duration_ns = self._bin.query_duration(Gst.Format.TIME)
        return duration_ns if known and duration_ns > 0 else None

    def problem(self) -> str | None:
        """What GStreamer said went wrong, in words; the first word counts. Empties the bus."""
        while (message := self._bus.pop_filtered(Gst.MessageType.ERROR)) is not None:
            error, debug = message.parse_error()
            self._problem = self._problem or explain(error.message, debug)
        if self._problem is None and self._no_video:
            self._problem = NO_VIDEO
        if self._problem is None and self._demuxer is not None and self._demuxer.numsrcpads == 0:
            # GStreamer 1.22's decodebin now and then swallows the error of a demuxer that gives up at once: what is
            # left to see is a demuxer that put its task to rest without having found a stream.
            task = self._demuxer.get_static_pad("sink").get_task_state()
            if task == Gst.TaskState.PAUSED:
                self._problem = "it holds no playable stream (was the recording ever finished?)"
        return self._problem

    def captured_ns(self, buffer: Any, running_ns: int) -> int:
        """UTC capture time of a live frame; see `VideoSource`."""
        captured_ns = time.time_ns()
        if self._no_preroll:
            waited_ns = self._bin.get_clock().get_time() - self._bin.get_base_time() - running_ns
            captured_ns -= waited_ns if 0 < waited_ns < _PLAUSIBLE_NS else 0
        meta = buffer.get_reference_timestamp_meta(self._ntp)
        if meta is not None and abs(meta.timestamp - _NTP_TO_UNIX_NS - captured_ns) < _PLAUSIBLE_NS:
            return int(meta.timestamp - _NTP_TO_UNIX_NS)
        return captured_ns

    # -- in GStreamer's streaming threads

    def _see_buffer(self, _pad: Any, info: Any) -> Any:
        try:
            wanted = self._wanted(info.get_buffer())
        except Exception as error:  # nobody to raise to here: `read` does
            self.fault = error
            self.first.set()
            wanted = False
        return Gst.PadProbeReturn.OK if wanted else Gst.PadProbeReturn.DROP

    def _wanted(self, buffer: Any) -> bool:
        pts = buffer.pts
        if pts == Gst.CLOCK_TIME_NONE or self._segment.format != Gst.Format.TIME:
            if self._gate.is_set():
                return False  # one bad frame among good ones
            raise SourceError(f"the frames of {self._source.shown} have no timestamps: add do-timestamp=true")
        running_ns = self._segment.to_running_time(Gst.Format.TIME, pts)
        if running_ns == Gst.CLOCK_TIME_NONE:
            return False  # outside of what the container says is shown
        if not self._gate.is_set():
            self.first.set()
            self._gate.wait()
        return not self._stopped and self._on_decoded(self, buffer, running_ns)

    def _see_event(self, _pad: Any, info: Any) -> Any:
        event = info.get_event()
        if event.type == Gst.EventType.SEGMENT:
            event.copy_segment(self._segment)
        return Gst.PadProbeReturn.OK

    def _see_element(self, _bin: Any, _parent: Any, element: Any) -> None:
        factory = element.get_factory()
        if factory is None:
            return
        if factory.get_name() == "rtspsrc":
            element.set_property("protocols", 4)  # TCP: a lost packet costs time, not a smeared picture
            element.set_property("latency", 100)  # ms that packets may come late
            element.set_property("add-reference-timestamp-meta", True)
        duty = factory.get_metadata("klass")
        self.adaptive |= "Adaptive" in duty
        if "Demux" in duty:
            self._demuxer = element

    def _see_pad(self, _decoder: Any, pad: Any) -> None:
        """Link the first video; the next too once that is gone, as when HLS changes its rate."""
        if self._entry.is_linked() or not pad.query_caps().to_string().startswith("video/x-raw"):
            return
        if pad.link(self._entry) != Gst.PadLinkReturn.OK:
            self.fault = SourceError(f"cannot open {self._source.shown}: its video cannot be brought to memory")
            self.first.set()

    def _see_last_pad(self, _decoder: Any) -> None:
        self._no_video = not self._entry.is_linked()


def _pixels(sample: Any) -> Pixels:
    """A copy of the picture, (H, W, 3): GStreamer wants its buffer back."""
    buffer, info = sample.get_buffer(), GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    meta = GstVideo.buffer_get_video_meta(buffer)
    layout = info if meta is None else meta
    stride, offset = layout.stride[0], layout.offset[0]
    data = buffer.extract_dup(0, buffer.get_size())
    rows: Pixels = np.ndarray((info.height, info.width, 3), np.uint8, data, offset, (stride, 3, 1))
    return np.ascontiguousarray(rows)  # rows are padded to 4 bytes
