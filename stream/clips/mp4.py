"""Encoded units into an mp4 file, as they are: nothing is decoded. Beside `stream/pipeline.py` the one that imports gi.

    appsrc -> parser -> timestamper -> mp4mux -> filesink

The parser brings what a decoder took into the form that a file wants. Units have the time at which they are shown, the
timestamper works out in which order and when they are decoded: RTSP does not tell.
"""

import contextlib
import re
from pathlib import Path

from kernels.errors import LivemomentsError
from stream.clips.ring import Unit
from stream.pipeline import require_plugins
from stream.sources import explain

import gi  # isort: skip - `stream.pipeline` says what to install where it is missing

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import Gst, GstApp  # noqa: E402, F401 - GstApp gives the appsrc its methods

_CHAINS = {
    "video/x-h264": "h264parse ! h264timestamper",
    "video/x-h265": "h265parse ! h265timestamper",
    "video/x-av1": "av1parse",
    "video/x-vp9": "vp9parse",
    "video/mpeg": "mpeg4videoparse",  # version 4 alone: see `refusal`
}
_BACKLOG_BYTES = 8 << 20


class Mp4Error(LivemomentsError):
    """A file cannot be written, in words."""


def refusal(caps: str) -> str | None:
    """Why video of this format cannot stand in an mp4 file; None: it can."""
    kind = caps.partition(",")[0]
    if kind not in _CHAINS or (kind == "video/mpeg" and "mpegversion=(int)4" not in caps):
        return f"clips cannot hold {kind}: H.264, H.265, AV1, VP9 and MPEG-4 can be cut without encoding them again"
    missing = [name for name in (*_chain(caps).split(" ! "), "mp4mux") if Gst.ElementFactory.find(name) is None]
    return f"GStreamer lacks {', '.join(missing)}: apt install gstreamer1.0-plugins-bad" if missing else None


class Mp4:
    """A file being written, `path` with .part behind it until it is whole. For one thread.

    While it is made, a second file as large lies beside it, `path` with .index.part behind it: a player is to find the
    index at the beginning. Errors of the disk come up some calls later.
    """

    def __init__(self, path: Path, caps: str) -> None:
        """
        Raises:
            Mp4Error: GStreamer does not take it.
        """
        require_plugins()
        self._path, self.part = path, path.with_name(f"{path.name}.part")
        self._media = path.with_name(f"{path.name}.media.part")
        self._caps, self._ended = caps, False
        self._bin = Gst.parse_launch(
            f"appsrc name=source format=time max-bytes=0 ! {_chain(caps)} ! mp4mux name=mux faststart=true "
            "! filesink name=sink sync=false async=false"
        )
        self._source = self._bin.get_by_name("source")
        self._source.set_property("caps", Gst.Caps.from_string(_with_colours(caps)))
        self._bin.get_by_name("mux").set_property("faststart-file", str(self._media))
        self._bin.get_by_name("sink").set_property("location", str(self.part))
        self._bus = self._bin.get_bus()
        if self._bin.set_state(Gst.State.PLAYING) == Gst.StateChangeReturn.FAILURE:
            try:
                self.check()
                raise Mp4Error(f"{path.name} cannot be written")
            finally:
                self.abort()

    @property
    def is_behind(self) -> bool:
        """It has not written what it was given yet: give it no more for now."""
        return bool(self._source.get_property("current-level-bytes") > _BACKLOG_BYTES)

    def push(self, unit: Unit, time_ns: int) -> None:
        """The next unit, shown at `time_ns` of the file. The first is a key, at 0."""
        buffer = Gst.Buffer.new_wrapped(unit.data)
        buffer.pts = time_ns
        if not unit.key:
            buffer.set_flags(Gst.BufferFlags.DELTA_UNIT)
        self._source.push_buffer(buffer)

    def end(self) -> None:
        """No more units come."""
        self._source.end_of_stream()
        self._ended = True

    def check(self, timeout_s: float = 0.0) -> bool:
        """Whether the file is whole, and has its name. Waits for it, if told to, once it has ended.

        Raises:
            Mp4Error: it cannot be written; nothing of it is left.
        """
        kinds = Gst.MessageType.ERROR | Gst.MessageType.EOS
        message = self._bus.timed_pop_filtered(round(timeout_s * Gst.SECOND), kinds)
        if message is None:
            return False
        if message.type == Gst.MessageType.ERROR:
            error, debug = message.parse_error()
            self.abort()
            raise Mp4Error(explain(error.message, debug))
        self._bin.set_state(Gst.State.NULL)
        try:
            self._media.unlink(missing_ok=True)
            self.part.replace(self._path)
        except OSError as error:
            self.abort()
            raise Mp4Error(f"{self._path.name}: {error.strerror}") from None
        return True

    def abort(self) -> None:
        """Leave nothing behind."""
        self._bin.set_state(Gst.State.NULL)
        for path in (self._media, self.part):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _chain(caps: str) -> str:
    return _CHAINS[re.split(r"[,;]", caps, maxsplit=1)[0]]


def _with_colours(caps: str) -> str:
    """GStreamer 1.22's mp4mux reads two fields of VP9's format, and crashes where they are not given."""
    if caps.startswith("video/x-vp9"):
        for field, usual in (("chroma-site", "mpeg2"), ("colorimetry", "bt709")):
            caps += "" if f"{field}=" in caps else f", {field}=(string){usual}"
    return caps
