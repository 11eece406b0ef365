"""Scores of the data sets beside QVHighlights, by hand and by their definitions."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from trainer.benchmark_metrics import (
    RECALL_IOUS,
    Guesses,
    Labels,
    Moments,
    Saliency,
    highlights,
    ranked_precision,
    recall,
    tvsum_precision,
    youtube_precision,
)
from trainer.metrics import Prediction, Truth, evaluate


def pair(true: Sequence[Sequence[float]], guessed: Sequence[Sequence[float]]) -> tuple[Moments, Guesses]:
    windows = np.array(true, dtype=float).reshape(-1, 2)
    return Moments(1, 100.0, windows), Guesses(1, np.array(guessed, dtype=float).reshape(-1, 3))


def video(
    labels: Sequence[Sequence[float]], scores: Sequence[float], domain: str = "a", qid: str = "v"
) -> tuple[Labels, Saliency]:
    return Labels(qid, domain, np.array(labels, dtype=float)), Saliency(qid, np.array(scores, dtype=float))


# Recall


def test_recall_by_hand() -> None:
    six = [[50, 60, 0.9], [51, 60, 0.8], [52, 60, 0.7], [53, 60, 0.6], [54, 60, 0.5]]
    scores = recall(
        [
            pair([[0, 10]], [[0, 3, 0.2], [0, 5, 0.9], [2, 9, 0.5]]),  # overlaps 0.3, 0.5, 0.7: the best-scored is 0.5
            pair([[10, 20]], [*six, [10, 20, 0.4]]),  # only the sixth is right
            pair([[0, 10]], []),
            pair([[0, 10], [40, 50]], [[40, 50, 0.1]]),
        ],
        RECALL_IOUS["charades"],
    )
    assert scores == {
        "brief": {
            "MR-full-R1@0.3": 50.0,
            "MR-full-R1@0.5": 50.0,
            "MR-full-R1@0.7": 25.0,
            "MR-full-R5@0.3": 50.0,
            "MR-full-R5@0.5": 50.0,
            "MR-full-R5@0.7": 50.0,
            "MR-full-mIoU": 37.5,  # (0.5 + 0 + 0 + 1) / 4
        }
    }


def test_each_data_set_has_its_thresholds() -> None:
    perfect = [pair([[3, 5.5]], [[3, 5.5, 0.1]])]
    for kind, ious in {"charades": "0.3 0.5 0.7", "tacos": "0.1 0.3 0.5 0.7", "nlq": "0.01 0.3 0.5 0.7"}.items():
        names = {f"MR-full-R{rank}@{at}" for rank in (1, 5) for at in ious.split()} | {"MR-full-mIoU"}
        assert recall(perfect, RECALL_IOUS[kind])["brief"] == dict.fromkeys(names, 100.0)


def test_guesses_are_ranked_by_score_and_equal_ones_as_listed() -> None:
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 90, size=(40, 8, 1))
    scores = rng.permuted(np.tile(np.arange(8.0), (40, 1)), axis=1)[..., None]
    windows = np.concatenate([starts, starts + rng.uniform(1, 30, size=starts.shape), scores], axis=2)
    true = [[[20.0, 40.0]]] * 40
    listed = recall([pair(t, w.tolist()) for t, w in zip(true, windows, strict=True)], (0.1, 0.3))
    mixed = recall([pair(t, rng.permutation(w).tolist()) for t, w in zip(true, windows, strict=True)], (0.1, 0.3))
    assert listed == mixed and 0 < listed["brief"]["MR-full-R1@0.1"] < listed["brief"]["MR-full-R5@0.1"]
    tied = recall([pair([[0, 10]], [[0, 10, 0.5], [50, 60, 0.5]])], (0.5,))
    assert tied["brief"]["MR-full-R1@0.5"] == 100.0


def test_an_overlap_of_exactly_the_threshold_counts() -> None:
    """Half of 1.6 s is 0.5 by the hull, but a bit less by lengths added up: the public code takes the hull."""
    assert 0.8 / ((1.6 - 0.0) + (0.9 - 0.1) - 0.8) < 0.5
    assert recall([pair([[0.0, 1.6]], [[0.1, 0.9, 1.0]])], (0.5,))["brief"]["MR-full-R1@0.5"] == 100.0
    truth = Truth(1, "a dog", "v", 150.0, np.array([[0.0, 1.6]]), np.zeros((75, 3)))
    official = evaluate([truth], [Prediction(1, np.array([[0.1, 0.9, 1.0]]), np.zeros(75))])
    assert official["full"]["MR-R1"]["0.5"] == 100.0  # by the hull
    assert official["full"]["MR-mAP"]["0.5"] == 0.0  # by lengths


def test_an_empty_true_window_is_never_met() -> None:
    brief = recall([pair([[5, 5]], [[5, 5, 1.0], [0, 10, 0.5]])], (0.01,))["brief"]
    assert set(brief.values()) == {0.0}


# Precision of a ranking


def test_ranked_precision_by_hand() -> None:
    # Precision 1, 1/2, 2/3, 1/2: the hits add (1 + 1) / 2 and (1/2 + 2/3) / 2, each for half of the recall.
    assert ranked_precision(np.array([True, False, True, False])) == pytest.approx((1 + 7 / 12) / 2)
    assert ranked_precision(np.array([False, True])) == pytest.approx((0 + 1 / 2) / 2)
    assert ranked_precision(np.array([True, True, False])) == 1.0
    assert ranked_precision(np.array([False, False])) == 0.0


def test_ranked_precision_is_the_area_under_its_trapezoids() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        hits = rng.random(12) < 0.4
        points = [(0.0, 1.0), *((hits[:n].sum() / max(1, hits.sum()), hits[:n].mean()) for n in range(1, 13))]
        area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
        assert ranked_precision(hits) == pytest.approx(area if hits.any() else 0.0)


# TVSum


def test_tvsum_by_hand() -> None:
    """To 15 annotators clips 0, 1, 2 lie above the median of 2.5; 5 hold all alike, and like none.

    Ranked 0, 3, 1, 4, 5 and then 2, which the five best do not hold: hit, miss, hit, miss, miss.
    """
    rows = [[score] * 15 + [3] * 5 for score in (5, 4, 3, 2, 1, 1)]
    precision = tvsum_precision(np.array(rows, dtype=float), np.array([0.9, 0.5, 0.1, 0.8, 0.4, 0.3]))
    assert precision == pytest.approx(15 / 20 * (1 + 7 / 12) / 2)


def test_tvsum_likes_what_lies_above_the_lower_median() -> None:
    """Of an even number of clips UMT takes the lower middle: more than that and more than the mean are the same."""
    assert tvsum_precision(np.array([[1.0], [2.0]]), np.array([0.1, 0.9])) == 1.0
    assert tvsum_precision(np.array([[1.0], [2.0], [2.0]]), np.array([0.1, 0.9, 0.8])) == 0.0
    rng = np.random.default_rng(2)
    for _ in range(50):
        labels, scores = rng.integers(1, 6, size=(8, 20)).astype(float), rng.permutation(8.0 * np.arange(8))
        lower = np.sort(labels, axis=0)[3]
        first = np.argsort(-scores)[:5]
        expected = np.mean([ranked_precision(column) for column in (labels > lower)[first].T])
        assert tvsum_precision(labels, scores) == pytest.approx(expected)


def test_only_five_clips_of_tvsum_count() -> None:
    labels = np.array([[5.0]] * 6 + [[1.0]] * 8)
    best = np.arange(14, 0, -1.0)
    assert tvsum_precision(labels, best) == 1.0
    best[5] = -1  # the sixth highlight, ranked last
    assert tvsum_precision(labels, best) == 1.0
    best[4] = -2
    assert (
        tvsum_precision(labels, best) == 1.0
    )  # four hits, a miss: highlights that are not among the five are not asked for
    best[0] = 7.5  # behind clip 6: hit, hit, hit, miss, hit
    assert tvsum_precision(labels, best) == pytest.approx((3 + (3 / 4 + 4 / 5) / 2) / 4)


# YouTube Highlights, and both over domains


def test_youtube_by_hand() -> None:
    # Ranked clip 3, 0, 2, 1: hit, miss, hit, miss. A label of -1 (no match) or 0 (unsure) is no highlight.
    precision = youtube_precision(np.array([[0.0], [-1.0], [1.0], [1.0]]), np.array([0.8, 0.1, 0.5, 0.9]))
    assert precision == pytest.approx((1 + 7 / 12) / 2)


def test_domains_weigh_alike_however_many_videos_they_have() -> None:
    scores = highlights(
        [
            video([[1], [0]], [2, 1], "dog", "x"),  # 1
            video([[0], [1]], [2, 1], "dog", "y"),  # (0 + 1/2) / 2
            video([[0], [0]], [2, 1], "surfing", "z"),  # nothing to find: 0, as published
        ],
        youtube_precision,
    )
    assert scores == {
        "brief": {"mAP": 31.25},  # (62.5 + 0) / 2
        "domains": {"dog": 62.5, "surfing": 0.0},
        "videos": {"x": 100.0, "y": 25.0, "z": 0.0},
    }


def test_perfect_scores_are_100_and_only_their_order_counts() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random((30, 1)) < 0.3).astype(float)
    assert highlights([video(labels.tolist(), labels[:, 0].tolist())], youtube_precision)["brief"]["mAP"] == 100.0
    scores = rng.permutation(30).astype(float)
    once = highlights([video(labels.tolist(), scores.tolist())], youtube_precision)
    assert once == highlights([video(labels.tolist(), np.exp(scores - 40).tolist())], youtube_precision)
    liked = rng.integers(1, 3, size=(30, 20)).astype(float)
    liked[:5] = 5
    assert (
        highlights([video(liked.tolist(), np.arange(30, 0, -1.0).tolist())], tvsum_precision)["brief"]["mAP"] == 100.0
    )


def test_a_prediction_is_cut_to_the_clips_and_unreached_clips_rank_last() -> None:
    labels = [[0], [0], [1]]
    assert highlights([video(labels, [1, 2, 3, 9])], youtube_precision)["brief"]["mAP"] == 100.0
    # Ranked 1, 0, 2: precision 0, 0, 1/3.
    assert highlights([video(labels, [-2, -1])], youtube_precision)["brief"]["mAP"] == pytest.approx(100 / 6, abs=0.005)
    assert highlights([video(labels, [])], youtube_precision)["brief"]["mAP"] == pytest.approx(100 / 6, abs=0.005)
    assert not math.isnan(highlights([video(labels, [])], tvsum_precision)["brief"]["mAP"])
