"""Segments -- clips, moving photos, idle stretches -- rendered one after the other into one video file.

Pixels travel as (h, w, 3) uint8 RGB; sizes are (width, height) and times are counted in frames of the output.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image

from kernels.errors import InputError

SIZE = (640, 360)
FPS = 12

ZOOM = 1.12  # a photo's narrowest view shows 1 / ZOOM of its width
CROP_LIMIT = 0.2  # a photo fills the frame where that hides at most this share of it, otherwise bars frame it

Rgb = NDArray[np.uint8]


class Kind(StrEnum):
    CLIP = "clip"
    PHOTO = "photo"
    GREY = "grey"
    NOISE = "noise"  # a covered lens
    ROOM = "room"  # wall and floor with a sensor's noise: an empty scene


IDLE = (Kind.GREY, Kind.NOISE, Kind.ROOM)


@dataclass(frozen=True)
class Segment:
    """One stretch of a video. A clip plays from its beginning at its own speed, then over again."""

    kind: Kind
    frames: int
    path: Path | None = None  # CLIP and PHOTO
    seed: int = 0  # the way a photo moves, the level and the noise of an idle stretch

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"a segment lasts at least one frame, got {self.frames}")
        if (self.path is None) != (self.kind in IDLE):
            raise ValueError(f"clips and photos have a path, idle stretches have none: {self.kind} {self.path}")


def render(
    segments: Sequence[Segment],
    path: Path,
    size: tuple[int, int] = SIZE,
    fps: int = FPS,
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Write the segments, one after the other, as one h264 mp4 of `size` (both even) and a constant rate.

    Frame n has the time n / fps seconds. `advance` is called once a frame. The file appears when complete.

    Raises:
        InputError: a clip or a photo cannot be read.
    """
    part = path.with_suffix(".part.mp4")
    try:
        with av.open(str(part), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "bf": "0"})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.gop_size = 2 * fps  # a server that loops the file starts at a key frame
            for pixels in itertools.chain.from_iterable(_pictures(s, size, fps) for s in segments):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                advance()
            container.mux(stream.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _pictures(segment: Segment, size: tuple[int, int], fps: int) -> Iterator[Rgb]:
    try:
        if segment.kind is Kind.CLIP:
            yield from itertools.islice(_clip(segment, size, fps), segment.frames)
        elif segment.kind is Kind.PHOTO:
            yield from _photo(segment, size)
        else:
            yield from _idle(segment, size)
    except (OSError, av.FFmpegError) as error:
        raise InputError(f"{segment.path}: cannot be read: {error}") from None


def _clip(segment: Segment, size: tuple[int, int], fps: int) -> Iterator[Rgb]:
    """The clip over and over; each output frame is the newest that is due by its time."""
    while True:
        with av.open(str(segment.path)) as container:
            if not container.streams.video:
                raise InputError(f"{segment.path}: no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            last_s = 1 / float(stream.guessed_rate or fps)  # nothing follows the last frame to say how long it lasts
            first_s, shown = None, 0
            for frame, following in pairwise(itertools.chain(container.decode(stream), [None])):
                assert frame is not None
                first_s = frame.time if first_s is None else first_s
                end_s = frame.time + last_s if following is None else following.time
                due = math.ceil((end_s - first_s) * fps - 1e-6)  # output frames that start before this one ends
                if shown < due:
                    yield from itertools.repeat(_fit(frame, size), due - shown)
                    shown = due
            if not shown:
                raise InputError(f"{segment.path}: no frames in it")


def _fit(frame: av.VideoFrame, size: tuple[int, int]) -> Rgb:
    width, height = _inside((frame.width, frame.height), size)
    # Bicubic takes every n-th pixel when it shrinks, which makes fine patterns shimmer.
    how = Interpolation.AREA if width < frame.width else Interpolation.BICUBIC
    scaled = frame.reformat(width, height, "rgb24", interpolation=how)
    return _framed(scaled.to_ndarray().astype(np.uint8, copy=False), size)


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> tuple[int, int]:
    """The size of `inner`, scaled to touch the edges of `outer` from within."""
    scale = min(outer[0] / inner[0], outer[1] / inner[1])
    return max(1, round(inner[0] * scale)), max(1, round(inner[1] * scale))


def _framed(pixels: Rgb, size: tuple[int, int]) -> Rgb:
    """Black bars around (h, w, 3)."""
    height, width, _ = pixels.shape
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    canvas = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _photo(segment: Segment, size: tuple[int, int]) -> Iterator[Rgb]:
    """A slow pan and zoom. The view has real-valued edges: it glides and does not jump by pixels."""
    assert segment.path is not None
    with Image.open(segment.path) as file:
        photo = file.convert("RGB")
    # The widest view of the frame's shape inside the photo, and what filling the frame with it would hide.
    width, height = _inside(size, photo.size)
    target = size
    if 1 - width * height / (photo.width * photo.height) > CROP_LIMIT:
        target, (width, height) = _inside(photo.size, size), photo.size
    rng = random.Random(segment.seed)
    zooms = rng.choice([(1.0, ZOOM), (ZOOM, 1.0)])
    places = [(rng.random(), rng.random()) for _ in range(2)]  # of the view in what it leaves free, 0 left/top to 1
    for index in range(segment.frames):
        done = index / max(1, segment.frames - 1)
        zoom, across, down = (
            a + (b - a) * done for a, b in zip((zooms[0], *places[0]), (zooms[1], *places[1]), strict=True)
        )
        view_w, view_h = width / zoom, height / zoom
        left, top = (photo.width - view_w) * across, (photo.height - view_h) * down
        view = photo.resize(target, Image.Resampling.BICUBIC, box=(left, top, left + view_w, top + view_h))
        yield _framed(np.asarray(view), size)


def _idle(segment: Segment, size: tuple[int, int]) -> Iterator[Rgb]:
    rng = np.random.default_rng(segment.seed)
    shape = (size[1], size[0], 3)
    still = np.full(shape, rng.integers(60, 180), dtype=np.int16)
    if segment.kind is Kind.ROOM:
        wall, floor = rng.integers(150, 200) + rng.integers(-12, 13, size=3), rng.integers(60, 120, size=3)
        still[:] = np.where(np.arange(size[1])[:, None, None] < size[1] * 2 // 3, wall, floor)
        still -= np.linspace(0, 40, size[0], dtype=np.int16)[None, :, None]  # light from one side
    for _ in range(segment.frames):
        if segment.kind is Kind.NOISE:
            yield rng.integers(0, 24, size=shape, dtype=np.uint8)
        elif segment.kind is Kind.ROOM:
            yield (still + rng.integers(-3, 4, size=shape, dtype=np.int16)).astype(np.uint8)
        else:
            yield still.astype(np.uint8)
