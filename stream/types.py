"""What flows through the live path, in order: Frame -> Window -> Features -> Saliency -> Moment -> Event.

All times are integer nanoseconds on the stream's own clock, which starts near 0 with the first frame and never
runs backwards, unless a field says otherwise. Intervals are half-open [start, end). Seconds appear at the wire only.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.head import Maps

NS = 1_000_000_000
WINDOW_NS = 2 * NS
"""Length of a window (R2-Tuning's clip length)."""

Pixels = NDArray[np.uint8]
Vector = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame that will be looked at."""

    stream: str
    index: int  # counts the frames chosen for looking at; a jump of more than 1 means frames were dropped
    pts_ns: int
    arrival_ns: int  # time.monotonic_ns() when it left the decoder
    wall_ns: int  # UTC, when it was captured
    pixels: Pixels  # (H, W, 3) RGB
    discontinuity: bool = False  # the stream was interrupted, or its clock jumped, just before this frame

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or self.pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be (H, W, 3) uint8, got {self.pixels.shape} {self.pixels.dtype}")

    def __repr__(self) -> str:
        height, width, _ = self.pixels.shape
        return f"Frame({self.stream!r}, index={self.index}, pts_ns={self.pts_ns}, {width}x{height})"


@dataclass(frozen=True, eq=False)
class Window:
    """Two seconds of a stream, [start_ns, end_ns). Windows overlap; each frame travels in the first that holds it."""

    stream: str
    index: int  # position on the hop grid: start_ns == index * hop
    start_ns: int
    end_ns: int
    frames: tuple[Frame, ...]  # only those new since the window before; may be empty in a gap
    epoch_ns: int  # UTC at stream time 0, so that wall time = epoch_ns + stream time
    captured_ns: int  # UTC capture of the frame that completed it: the newest the decision needs
    discontinuity: bool = False  # nothing before this window belongs to the same take


@dataclass(frozen=True, eq=False)
class Features:
    """What one window gives whatever the query, computed once."""

    window: Window
    pooled: Vector  # (D,) mean of the embeddings of the window's frames
    mapped: Maps | None = None  # what a trained head reads of it: tokens (K, 1+P, C) and an embedding (D,)


@dataclass(frozen=True, eq=False)
class Query:
    """A free text, encoded once."""

    id: str  # stable: made from text and threshold alone
    text: str
    pooled: Vector  # (D,) unit norm
    level: float = 0.0  # mean of its cosine with what the backbone knows: its background
    spread: float = 1.0  # standard deviation of the same
    maps: Maps | None = None  # what a trained head reads of its L tokens, by layer, and of all of it
    threshold: float | None = None  # of its own, (0, 1]; None: that of its stream


def tidy(text: str) -> str:
    """A query's text as it is shown: single spaces, and nothing that would steer somebody's terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def normalise(text: str) -> str:
    """What two texts share when they are the same query, whatever their case and spacing."""
    return tidy(text).lower()


@dataclass(frozen=True)
class Saliency:
    """How strongly one window answers one query."""

    stream: str
    query: str  # query id
    window: int
    score: float  # [0, 1], calibrated: one threshold serves all queries
    raw: float  # similarity before calibration, a cosine in zero-shot

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"score must lie in [0, 1], got {self.score}")


@dataclass(frozen=True)
class Moment:
    """A stretch of a stream that answers a query."""

    id: str
    stream: str
    query: str  # query id
    start_ns: int
    end_ns: int | None  # None while open
    peak_ns: int
    score: float  # at the peak, [0, 1]


class Kind(StrEnum):
    """The `type` of an event on the wire, without prefix and version."""

    OPENED = "moment.opened"
    UPDATED = "moment.updated"
    CLOSED = "moment.closed"
    HIGHLIGHT = "highlight"
    CLIP = "clip.ready"
    STATUS = "stream.status"


@dataclass(frozen=True)
class Clip:
    """A video file cut around a moment, whole on the disk."""

    name: str  # of its file, without .mp4
    start_ns: int  # stream time of its first picture
    end_ns: int  # and of its last
    nbytes: int
    thumbnail: bool  # a .jpg of the same name lies beside it
    missing: str | None = None  # why it shows less than was asked for, in words; None: it is complete


@dataclass(frozen=True)
class Event:
    """One thing to tell the world."""

    kind: Kind
    stream: str
    seq: int  # 1, 2, 3 ... per (stream, query); status events of a stream count on their own
    epoch_ns: int  # UTC at stream time 0; 0 as long as no window has told
    emitted_ns: int  # UTC
    query: Query | None = None  # None for STATUS
    moment: Moment | None = None  # None for STATUS
    threshold: float | None = None  # the one the moment was judged by
    latency_ns: int | None = (
        None  # capture of the newest frame the decision needed (recordings: its reading) -> emitted
    )
    status: dict[str, Any] | None = None  # STATUS only: {"state": "connected" | "reconnecting" | "ended", ...}
    backfill: bool = False  # the moment was over before the query was asked
    clip: Clip | None = None  # CLIP only
