"""The encoded video of the last seconds of one stream, as it came, on the stream's own clock. Pure: no gi, no thread.

Video comes in units of one picture each, in the order in which they are decoded. What one decoder took, on one clock
and in one format, is a part: video of two parts cannot stand in one file. Units come before the pictures that are made
of them, and what a unit's clock is to the stream's is known with the first picture alone: so a part begins without.
"""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from stream.types import NS

INTERRUPTED = "the stream was interrupted"
JUMP = "the clock of the stream jumped"
FORMAT = "the format of the pictures changed"
"""Why what came before and what came after cannot stand in one file."""
_STEP_NS = NS // 2
"""Pictures that lie further apart may be those before and after a jump of the clock ..."""
_SETTLED_NS = 2 * NS
"""... which a mark has told after so long."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One picture, encoded."""

    data: bytes
    pts_ns: int  # running time of its pipeline
    key: bool  # it needs none before it
    arrival_ns: int  # time.monotonic_ns()


@dataclass(eq=False, slots=True)
class Part:
    """A stretch that may stand in one file."""

    caps: str  # the format, as GStreamer writes it
    base_ns: int | None  # stream time at which the source's own clock began; None: not known yet
    offset_ns: int | None  # the source's own clock - running time; None: not known yet
    anew: str | None = None  # why another begins here, in words; None for the first of all

    @property
    def shift_ns(self) -> int | None:
        """Stream time - running time, once that is known."""
        return None if self.base_ns is None or self.offset_ns is None else self.base_ns + self.offset_ns


@dataclass(frozen=True, slots=True)
class _Held:
    ordinal: int
    unit: Unit
    part: Part


@dataclass(frozen=True, slots=True)
class Start:
    """Where a clip begins."""

    part: Part
    ordinal: int  # of its first unit, a key
    time_ns: int  # of that, stream time
    oldest: bool  # there is no key before it in this part


@dataclass(frozen=True, slots=True)
class Run:
    """What came since somebody looked."""

    units: list[tuple[int, Unit]]  # stream time of each, in the order of decoding
    after: int  # ordinal to go on at
    lost: bool  # some had left the ring before
    over: str | None  # why no more of this part comes, in words; None: it may


class Ring:
    """Bounded by seconds and by bytes, whichever is less; the oldest go, from key to key as long as there are two.

    `source`, `begin`, `put`, `mark` are for who has the video, one thread at a time; any thread may ask.
    """

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self._most_ns, self._max_bytes = int(seconds * NS), max_bytes
        self._held: deque[_Held] = deque()
        self._keys: deque[int] = deque()  # ordinals of the keys that are held
        self._next = 0  # ordinal of the next unit
        self._part: Part | None = None  # of the newest unit
        self._base_ns: int | None = None
        self._anew: tuple[str, int | None] | None = None  # a part begins with the next key: why, and its offset
        self._lock = threading.Lock()
        self.nbytes = 0
        self.caps: str | None = None  # of the newest unit; None as long as there never was one

    # -- for who has the video

    def source(self, begin_ns: int | None) -> None:
        """Units of another source follow, whose clock is 0 at `begin_ns` of the stream's; None: `based` tells."""
        with self._lock:
            self._base_ns = begin_ns
        self.begin(INTERRUPTED)

    def based(self, begin_ns: int) -> None:
        """Stream time at which the clock of the present source began."""
        with self._lock:
            self._base_ns = begin_ns
            for part in self._parts():
                if part.base_ns is None:
                    part.base_ns = begin_ns

    def begin(self, why: str) -> None:
        """Units of another pipeline follow: nothing is known of their clock until `mark`."""
        with self._lock:
            self._anew = why, None

    def put(self, unit: Unit, caps: str, first: bool) -> None:
        """The next unit. first: of another decoder than the one before."""
        with self._lock:
            part = self._part
            if self._anew is None and (part is None or first or caps != part.caps):
                self._anew = FORMAT, part.offset_ns if part else None
            if self._anew is not None:
                if not unit.key:
                    return  # nothing can begin here
                why, offset_ns = self._anew
                self._part = Part(caps, self._base_ns, offset_ns, why if self._next else None)
                self._anew = None
            assert self._part is not None
            self.caps = caps
            self._hold(_Held(self._next, unit, self._part))
            self._next += 1

    def mark(self, running_ns: int, offset_ns: int) -> None:
        """From the unit whose picture has this running time on, the source's own clock is so far ahead of running time.

        For the first picture of a pipeline, and wherever the clock jumped.
        """
        with self._lock:
            if self._part is None or self._anew is not None:  # no unit of it was kept so far
                self._anew = self._anew[0] if self._anew else JUMP, offset_ns
                return
            index = next((i for i in range(len(self._held) - 1, -1, -1) if self._held[i].unit.pts_ns == running_ns), -1)
            if index >= 0:
                self._split(index, offset_ns)
            elif self._part.offset_ns is None:
                self._part.offset_ns = offset_ns
            else:  # whichever unit it was, from the next key on all is on the new clock
                self._anew = JUMP, offset_ns

    # -- for who wants it

    def find(self, start_ns: int, before_ns: int, slack_ns: int) -> Start | None:
        """Where a clip begins that shows `start_ns` of the stream, and `before_ns` before it if that is held.

        The first picture of a part may come up to `slack_ns` after what began with it. None: nothing of it is held.
        """
        with self._lock:
            keys = [
                (held, held.unit.pts_ns + held.part.shift_ns)
                for held in (self._at(ordinal) for ordinal in self._keys)
                if held.part.shift_ns is not None
            ]
            began = [(held, at_ns) for held, at_ns in keys if at_ns <= start_ns + slack_ns]
            if began:
                part = began[-1][0].part
            elif keys:  # what is held begins after it
                part = keys[0][0].part
            else:
                return None
            own = [(held, at_ns) for held, at_ns in keys if held.part is part]
            early = [(held, at_ns) for held, at_ns in own if at_ns <= start_ns - before_ns]
            held, at_ns = early[-1] if early else own[0]
            return Start(part, held.ordinal, at_ns, oldest=not early)

    def run(self, part: Part, after: int, now_ns: int) -> Run:
        """The units of `part` from ordinal `after` on. now_ns: time.monotonic_ns()."""
        with self._lock:
            first = self._next - len(self._held)
            begin = max(after, first)
            shift_ns = part.shift_ns
            assert shift_ns is not None
            units = list[tuple[int, Unit]]()
            over = self._anew[0] if self._anew else None
            for held in islice(self._held, max(0, begin - 1 - first), None):
                if held.ordinal < begin:  # that before, for its time
                    last_ns = held.unit.pts_ns
                    continue
                if held.part is not part:
                    over = held.part.anew or INTERRUPTED
                    break
                unit = held.unit
                is_step = held.ordinal > first and abs(unit.pts_ns - last_ns) > _STEP_NS
                if is_step and unit.arrival_ns > now_ns - _SETTLED_NS:
                    over = None
                    break
                units.append((unit.pts_ns + shift_ns, unit))
                last_ns = unit.pts_ns
            return Run(units, begin + len(units), begin > after, over)

    # -- for who has the lock

    def _hold(self, held: _Held) -> None:
        self._held.append(held)
        self.nbytes += len(held.unit.data)
        if held.unit.key:
            self._keys.append(held.ordinal)
        horizon_ns = held.unit.arrival_ns - self._most_ns
        while len(self._keys) > 1 and (
            self.nbytes > self._max_bytes or self._at(self._keys[1]).unit.arrival_ns <= horizon_ns
        ):
            self._drop_until(self._keys[1])
        # A camera that sends no keys: a clip that is being written goes on, none can begin.
        while self.nbytes > self._max_bytes and len(self._held) > 1:
            self._drop_until(self._held[0].ordinal + 1)

    def _drop_until(self, ordinal: int) -> None:
        while self._held[0].ordinal < ordinal:
            self.nbytes -= len(self._held.popleft().unit.data)
        while self._keys and self._keys[0] < ordinal:
            self._keys.popleft()

    def _at(self, ordinal: int) -> _Held:
        return self._held[ordinal - self._held[0].ordinal]

    def _parts(self) -> Iterator[Part]:
        """Those of what is held, and the newest."""
        seen = {id(held.part): held.part for held in self._held}
        if self._part:
            seen[id(self._part)] = self._part
        return iter(seen.values())

    def _split(self, index: int, offset_ns: int) -> None:
        """What is held from `index` on is on another clock; what comes next, too."""
        old = self._held[index].part
        if old.offset_ns is None:
            old.offset_ns, new = offset_ns, old
        elif index and self._held[index - 1].part is old:
            new = Part(old.caps, old.base_ns, offset_ns, JUMP)
        else:
            old.offset_ns, new = offset_ns, old
        for i in range(index, len(self._held)):
            held = self._held[i]
            if held.part is old:
                self._held[i] = _Held(held.ordinal, held.unit, new)
            elif held.part.offset_ns is None or held.part.offset_ns != offset_ns:
                held.part.offset_ns = offset_ns
        if self._part is old:
            self._part = new
        elif self._part is not None:
            self._part.offset_ns = offset_ns
