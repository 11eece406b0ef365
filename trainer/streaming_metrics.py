"""Scores of a live detector: what was published, at the time it was published. Nothing revised later counts.

SR@k and SMD@k follow Streaming Detection of Queried Event Start (Eyzaguirre et al., NeurIPS 2024), where a query has
one true start; here any of several may be met. All times are seconds of stream time.

Two links tie events to each other and to the truth:

* The moment of an opened event runs from the start it announced to the end in the first closed event published before
  the next opened one: moments of one query do not overlap. Without such a close it lasts until the next opening, or
  to the end of the stream.
* True windows, in order, are each matched with the first opened event, by publication, that no window before took,
  whose moment overlaps the window, and that was published at most TOLERANCE_S before the window begins. So a moment
  that swallows two true windows matches one, and one that had been open for long before matches none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import numpy as np

from kernels.errors import InputError
from trainer.metrics import LONGEST_S, Floats, parse_numbers, parse_qid

TOLERANCE_S = 5.0
"""How far from a true start an announced one may lie: two windows and a hop of the detector."""
RANKS = (1, 2, 3)
"""The k of SR@k and SMD@k."""


@dataclass(frozen=True)
class Opened:
    publish_s: float
    start_s: float


@dataclass(frozen=True)
class Closed:
    publish_s: float
    start_s: float
    end_s: float
    score: float


@dataclass(frozen=True, eq=False)
class Told:
    """What was published for one query."""

    qid: int | str
    opened: Sequence[Opened]
    closed: Sequence[Closed]

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Self:
        """Of one line of jsonl: "opened" [[publish_s, start_s]], "closed" [[publish_s, start_s, end_s, score]].

        Raises InputError.
        """
        opened, closed = parse_numbers(line, "opened", (-1, 2)), parse_numbers(line, "closed", (-1, 4))
        for key, times in (("opened", opened), ("closed", closed[:, :3])):
            if (np.abs(times) > LONGEST_S).any():
                raise InputError(f"{key}: a time lies beyond {LONGEST_S:g} s")
        if (backward := closed[:, 1] > closed[:, 2]).any():
            raise InputError(f"closed: a moment ends before it starts: {closed[backward][0].tolist()}")
        return cls(
            parse_qid(line), [Opened(*row) for row in opened.tolist()], [Closed(*row) for row in closed.tolist()]
        )


@dataclass(frozen=True, eq=False)
class QueryRun:
    """One query on one stream, from its beginning to its end."""

    windows: Floats  # (n, 2) true ones, disjoint; none if the query never comes true
    duration_s: float
    opened: Sequence[Opened] = ()
    closed: Sequence[Closed] = ()

    def __post_init__(self) -> None:
        if self.windows.ndim != 2 or self.windows.shape[1] != 2:
            raise ValueError(f"windows must be (n, 2), got {self.windows.shape}")
        if self.duration_s <= 0:
            raise ValueError(f"duration_s must be positive, got {self.duration_s}")


@dataclass(frozen=True)
class StreamingScores:
    sr: dict[int, float]
    """k -> share of queries with a true start within TOLERANCE_S of one of the first k announced starts."""
    smd_s: dict[int, float]
    """k -> mean over queries of the least distance of the first k announced starts to a true one. A query that
    opened nothing counts the length of its stream, so that silence does not pay."""
    sd_s: float | None
    """Mean publication of the opened event minus the true start, over matched windows; None without any."""
    ed_s: float | None
    """Mean publication of the closed event minus the true end, over matched windows whose moment closed."""
    recall: float
    """Share of true windows matched by an event that was published before they ended."""
    false_alarms_per_hour: float
    """Opened events whose moment overlaps no true window, per hour of stream and query."""
    opened: int
    true: int
    """Opened events and true windows in all."""

    def named(self) -> dict[str, float | int | None]:
        """Every score by the name it is reported under."""
        return {
            "moments_true": self.true,
            "moments_opened": self.opened,
            "recall": self.recall,
            **{f"sr_{k}": share for k, share in self.sr.items()},
            **{f"smd_{k}": distance for k, distance in self.smd_s.items()},
            "sd": self.sd_s,
            "ed": self.ed_s,
            "false_alarms_per_hour": self.false_alarms_per_hour,
        }


@dataclass(frozen=True)
class _Moment:
    opened: Opened
    closed: Closed | None
    end_s: float

    def overlaps(self, start: float, end: float) -> bool:
        return self.opened.start_s < end and start < self.end_s


def streaming_scores(runs: Sequence[QueryRun], tolerance_s: float = TOLERANCE_S) -> StreamingScores:
    """SR and SMD are means over queries that come true at all, SD, ED and recall over true windows.

    Raises:
        ValueError: nothing comes true in any of the runs.
    """
    tallies = [_tally(run, tolerance_s) for run in runs]
    distances = np.array([tally.distances for tally in tallies if tally.distances])  # (queries, RANKS)
    lengths = np.array([[run.duration_s] for run, tally in zip(runs, tallies, strict=True) if tally.distances])
    if not distances.size:
        raise ValueError("no true window in any run")
    true = sum(len(run.windows) for run in runs)
    hours = sum(run.duration_s for run in runs) / 3600
    return StreamingScores(
        sr=dict(zip(RANKS, (distances <= tolerance_s).mean(axis=0).tolist(), strict=True)),
        smd_s=dict(zip(RANKS, np.where(np.isinf(distances), lengths, distances).mean(axis=0).tolist(), strict=True)),
        sd_s=_mean([delay for tally in tallies for delay in tally.start_delays]),
        ed_s=_mean([delay for tally in tallies for delay in tally.end_delays]),
        recall=sum(tally.in_time for tally in tallies) / true,
        false_alarms_per_hour=sum(tally.false_alarms for tally in tallies) / hours,
        opened=sum(len(run.opened) for run in runs),
        true=true,
    )


@dataclass
class _Tally:
    """What one run adds to the scores."""

    distances: list[float] = field(default_factory=list)  # a rank each, inf if silent; none if it never comes true
    start_delays: list[float] = field(default_factory=list)
    end_delays: list[float] = field(default_factory=list)
    in_time: int = 0
    false_alarms: int = 0


def _tally(run: QueryRun, tolerance_s: float) -> _Tally:
    tally = _Tally()
    windows = run.windows[np.argsort(run.windows[:, 0], kind="stable")].tolist()
    moments = _moments(run)
    tally.false_alarms = sum(not any(m.overlaps(*window) for window in windows) for m in moments)
    if not windows:
        return tally
    nearest = [min(abs(m.opened.start_s - start) for start, _ in windows) for m in moments]
    tally.distances = [min(nearest[:k], default=math.inf) for k in RANKS]
    for start, end in windows:
        timely = (m for m in moments if m.overlaps(start, end) and m.opened.publish_s >= start - tolerance_s)
        match = next(timely, None)
        if match is None:
            continue
        moments.remove(match)
        tally.start_delays.append(match.opened.publish_s - start)
        tally.in_time += match.opened.publish_s < end
        if match.closed is not None:
            tally.end_delays.append(match.closed.publish_s - end)
    return tally


def _moments(run: QueryRun) -> list[_Moment]:
    """The opened events in order of publication, each with its close and its end."""
    opened = sorted(run.opened, key=lambda event: event.publish_s)
    closed = sorted(run.closed, key=lambda event: event.publish_s)
    moments = []
    for this, following in pairwise([*opened, None]):
        assert this is not None
        until = run.duration_s if following is None else following.publish_s
        # The stream's end may close the last moment a little after its last frame.
        closes = (c for c in closed if this.publish_s <= c.publish_s and (following is None or c.publish_s <= until))
        close = next(closes, None)
        if close is not None:
            closed.remove(close)  # it may fall together with the next opening, which is not what it closes
        moments.append(_Moment(this, close, until if close is None else close.end_s))
    return moments


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
