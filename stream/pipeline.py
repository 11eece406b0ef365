"""One GStreamer pipeline: whatever a source is, decoded frames of raw video come out of it.

Beside `stream/clips/mp4.py`, which writes files, the one that imports gi.

    uridecodebin | description -> clocksync -> [probe] -> queue -> videoconvert -> videoflip -> RGB -> appsink

The probe sees every decoded frame and lets through only those that will be looked at, so the rest are neither
converted nor copied. Audio is never decoded. Which decoder runs is GStreamer's own choice by rank (va, nv, v4l2 before
libav); queue and converter take system memory only, so a hardware decoder negotiates to download. Raise or lower a
decoder with GST_PLUGIN_FEATURE_RANK.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.errors import SourceError
from stream.clips.keys import Keys
from stream.clips.ring import Unit
from stream.sources import NO_VIDEO, Source, SourceKind, explain, one_line
from stream.types import NS, Pixels

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

# PyGObject makes the class of a plain C struct when it is first asked for. Two threads that ask at once, those of two
# streams, get classes that do not take each other's objects.
_STRUCTS = (Gst.PadProbeInfo, Gst.ReferenceTimestampMeta, GstVideo.VideoMeta)

# `lm_decoded` is where decoders and descriptions end: anything but raw video does not link.
_TAIL = (
    "capsfilter name=lm_decoded caps=video/x-raw(ANY) ! clocksync name=lm_pacer sync=false "
    "! queue name=lm_queue max-size-buffers=2 max-size-bytes=0 max-size-time=0 "
    "! videoconvert ! videoflip video-direction=auto ! capsfilter caps=video/x-raw,format=RGB "
    "! appsink name=lm_sink sync=false max-buffers=1 drop=false enable-last-sample=false"
)
_ELEMENTS = ("uridecodebin", "clocksync", "queue", "videoconvert", "videoflip", "appsink")
_NTP_TO_UNIX_NS = 2_208_988_800 * NS
_PLAUSIBLE_NS = 5 * NS  # between a capture time and now; beyond, somebody's clock is wrong


def require_plugins() -> None:
    """Start GStreamer.

    Raises:
        SourceError: an element that every source needs is not installed.
    """
    if not Gst.is_initialized():
        Gst.init(None)
    if missing := [element for element in _ELEMENTS if Gst.ElementFactory.find(element) is None]:
        raise SourceError(f"GStreamer lacks {', '.join(missing)}: apt install {_PACKAGES}")


class Pipeline:
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
        self._on_decoded: Callable[[Pipeline, Any, int], bool]
        self._on_unit: Callable[[Unit, str, bool], None] | None = None
        self._taps: list[_Tap] = []  # one for each decoder that was plugged in
        self._tap: _Tap | None = None  # that of the decoder whose pictures count
        self._segment = Gst.Segment.new()
        self._ntp = Gst.Caps.from_string("timestamp/x-ntp")
        described = source.kind in (SourceKind.TEST, SourceKind.LAUNCH)
        try:
            self._bin = Gst.parse_launch(f"{source.locator} ! {_TAIL}" if described else _TAIL)
        except GLib.Error as error:
            raise SourceError(f"cannot open {source.shown}: {one_line(error.message)}") from error
        self._bus = self._bin.get_bus()
        self._sink = self._bin.get_by_name("lm_sink")
        self._entry = self._bin.get_by_name("lm_decoded").get_static_pad("sink")
        self._gate_pad = self._bin.get_by_name("lm_queue").get_static_pad("sink")
        self._decoder = None if described else Gst.ElementFactory.make("uridecodebin")
        if self._decoder is not None:
            self._decoder.set_property("uri", source.locator)
            self._decoder.set_property("caps", Gst.Caps.from_string("video/x-raw(ANY)"))
            self._decoder.set_property("expose-all-streams", False)
            self._bin.add(self._decoder)

    def start(
        self,
        on_decoded: "Callable[[Pipeline, Any, int], bool]",
        on_unit: Callable[[Unit, str, bool], None] | None = None,
    ) -> None:
        """Set off; `on_decoded(self, buffer, running_ns)` is asked about every frame, in a streaming thread.

        `on_unit(unit, caps, first)`, if given, gets what goes into the decoder: first, of this decoder. Video that was
        never encoded has none.
        """
        self._on_decoded, self._on_unit = on_decoded, on_unit
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
            self._sink.set_property("drop", True)
            self._sink.set_property("max-buffers", 2)
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
        for tap in self._taps:
            tap.remove()
        self._probes, self._handlers, self._taps, self._tap = [], [], [], None

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

    def pull(self, timeout_ns: int) -> Any:
        """The next sample that came through, for `pixels`; None when none does in time. Its buffer has the pts."""
        return self._sink.try_pull_sample(timeout_ns)

    def at_end(self) -> bool:
        """Whether everything has been pulled and nothing more comes."""
        ended: bool = self._sink.is_eos()
        return ended

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
        if self._on_unit is not None and "Decoder" in duty and "Video" in duty:
            self._tap = _Tap(element, self._see_unit)
            self._taps.append(self._tap)

    def _see_unit(self, tap: "_Tap", unit: Unit, first: bool) -> None:
        if self._on_unit is not None and tap is self._tap:
            self._on_unit(unit, tap.caps, first)

    def _see_pad(self, _decoder: Any, pad: Any) -> None:
        """Link the first video; the next too once that is gone, as when HLS changes its rate."""
        if self._entry.is_linked() or not pad.query_caps().to_string().startswith("video/x-raw"):
            return
        if pad.link(self._entry) != Gst.PadLinkReturn.OK:
            self.fault = SourceError(f"cannot open {self._source.shown}: its video cannot be brought to memory")
            self.first.set()
        # Of several videos the first counts, and not the newest.
        self._tap = next((tap for tap in self._taps if tap.feeds(pad)), self._tap)

    def _see_last_pad(self, _decoder: Any) -> None:
        self._no_video = not self._entry.is_linked()


class _Tap:
    """Sees what goes into one decoder, from before its first unit on."""

    def __init__(self, decoder: Any, see: "Callable[[_Tap, Unit, bool], None]") -> None:
        self.caps = ""
        self._decoder, self._see = decoder, see
        self._first, self._segment, self._keys = True, Gst.Segment.new(), Keys()
        self._next_pts = Gst.CLOCK_TIME_NONE  # of a unit that has none
        self._pad = decoder.get_static_pad("sink")
        self._probes = (
            []
            if self._pad is None
            else [
                self._pad.add_probe(Gst.PadProbeType.EVENT_DOWNSTREAM, self._see_event),
                self._pad.add_probe(Gst.PadProbeType.BUFFER, self._see_buffer),
            ]
        )

    def feeds(self, pad: Any) -> bool:
        """Whether what leaves this pad, of a bin or of a bin in one, is the decoder's."""
        while isinstance(pad, Gst.GhostPad):
            pad = pad.get_target()
        return pad is not None and pad.get_parent_element() == self._decoder

    def remove(self) -> None:
        for probe in self._probes:
            self._pad.remove_probe(probe)
        self._probes = []

    # -- in GStreamer's streaming threads

    def _see_event(self, _pad: Any, info: Any) -> Any:
        event = info.get_event()
        if event.type == Gst.EventType.SEGMENT:
            event.copy_segment(self._segment)
        elif event.type == Gst.EventType.CAPS:
            self.caps = event.parse_caps().to_string()
        return Gst.PadProbeReturn.OK

    def _see_buffer(self, _pad: Any, info: Any) -> Any:
        buffer = info.get_buffer()
        pts, step = buffer.pts, buffer.duration
        if pts == Gst.CLOCK_TIME_NONE:  # the decoder counts on, too
            pts = self._next_pts
        self._next_pts = pts + step if Gst.CLOCK_TIME_NONE not in (pts, step) else Gst.CLOCK_TIME_NONE
        if pts != Gst.CLOCK_TIME_NONE and self._segment.format == Gst.Format.TIME:
            # In full: what lies before the segment is decoded, too.
            sign, running_ns = self._segment.to_running_time_full(Gst.Format.TIME, pts)
            data = buffer.extract_dup(0, buffer.get_size())
            key = self._keys.is_key(data, self.caps, delta=buffer.has_flags(Gst.BufferFlags.DELTA_UNIT))
            first, self._first = self._first, False
            self._see(self, Unit(data, sign * running_ns, key, time.monotonic_ns()), first)
        return Gst.PadProbeReturn.OK


def pixels(sample: Any) -> Pixels:
    """A copy of the picture, (H, W, 3): GStreamer wants its buffer back."""
    buffer, info = sample.get_buffer(), GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    meta = GstVideo.buffer_get_video_meta(buffer)
    layout = info if meta is None else meta
    stride, offset = layout.stride[0], layout.offset[0]
    data = buffer.extract_dup(0, buffer.get_size())
    rows: Pixels = np.ndarray((info.height, info.width, 3), np.uint8, data, offset, (stride, 3, 1))
    return np.ascontiguousarray(rows)  # rows are padded to 4 bytes
