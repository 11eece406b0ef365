"""Small pictures of the last minutes of one stream, as JPEG: what was looked at, and when."""

import io
import threading
from collections import deque
from dataclasses import dataclass

from PIL import Image

from stream.types import NS, Frame

WIDTH, LARGE_WIDTH, QUALITY = 320, 640, 75
MAX_BYTES = 16 << 20
"""Of one stream's pictures, however short its hop is."""


@dataclass(frozen=True, slots=True)
class Picture:
    pts_ns: int  # stream time
    wall_ns: int  # UTC
    jpeg: bytes


class Pictures:
    """Those of the last seconds, the oldest first. One thread adds, any may ask."""

    def __init__(self, seconds: float) -> None:
        self._most_ns = int(seconds * NS)
        self._kept: deque[Picture] = deque()
        self._nbytes = 0
        self._newest: Frame | None = None
        self._large: bytes | None = None  # its picture, once somebody has asked
        self._lock, self._encoding = threading.Lock(), threading.Lock()

    def add(self, frame: Frame) -> None:
        """A frame that was looked at; its pixels are kept until the next."""
        picture = Picture(frame.pts_ns, frame.wall_ns, encode(frame, WIDTH))
        with self._lock:
            self._newest, self._large = frame, None
            self._kept.append(picture)
            self._nbytes += len(picture.jpeg)
            while len(self._kept) > 1 and (
                self._nbytes > MAX_BYTES or self._kept[0].pts_ns < frame.pts_ns - self._most_ns
            ):
                self._nbytes -= len(self._kept.popleft().jpeg)

    def newest(self) -> bytes | None:
        """The newest frame, larger than the others: at most LARGE_WIDTH wide. None as long as there is none."""
        with self._encoding:  # whoever asks at the same time gets the same one
            with self._lock:
                frame, large = self._newest, self._large
            if frame is None or large is not None:
                return large
            large = encode(frame, LARGE_WIDTH)
            with self._lock:
                if frame is self._newest:
                    self._large = large
            return large

    def at(self, utc_ns: int) -> bytes | None:
        """The small picture of the frame that was looked at last at that time; None if none is kept."""
        with self._lock:
            return next((each.jpeg for each in reversed(self._kept) if each.wall_ns <= utc_ns), None)

    def nearest(self, pts_ns: int) -> Picture | None:
        """The small picture whose frame lies nearest to a stream time."""
        with self._lock:
            return min(self._kept, key=lambda each: abs(each.pts_ns - pts_ns), default=None)


def encode(frame: Frame, width: int) -> bytes:
    """A JPEG at most `width` wide."""
    image = Image.fromarray(frame.pixels)
    if image.width > width:
        height = max(1, round(image.height * width / image.width))
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
