"""Saliency -> moments: a small state machine per (stream, query). Pure: no clock, no thread, no socket.

opened      the score reached `threshold` and stayed for `min_length_s`; once a moment
updated     every `update_s` while it lasts
highlight   a peak is behind us: the score has fallen `prominence` below it
closed      the score was below the lower threshold for longer than `min_gap_s`; the end is where it fell

The lower threshold keeps a moment whose score stays near `threshold` from flickering: it lies `hysteresis` below. One
that rose well above, by twice the hysteresis, cannot flicker there, and ends at the threshold itself.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from kernels.errors import InputError
from stream.types import NS, Kind, Moment, Saliency, Window


@dataclass(frozen=True)
class MomentOptions:
    """How scores become moments. The defaults serve every query."""

    threshold: float = 0.5  # a moment opens at this score, (0, 1]
    hysteresis: float = 0.1  # and ends so far below, or less where its peak stands out: it does not flicker
    min_length_s: float = 0.0  # a shorter one is never told; opening waits for this long
    min_gap_s: float = 2.0  # a dip shorter than this does not end a moment; closing waits for this long
    update_s: float = 5.0  # between two updates of an open moment
    prominence: float = 0.1  # by how much a peak stands out of the score around it

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise InputError(f"the threshold must lie above 0 and at most at 1, got {self.threshold:g}")


@dataclass(frozen=True)
class Change:
    """Something to tell: an event without its number and its time."""

    kind: Kind
    moment: Moment


class Tracker:
    """The moments of one query on one stream."""

    def __init__(self, stream: str, query: str, hop_ns: int, options: MomentOptions) -> None:
        self.options = options
        self._stream, self._query, self._hop_ns = stream, query, hop_ns
        self.reset()

    def reset(self) -> None:
        """Forget everything, an open moment included."""
        self._seen_ns: int | None = None  # end of the last window of this take
        self._forget()

    def _forget(self) -> None:
        self._moment: Moment | None = None  # from the first score above the threshold, told or not
        self._told = False  # OPENED is out
        self._fell_ns: int | None = None  # when the score fell below the lower threshold, if it has not come back
        self._updated_ns = 0
        self._peak: Moment | None = None  # the moment as it stands at the peak being climbed; None on the way down
        self._trough = 1.0  # lowest score on the way down

    @property
    def open_moment(self) -> Moment | None:
        """The one that was told and has not ended."""
        return self._moment if self._told else None

    def push(self, saliency: Saliency, window: Window) -> list[Change]:
        """What one score changes, in the order to tell it."""
        changes: list[Change] = []
        if window.discontinuity:  # what was open ended with the take before, and at the latest where this begins
            self._seen_ns = min(self._seen_ns or 0, window.start_ns)
            changes = self.drain()
            self._seen_ns = None
        # A window averages over its frames, so its score stands for the hop in its middle; that of the first window
        # of a take stands for all that came before, too.
        centre_ns = (window.start_ns + window.end_ns) // 2
        now_ns = window.start_ns if self._seen_ns is None else centre_ns - self._hop_ns // 2
        until_ns, self._seen_ns = centre_ns + self._hop_ns // 2, window.end_ns
        score = saliency.score
        if self._moment is None:
            if score < self.options.threshold:
                return changes
            self._moment = self._begin(score, now_ns, centre_ns, window.epoch_ns)
        elif score > self._moment.score:
            self._moment = replace(self._moment, score=score, peak_ns=centre_ns)
        if self._is_over(score, now_ns, until_ns):
            return changes + self._close()
        if not self._told:
            if until_ns - self._moment.start_ns < self.options.min_length_s * NS:
                return changes
            self._told, self._updated_ns, self._peak = True, now_ns, self._moment
            changes.append(Change(Kind.OPENED, self._moment))
        changes += self._highlight(score, centre_ns)
        if now_ns - self._updated_ns >= self.options.update_s * NS:
            self._updated_ns = now_ns
            changes.append(Change(Kind.UPDATED, self._moment))
        return changes

    def drain(self) -> list[Change]:
        """The stream, or the take, has ended: an open moment closes where the score was last high."""
        return self._close() if self._moment else []

    def _begin(self, score: float, now_ns: int, peak_ns: int, epoch_ns: int) -> Moment:
        # The wall clock makes the id unique over restarts, and the same for two replays of one recording.
        seconds, rest = divmod(epoch_ns + now_ns, NS)
        at = f"{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}.{rest // 1_000_000:03d}Z"
        return Moment(f"{self._query}@{at}", self._stream, self._query, now_ns, None, peak_ns, score)

    def _is_over(self, score: float, now_ns: int, until_ns: int) -> bool:
        """True once the score has been low for longer than the gap that a moment may have."""
        assert self._moment is not None
        if score >= self._low(self._moment.score):
            self._fell_ns = None
            return False
        if self._fell_ns is None:
            self._fell_ns = now_ns
        return until_ns - self._fell_ns > self.options.min_gap_s * NS

    def _low(self, peak: float) -> float:
        """The lower threshold of a moment that rose to `peak`."""
        o = self.options
        # Never 0, which no score falls below: a moment must be able to end.
        return max(min(o.threshold, peak - 2 * o.hysteresis), o.threshold - o.hysteresis, o.threshold / 2)

    def _highlight(self, score: float, centre_ns: int) -> list[Change]:
        """Peaks of the score inside a moment: a zigzag whose legs are at least `prominence` long."""
        assert self._moment is not None
        if self._peak is None:
            self._trough = min(self._trough, score)
            if score - self._trough >= self.options.prominence:
                self._peak = replace(self._moment, score=score, peak_ns=centre_ns)
        elif score > self._peak.score:
            self._peak = replace(self._moment, score=score, peak_ns=centre_ns)
        elif self._peak.score - score >= self.options.prominence:
            peak, self._peak, self._trough = self._peak, None, score
            return [Change(Kind.HIGHLIGHT, peak)]
        return []

    def _close(self) -> list[Change]:
        """End the moment where the score fell; one that was never told vanishes without a word."""
        assert self._moment is not None
        closed = replace(self._moment, end_ns=self._seen_ns if self._fell_ns is None else self._fell_ns)
        changes = [Change(Kind.HIGHLIGHT, self._peak)] if self._told and self._peak else []
        changes += [Change(Kind.CLOSED, closed)] if self._told else []
        self._forget()
        return changes
