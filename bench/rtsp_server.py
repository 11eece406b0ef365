"""A camera on loopback: `python -m bench.rtsp_server --port P`, at rtsp://127.0.0.1:P/cam.

A process of its own, so that a test can kill it as a network would. Prints one line once it listens. All clients see
the same live pictures: a test pattern, or the H.264 video of a file, once or for ever.
"""

import argparse
import signal
import tempfile
from pathlib import Path
from typing import Any

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402 - the versions come first

PAY = "rtph264pay name=pay0 pt=96 config-interval=-1"


def pattern(name: str, size: str) -> str:
    """Launch line of a test pattern, 30 frames a second."""
    width, height = (int(side) for side in size.split("x"))
    return (
        f"( videotestsrc is-live=true pattern={name} ! video/x-raw,width={width},height={height},framerate=30/1 "
        f"! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! {PAY} )"
    )


def file_once(path: Path) -> str:
    """Launch line of a file from its first frame to its last."""
    return f'( filesrc location="{path.resolve()}" ! qtdemux ! h264parse ! {PAY} )'


def file_for_ever(path: Path, folder: Path) -> str:
    """Launch line of a file that begins again at its end, while the clock of the stream goes on.

    The bare H.264 stream is repeated: it carries no times, so the parser counts frames and never jumps back. This
    asks for a constant rate and no B-frames, as `trainer.render` writes them.
    """
    bare = folder / "loop.h264"
    pipeline = Gst.parse_launch(
        f'filesrc location="{path.resolve()}" ! qtdemux ! h264parse config-interval=-1 '
        f'! video/x-h264,stream-format=byte-stream,alignment=au ! filesink location="{bare}"'
    )
    pipeline.set_state(Gst.State.PLAYING)
    kinds = Gst.MessageType.EOS | Gst.MessageType.ERROR
    message = pipeline.get_bus().timed_pop_filtered(Gst.CLOCK_TIME_NONE, kinds)
    pipeline.set_state(Gst.State.NULL)
    if message.type == Gst.MessageType.ERROR:
        raise SystemExit(f"{path} cannot be served: {message.parse_error()[0].message}")
    return f'( multifilesrc location="{bare}" loop=true ! h264parse name=counted ! {PAY} )'


def stamp(_factory: object, media: Any) -> None:
    """Pictures whose order alone is known get the time that the parser has counted: without B-frames it is theirs."""

    def see(_pad: object, info: Any) -> Any:
        buffer = info.get_buffer()
        buffer.pts = buffer.dts
        return Gst.PadProbeReturn.OK

    if parser := media.get_element().get_by_name("counted"):
        parser.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, see)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rtsp_server", description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one, which the line printed names")
    parser.add_argument("--size", default="320x240", metavar="WxH", help="of the pattern")
    parser.add_argument("--pattern", default="ball", help="of videotestsrc")
    parser.add_argument("--file", type=Path, help="an .mp4 with H.264 instead of the pattern")
    parser.add_argument("--loop", action="store_true", help="the file for ever, instead of once")
    args = parser.parse_args()
    Gst.init(None)
    with tempfile.TemporaryDirectory() as folder:
        if args.file is None:
            launch = pattern(args.pattern, args.size)
        else:
            launch = file_for_ever(args.file, Path(folder)) if args.loop else file_once(args.file)
        server = GstRtspServer.RTSPServer()
        server.set_address("127.0.0.1")
        server.set_service(str(args.port))
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_launch(launch)
        factory.set_shared(True)
        factory.connect("media-configure", stamp)
        server.get_mount_points().add_factory("/cam", factory)
        if server.attach(None) == 0:
            raise SystemExit(f"port {args.port} cannot be listened on")
        print(f"rtsp://127.0.0.1:{server.get_bound_port()}/cam", flush=True)
        loop = GLib.MainLoop()
        for ending in (signal.SIGTERM, signal.SIGINT):  # the folder must not stay behind
            GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, ending, loop.quit)
        loop.run()


if __name__ == "__main__":
    main()
