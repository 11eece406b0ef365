"""Scores of published events, by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from trainer.streaming_metrics import Closed, Opened, QueryRun, streaming_scores


def run(
    windows: Sequence[tuple[float, float]],
    opened: Sequence[tuple[float, float]] = (),
    closed: Sequence[tuple[float, float, float]] = (),
) -> QueryRun:
    """On 100 s: opened (publish, start), closed (publish, start, end)."""
    return QueryRun(
        np.array(windows, dtype=float).reshape(-1, 2),
        100.0,
        [Opened(*event) for event in opened],
        [Closed(*event, score=0.5) for event in closed],
    )


def test_one_moment_found() -> None:
    scores = streaming_scores([run([(20, 30)], [(22, 21)], [(33, 21, 31)])])
    assert scores.sr == {1: 1, 2: 1, 3: 1} and scores.smd_s == {1: 1, 2: 1, 3: 1}
    assert (scores.sd_s, scores.ed_s, scores.recall) == (2, 3, 1)
    assert (scores.false_alarms_per_hour, scores.opened, scores.true) == (0, 1, 1)


def test_only_the_first_k_opened_events_count_in_order_of_publication() -> None:
    late = [(62, 60), (12, 10), (42, 38)]
    scores = streaming_scores([run([(40, 50), (80, 90)], late, [(15, 10, 14), (52, 38, 51), (65, 60, 64)])])
    assert scores.sr == {1: 0, 2: 1, 3: 1}
    assert scores.smd_s == {1: 30, 2: 2, 3: 2}
    assert (scores.sd_s, scores.ed_s, scores.recall) == (2, 2, 0.5)
    assert scores.false_alarms_per_hour == pytest.approx(2 * 36)


def test_the_tolerance_is_inclusive_and_may_be_chosen() -> None:
    runs = [run([(20, 30)], [(26, 25)])]
    assert streaming_scores(runs).sr[1] == 1
    assert streaming_scores(runs, tolerance_s=4.9).sr[1] == 0


def test_silence_has_no_recall_no_delay_and_the_longest_distance() -> None:
    scores = streaming_scores([run([(20, 30)]), run([(40, 60)], [(40, 40)])])
    assert scores.smd_s[1] == 50 and scores.sr[1] == 0.5 and scores.recall == 0.5
    assert scores.sd_s == 0 and scores.ed_s is None


def test_a_query_that_never_comes_true_counts_in_false_alarms_only() -> None:
    found = run([(20, 30)], [(20, 20)], [(30, 20, 30)])
    scores = streaming_scores([found, run([], [(10, 9), (50, 50)])])
    assert scores.sr[1] == scores.recall == 1 and scores.smd_s[1] == 0
    assert scores.false_alarms_per_hour == pytest.approx(2 * 3600 / 200)
    with pytest.raises(ValueError, match="no true window"):
        streaming_scores([run([])])


def test_a_moment_that_swallows_two_true_windows_finds_one() -> None:
    scores = streaming_scores([run([(20, 30), (35, 45)], [(21, 20)], [(47, 20, 46)])])
    assert scores.recall == 0.5 and scores.sd_s == 1 and scores.ed_s == 17
    assert scores.false_alarms_per_hour == 0


def test_a_moment_long_open_before_finds_nothing_and_is_no_false_alarm_either() -> None:
    scores = streaming_scores([run([(40, 50)], [(10, 10)], [(60, 10, 60)])])
    assert scores.recall == 0 and scores.sd_s is None and scores.false_alarms_per_hour == 0


def test_a_moment_opened_a_little_early_is_a_find() -> None:
    scores = streaming_scores([run([(40, 50)], [(39, 38)])])
    assert scores.recall == 1 and scores.sd_s == -1


def test_an_event_after_the_end_has_a_delay_and_no_recall() -> None:
    scores = streaming_scores([run([(40, 50)], [(51, 45)], [(52, 45, 49)])])
    assert (scores.recall, scores.sd_s, scores.ed_s, scores.false_alarms_per_hour) == (0, 11, 2, 0)


def test_touching_is_not_overlapping() -> None:
    scores = streaming_scores([run([(40, 50)], [(52, 50)], [(60, 50, 55)])])
    assert scores.sd_s is None and scores.false_alarms_per_hour == 36


def test_a_moment_without_close_lasts_until_the_next_opens() -> None:
    scores = streaming_scores([run([(40, 50)], [(10, 10), (30, 30)], [(35, 30, 35)])])
    assert scores.false_alarms_per_hour == 72
    scores = streaming_scores([run([(40, 50)], [(10, 10), (60, 60)], [(65, 60, 65)])])
    assert scores.false_alarms_per_hour == 36


def test_a_close_that_falls_together_with_the_next_opening_closes_one_moment() -> None:
    both = run([(10, 20), (20, 30)], [(12, 10), (22, 20)], [(22, 10, 20)])
    assert streaming_scores([both]).ed_s == 2
    assert streaming_scores([replace(both, closed=(*both.closed, Closed(101, 20, 30, 0.5)))]).ed_s == (2 + 71) / 2


def test_a_malformed_run_is_refused() -> None:
    with pytest.raises(ValueError, match="windows must be"):
        QueryRun(np.zeros(2), 1.0)
    with pytest.raises(ValueError, match="duration_s"):
        QueryRun(np.zeros((0, 2)), 0.0)
