"""Video files made on the spot with PyAV, and what PyAV reads from them: the reference for ingest."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from stream.ingest import open_source
from stream.sources import parse_source
from stream.types import NS, Frame, Pixels

RATE = 30
VARIABLE = (33, 33, 50, 17, 100, 33, 40, 7, 250, 33)
"""Distances in ms of frames at a variable rate."""


@dataclass(frozen=True)
class Decoded:
    """What PyAV decodes from a file."""

    times: list[Fraction]  # seconds since the first frame, exact
    tick: Fraction  # seconds: the container's time base
    pixels: list[Pixels]  # (H, W, 3) RGB


def picture(number: int, width: int, height: int) -> Pixels:
    """A smooth picture, (height, width, 3) RGB, unlike those of other numbers: smooth, so that codecs keep it."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = 0.35 * number
    planes = [
        np.sin(x / width * 3 + phase),
        np.cos(y / height * 4 - phase),
        np.sin((x / width + y / height) * 2 + 2 * phase),
    ]
    return (np.stack(planes, axis=-1) * 100 + 128).astype(np.uint8)


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (320, 240),
    frames: int = 45,
    steps_ms: tuple[int, ...] | None = None,
    options: dict[str, str] | None = None,
    gop: int | None = None,
) -> Path:
    """A video of `frames` pictures at `RATE`, or with the distances of `steps_ms` over and over. 4:4:4 if odd-sized.

    gop: pictures from key to key at most; None: as the codec likes.
    """
    width, height = size
    fast = {
        "libx264": {"preset": "veryfast", "crf": "12"},  # decodes out of order, unlike ultrafast
        "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    }
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(
            codec, rate=RATE, options=fast.get(codec, {"crf": "12", "b": "0", "cpu-used": "8"})
        )
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = width, height
        if gop is not None:
            stream.gop_size = gop
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000) if steps_ms else Fraction(1, RATE)
        pts = 0
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = pts, stream.codec_context.time_base
            pts += steps_ms[number % len(steps_ms)] if steps_ms else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """Half a second of sound, no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.layout = "mono"
        for number in range(22):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 44100, number * 1024, Fraction(1, 44100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def truncate(path: Path, share: float) -> Path:
    """Cut the file off after `share` of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def decode(path: Path) -> Decoded:
    """Everything PyAV sees in the file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        times: list[Fraction] = []
        pixels: list[Pixels] = []
        for frame in container.decode(stream):
            assert frame.pts is not None
            times.append(frame.pts * stream.time_base)
            pixels.append(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
        return Decoded([at - times[0] for at in times], stream.time_base, pixels)


def frames_of(path: Path, hop_ns: int = NS) -> Iterator[Frame]:
    """The frames that `livemoments run` looks at."""
    source = open_source(parse_source(str(path)), hop_ns=hop_ns, pace="max")
    try:
        yield from (item for item in source if isinstance(item, Frame))
    finally:
        source.close()
