"""A recorded video as the windows that a live detector would see, and their features. PyAV decodes: no GStreamer."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace
from numpy.typing import NDArray

from kernels.errors import SourceError
from kernels.preprocess import crop
from models.backbone import Backbone
from stream.clock import Sampler, StreamClock, slot_of
from stream.types import NS, Frame, Window
from stream.window import Windower

UNTAGGED = 2  # of FFmpeg's AVColorSpace
SD_LINES = 576  # more are HD
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]


def watch(path: Path, hop_ns: int, *, resize: int, size: int) -> Iterator[Window]:
    """Windows of a file in order, each with the frames that are new in it, cropped (size, size, 3).

    Raises:
        SourceError: the file cannot be read or decoded to its end, has no video, or frames without timestamps.
    """
    clock, sampler, windower = StreamClock(live=False), Sampler(hop_ns), Windower(path.stem, hop_ns)
    taken, broken = 0, False
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SourceError("no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    raise SourceError("its frames have no timestamps")
                # Whole nanoseconds, as GStreamer has them to one or so: a frame exactly between two slots is rare.
                base = frame.time_base
                tick = clock.tick(frame.pts * NS * base.numerator // base.denominator, 0)
                broken |= tick.discontinuity
                if not sampler.take(tick.time_ns):
                    continue
                pixels = crop(_upright(frame), resize=resize, size=size)
                yield from windower.push(Frame(path.stem, taken, tick.time_ns, 0, 0, pixels, broken))
                taken, broken = taken + 1, False
    except (OSError, ValueError) as error:  # PyAV's own derive from these
        raise SourceError(f"{getattr(error, 'strerror', None) or error}") from None
    if not taken:
        raise SourceError("it holds no picture")
    yield from windower.drain()


def encode(
    windows: Iterable[Window], backbone: Backbone, device: torch.device, hop_ns: int, batch: int
) -> tuple[Halves, Halves, NDArray[np.bool_]]:
    """Features of windows: token by token the mean over the frames that each holds, as the live detector has them.

    Args:
        batch: frames that the image tower is given at once.
    Returns:
        layers (T, K, 1+P, width), embedding (T, D), and (T,) the windows that there were. Those that a gap in the video
        leaves out are zero.
    """
    held: deque[tuple[int, tuple[Floats, Floats]]] = deque()
    rows: list[tuple[int, Halves, Halves]] = []
    for group in _groups(windows, batch):
        frames = [frame for window in group for frame in window.frames]
        encoded = iter(_run(frames, backbone, device))
        for window in group:
            if window.discontinuity:
                held.clear()
            held.extend((slot_of(frame.pts_ns, hop_ns), next(encoded)) for frame in window.frames)
            while held[0][0] < window.index:
                held.popleft()
            layers, embedding = (
                np.mean(values, 0).astype(np.float16) for values in zip(*(f for _, f in held), strict=True)
            )
            rows.append((window.index, layers, embedding))
    count = rows[-1][0] + 1
    known = np.zeros(count, bool)
    layers = np.zeros((count, *rows[0][1].shape), np.float16)
    embedding = np.zeros((count, *rows[0][2].shape), np.float16)
    for index, *values in rows:
        known[index], layers[index], embedding[index] = True, *values
    return layers, embedding, known


def _groups(windows: Iterable[Window], batch: int) -> Iterator[list[Window]]:
    """Windows with about `batch` new frames between them."""
    group: list[Window] = []
    count = 0
    for window in windows:
        group.append(window)
        count += len(window.frames)
        if count >= batch:
            yield group
            group, count = [], 0
    if group:
        yield group


@torch.inference_mode()
def _run(frames: list[Frame], backbone: Backbone, device: torch.device) -> list[tuple[Floats, Floats]]:
    """(K, 1+P, width) and (D,) of each."""
    if not frames:
        return []
    crops = torch.from_numpy(np.stack([frame.pixels for frame in frames])).to(device)
    layers, embedding = backbone.image(crops)
    return list(zip(layers.float().cpu().numpy(), embedding.float().cpu().numpy(), strict=True))


def _upright(frame: Any) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, turned as the file says it is to be shown."""
    # Without a tag GStreamer, and so the live path, takes HD for BT.709, FFmpeg for BT.601.
    untagged_hd = frame.colorspace == UNTAGGED and frame.height > SD_LINES
    colours = Colorspace.ITU709 if untagged_hd else None
    pixels = frame.reformat(format="rgb24", src_colorspace=colours).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
