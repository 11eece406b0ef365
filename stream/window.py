"""Frames -> windows of 2 s that slide by the hop. Pure: no clock, no thread, no pixels touched."""

from kernels.errors import InputError
from stream.clock import slot_of
from stream.types import NS, WINDOW_NS, Frame, Window


def hop_from_seconds(seconds: float) -> int:
    """The hop in ns.

    Raises:
        InputError: a window must be a whole number of hops, so that windows fall on one grid.
    """
    if not 0.1 <= seconds <= 2.0 or abs(2.0 / seconds - round(2.0 / seconds)) > 1e-6:
        raise InputError(f"a hop of {seconds:g} s does not divide the 2 s window: use 2, 1, 0.5, 0.25 or 0.2")
    return WINDOW_NS // round(2.0 / seconds)


class Windower:
    """Windows of one stream, on the grid of the hop: window k is [k hop, k hop + 2 s).

    It takes at most one frame per hop, as the ingest samples them (`clock.slot_of`). A window is ready the moment the
    frame of its last hop arrives, which is half a hop before the window ends.
    A slot without a frame (a slow camera, a dropped frame) still gets its window as long as that window holds a frame;
    after an interruption, or a gap of a whole window, a new take begins and no window spans both.
    """

    def __init__(self, stream: str, hop_ns: int) -> None:
        self.stream = stream
        self.hop_ns = hop_ns
        self._per_window = WINDOW_NS // hop_ns
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self._take_start: int | None = None  # slot of the first frame of this take
        self._last_slot = -1
        self._fresh: list[Frame] = []  # frames that no window has carried yet
        self._interrupted = False  # the next window is the first of a new take

    def push(self, frame: Frame) -> list[Window]:
        """Windows that this frame completes, oldest first: none, one, or several after a gap.

        Raises:
            ValueError: the frame is not in a later slot than the one before.
        """
        slot = slot_of(frame.pts_ns, self.hop_ns)
        if self._take_start is not None and slot <= self._last_slot:
            raise ValueError(f"frame at {frame.pts_ns / NS:.3f} s: its slot already has one")
        windows: list[Window] = []
        # A window that starts after the last frame and ends before this one would be empty.
        empty = self._take_start is not None and slot - self._last_slot > self._per_window
        if self._take_start is None or frame.discontinuity or empty:
            windows += self.drain()  # a take too short for a window still has its say
            self._interrupted = self._take_start is not None
            self._take_start = slot
        else:
            windows += [w for s in range(self._last_slot + 1, slot) if (w := self._window(s, frame))]
        self._fresh.append(frame)
        self._last_slot = slot
        if window := self._window(slot, frame):
            windows.append(window)
        return windows

    def drain(self) -> list[Window]:
        """End of stream. A take shorter than a window gets the one window it can fill in part."""
        if not self._fresh or self._take_start is None:
            return []
        short = self._window(self._take_start + self._per_window - 1, self._fresh[-1])
        assert short is not None
        return [short]

    def _window(self, last_slot: int, newest: Frame) -> Window | None:
        """The window whose last slot this is, with the frames not yet carried; None while the take is too short."""
        assert self._take_start is not None
        index = last_slot - self._per_window + 1
        if index < self._take_start:
            return None
        frames, self._fresh = tuple(self._fresh), []
        interrupted, self._interrupted = self._interrupted, False
        start_ns = index * self.hop_ns
        return Window(
            stream=self.stream,
            index=index,
            start_ns=start_ns,
            end_ns=start_ns + WINDOW_NS,
            frames=frames,
            epoch_ns=newest.wall_ns - newest.pts_ns,
            captured_ns=newest.wall_ns,
            discontinuity=interrupted,
        )
