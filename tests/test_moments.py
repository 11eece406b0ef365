"""Scores to moments: one opened event a moment, and the rest of the tracker's promises."""

import numpy as np
import pytest

from kernels.errors import InputError
from stream.moments import Change, MomentOptions, Tracker
from stream.types import NS, Kind, Saliency, Window

EPOCH = 1_700_000_000 * NS


def play(scores: list[float], *, breaks: tuple[int, ...] = (), **options: float) -> list[tuple[int, Change]]:
    """Feed one score a second, of windows [0, 2), [1, 3) ...; (index of the score, len(scores) at the drain, change).

    Score i stands for [i + 0.5, i + 1.5), the hop in the middle of its window, and the first for all from 0 on.
    """
    tracker = Tracker("cam", "q", NS, MomentOptions(**options))
    told = []
    for i, score in enumerate(scores):
        window = Window("cam", i, i * NS, (i + 2) * NS, (), EPOCH, EPOCH, discontinuity=i in breaks)
        told += [(i, change) for change in tracker.push(Saliency("cam", "q", i, score, score), window)]
    return told + [(len(scores), change) for change in tracker.drain()]


def kinds(told: list[tuple[int, Change]]) -> list[tuple[int, str]]:
    return [(i, change.kind.name) for i, change in told]


def test_one_moment_from_open_to_close() -> None:
    told = play([0.1, 0.6, 0.9, 0.7, 0.1, 0.1, 0.1, 0.1])
    assert kinds(told) == [(1, "OPENED"), (3, "HIGHLIGHT"), (6, "CLOSED")]
    opened, highlight, closed = (change.moment for _, change in told)
    assert (opened.start_ns / NS, opened.end_ns, opened.score) == (1.5, None, 0.6)
    assert (highlight.peak_ns / NS, highlight.score) == (3, 0.9)
    assert closed.end_ns is not None
    assert (closed.start_ns / NS, closed.end_ns / NS, closed.peak_ns / NS, closed.score) == (1.5, 4.5, 3, 0.9)
    assert opened.id == highlight.id == closed.id


def test_a_score_that_flickers_is_one_moment() -> None:
    told = play([0.6, 0.45, 0.55, 0.3, 0.55, 0.3, 0.3, 0.55, 0.1, 0.1, 0.1])
    assert [k for _, k in kinds(told) if k in ("OPENED", "CLOSED")] == ["OPENED", "CLOSED"]
    assert told[-1][1].moment.end_ns == 8.5 * NS


def test_a_dip_longer_than_the_gap_makes_two() -> None:
    told = play([0.6, 0.1, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1], min_gap_s=2.0)
    assert [k for _, k in kinds(told)].count("OPENED") == 2
    ids = {change.moment.id for _, change in told}
    assert len(ids) == 2


def test_no_gap_closes_at_the_first_low_score() -> None:
    assert (1, "CLOSED") in kinds(play([0.6, 0.1, 0.1], min_gap_s=0.0))


def test_too_short_is_never_told_and_long_enough_starts_where_it_started() -> None:
    assert play([0.6, 0.1, 0.1, 0.1, 0.1], min_length_s=5.0) == []
    told = play([0.1, 0.6, 0.6, 0.6, 0.6], min_length_s=3.0)
    assert kinds(told)[0] == (3, "OPENED")
    assert told[0][1].moment.start_ns == 1.5 * NS


def test_updates_come_while_it_lasts() -> None:
    told = play([0.6] * 12, update_s=5.0)
    assert [i for i, k in kinds(told) if k == "UPDATED"] == [5, 10]


def test_every_peak_that_stands_out_is_a_highlight() -> None:
    told = play([0.6, 0.9, 0.6, 0.65, 0.6, 0.95, 0.6, 0.6], prominence=0.2)
    assert [(c.moment.peak_ns // NS, c.moment.score) for _, c in told if c.kind is Kind.HIGHLIGHT] == [
        (2, 0.9),
        (6, 0.95),
    ]


def test_a_moment_without_a_fall_has_its_highlight_at_the_end() -> None:
    assert kinds(play([0.6, 0.7, 0.8])) == [(0, "OPENED"), (3, "HIGHLIGHT"), (3, "CLOSED")]


def test_an_interruption_closes_what_is_open() -> None:
    told = play([0.6, 0.6, 0.6, 0.6], breaks=(2,))
    assert [k for _, k in kinds(told) if k != "HIGHLIGHT"] == ["OPENED", "CLOSED", "OPENED", "CLOSED"]
    closed = next(change.moment for _, change in told if change.kind is Kind.CLOSED)
    assert (closed.start_ns, closed.end_ns) == (0, 2 * NS)  # where the take after the break begins


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5, 1.0])
def test_a_moment_can_end_whatever_the_threshold(threshold: float) -> None:
    told = play([1.0, 1.0, *[0.0] * 10], threshold=threshold)
    assert (5, "CLOSED") in kinds(told) or (4, "CLOSED") in kinds(told)


def test_a_take_of_one_frame_ends_where_the_next_begins() -> None:
    """Its window reaches beyond the break; its moment must not."""
    tracker = Tracker("cam", "q", NS, MomentOptions())
    changes = []
    for start in (0, 1):
        window = Window("cam", start, start * NS, (start + 2) * NS, (), EPOCH, EPOCH, discontinuity=start == 1)
        changes += tracker.push(Saliency("cam", "q", start, 0.9, 0.9), window)
    closed, opened = (next(c.moment for c in changes[1:] if c.kind is kind) for kind in (Kind.CLOSED, Kind.OPENED))
    assert closed.end_ns == opened.start_ns == NS


def test_random_scores_keep_the_promises() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = [float(s) for s in rng.random(60)]
        told = play(scores, min_gap_s=float(rng.integers(0, 3)), min_length_s=float(rng.integers(0, 3)))
        open_id = None
        last_end = 0
        for _, change in told:
            moment = change.moment
            if change.kind is Kind.OPENED:
                assert open_id is None and moment.start_ns >= last_end
                open_id = moment.id
            assert moment.id == open_id
            if change.kind is Kind.CLOSED:
                assert moment.end_ns is not None and moment.start_ns < moment.end_ns
                assert moment.start_ns <= moment.peak_ns < moment.end_ns
                assert moment.score == max(scores[moment.start_ns // NS : moment.end_ns // NS])
                last_end, open_id = moment.end_ns, None
        assert open_id is None


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold must lie"):
        MomentOptions(threshold=threshold)
