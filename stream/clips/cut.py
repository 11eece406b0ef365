"""One clip in the making: from its moment's beginning to a whole file. For one thread."""

from collections.abc import Callable

from stream.clips.mp4 import Mp4, Mp4Error
from stream.clips.pictures import Picture, Pictures
from stream.clips.ring import Ring, Start, Unit
from stream.clips.shelf import Shelf
from stream.config.schema import ClipsConfig
from stream.types import NS, WINDOW_NS, Clip, Event, Moment

_REORDER_NS = NS // 2
"""Where pictures are not shown in the order in which they come, one that is late is late by less."""
TOO_SLOW = "the disk was too slow"
NO_ROOM = "there is no more room for clips on the disk"


class Cut:
    """It grows as units come, so that its length costs no memory.

    Raises, in every method: Mp4Error, OSError: it cannot be written; see `abort`.
    """

    def __init__(
        self, event: Event, ring: Ring, pictures: Pictures, start: Start, shelf: Shelf, config: ClipsConfig
    ) -> None:
        """event: any of the moment's. start: of the ring."""
        assert event.moment is not None
        self.nbytes = 0  # of the units it has
        self.closed: Event | None = None
        self._moment: Moment = event.moment
        self._ring, self._pictures, self._shelf, self._config = ring, pictures, shelf, config
        self._start, self._after, self._last_ns = start, start.ordinal, start.time_ns
        self._reordered = False
        self._gone: str | None = None  # why no more units come, in words
        self._ended = False  # the file gets no more
        self._short: list[str] = []
        self._picture: Picture | None = None
        self.clip: Clip | None = None  # once it is whole
        self._name = shelf.name(event.stream, self._moment.query, event.epoch_ns + self._moment.start_ns)
        self._mp4 = Mp4(shelf.video(self._name), start.part.caps)
        self._look_at_peak()
        early_ns = self._moment.start_ns - start.time_ns
        if early_ns < 0:
            self._short.append(f"its first {-early_ns / NS:.1f} s are not held any more")
        elif early_ns < config.before_s * NS:
            self._short.append(f"only {early_ns / NS:.1f} s before it are held")

    def hear(self, event: Event, *, closed: bool) -> None:
        """What else is told of its moment."""
        assert event.moment is not None
        self._moment = event.moment
        self._look_at_peak()
        if closed:
            self.closed = event

    def leave(self, why: str) -> None:
        """No more units come."""
        self._gone = self._gone or why

    def step(self, now_ns: int, has_room: Callable[[int], bool]) -> bool:
        """Take what came; whether the clip is whole. now_ns: time.monotonic_ns(); has_room: for so many bytes more."""
        if not self._ended and not self._mp4.is_behind:
            self._feed(now_ns, has_room)
        return self.clip is not None or (self._mp4.check() and self._finish())

    def abort(self) -> None:
        """Leave nothing behind of what is not whole."""
        if self.clip is None:
            self._mp4.abort()

    @property
    def _stop_ns(self) -> int | None:
        """Up to where it is to go, once that is known."""
        end_ns = self._moment.end_ns
        return None if self.closed is None or end_ns is None else end_ns + int(self._config.after_s * NS)

    def _feed(self, now_ns: int, has_room: Callable[[int], bool]) -> None:
        if self._end_if_due():
            return
        run = self._ring.run(self._start.part, self._after, now_ns)
        if run.lost:
            self._end(TOO_SLOW)
            return
        if not has_room(sum(len(unit.data) for _, unit in run.units)):
            self._end(NO_ROOM)
            return
        self._after = run.after
        for time_ns, unit in run.units:
            if self._push(unit, time_ns):
                return
        if why := run.over or self._gone:
            self._end(why)

    def _push(self, unit: Unit, time_ns: int) -> bool:
        """Whether the file gets no more."""
        if time_ns < self._start.time_ns:
            return False  # shown before the first key, and made of what lies before that
        if time_ns - self._start.time_ns > self._config.longest_s * NS:
            self._end(f"it is cut off at {self._config.longest_s:g} s")
            return True
        self._mp4.push(unit, time_ns - self._start.time_ns)
        self.nbytes += len(unit.data)
        self._reordered |= time_ns < self._last_ns
        self._last_ns = max(self._last_ns, time_ns)
        return self._end_if_due()

    def _end_if_due(self) -> bool:
        """Whether it has all that it is to have, or had to end before."""
        stop_ns = self._stop_ns
        if stop_ns is not None and self._last_ns >= stop_ns + _REORDER_NS * self._reordered:
            self._end(None)
        return self._ended

    def _end(self, why: str | None) -> None:
        """why: no more comes, in words; None: it has all that it is to have."""
        self._ended = True
        if not self.nbytes:
            raise Mp4Error(why or "nothing of the moment is held")
        if why is not None and (self._stop_ns is None or self._last_ns < self._stop_ns):
            self._short.append(why)
        self._mp4.end()

    def _finish(self) -> bool:
        self._look_at_peak()
        thumbnail = self._picture.jpeg if self._picture else None
        nbytes, has_thumbnail = self._shelf.add(self._name, thumbnail)
        missing = "; ".join(self._short) or None
        self.clip = Clip(self._name, self._start.time_ns, self._last_ns, nbytes, has_thumbnail, missing)
        return True

    def _look_at_peak(self) -> None:
        """Now, since its picture may have gone by the end."""
        peak_ns = self._moment.peak_ns
        found = self._pictures.nearest(peak_ns)
        if found and (
            self._picture is None or abs(found.pts_ns - peak_ns) <= min(WINDOW_NS, abs(self._picture.pts_ns - peak_ns))
        ):
            self._picture = found
