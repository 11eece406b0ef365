"""Offline scores against the official ones, against slow references, and by hand."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.errors import InputError
from trainer.metrics import (
    IOU_THRESHOLDS,
    Floats,
    Prediction,
    Truth,
    average_precision,
    evaluate,
    frame_f1,
    inside,
    read_jsonl,
    temporal_iou,
)


def truth(windows: list[list[float]], saliency: list[list[int]] | None = None, qid: int = 1) -> Truth:
    votes = np.zeros((75, 3)) if saliency is None else np.array(saliency, dtype=float)
    return Truth(qid, "a dog", "v", 150.0, np.array(windows, dtype=float).reshape(-1, 2), votes)


def guess(windows: list[list[float]], saliency: list[float] | None = None, qid: int = 1) -> Prediction:
    return Prediction(qid, np.array(windows, dtype=float).reshape(-1, 3), np.array(saliency or [0.0]))


@pytest.mark.shared
def test_every_official_number_is_met_to_both_decimals(shared_data: Path) -> None:
    folder = shared_data / "qvhighlights"
    truths = read_jsonl(folder / "highlight_val_release.jsonl", Truth)
    predictions = read_jsonl(folder / "moment_detr_val_preds.jsonl", Prediction)
    assert evaluate(truths, predictions) == json.loads((folder / "moment_detr_val_metrics.json").read_text())


# Moment retrieval


def test_moment_retrieval_by_hand() -> None:
    """Three true windows; ranked guesses hit, miss, hit: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    scores = evaluate(
        [truth([[0, 20], [50, 70], [100, 140]])],
        [guess([[0, 20, 0.9], [30, 40, 0.8], [50, 62, 0.7]])],  # the last overlaps by 0.6
    )
    table = scores["full"]["MR-mAP"]
    assert table["0.5"] == table["0.6"] == pytest.approx(100 * (1 / 3 + 2 / 9), abs=0.005)
    assert table["0.65"] == table["0.95"] == pytest.approx(100 / 3, abs=0.005)
    assert scores["full"]["MR-R1"] == dict.fromkeys(map(str, IOU_THRESHOLDS), 100.0)
    assert scores["brief"]["MR-full-mAP"] == table["average"] == pytest.approx(100 * (1 / 3 + 0.3 * 2 / 9), abs=0.005)
    assert scores["middle"]["MR-mAP"]["0.5"] == pytest.approx(100 * (1 / 2 + 2 / 6), abs=0.005)
    assert scores["long"]["MR-mAP"]["0.5"] == scores["long"]["MR-R1"]["0.5"] == 0.0
    assert math.isnan(scores["short"]["MR-R1"]["0.5"]) and math.isnan(scores["brief"]["MR-short-mAP"])


def test_a_true_window_is_found_once() -> None:
    scores = evaluate([truth([[0, 20], [50, 60]])], [guess([[0, 20, 0.9], [0, 20, 0.8], [0, 19, 0.7]])])
    assert scores["full"]["MR-mAP"]["0.5"] == 50.0


def test_only_ten_windows_count_and_the_first_listed_is_the_first_guess() -> None:
    late = [[float(140 - i), 141.0, 1.0] for i in range(10)]
    scores = evaluate([truth([[0, 20]])], [guess([*late, [0, 20, 2.0]])])
    assert scores["full"]["MR-mAP"]["0.5"] == scores["full"]["MR-R1"]["0.5"] == 0.0
    scores = evaluate([truth([[0, 20]])], [guess([*late[:9], [0, 20, 2.0]])])
    assert scores["full"]["MR-mAP"]["0.5"] == 100.0 and scores["full"]["MR-R1"]["0.5"] == 0.0


def test_a_query_without_guesses_scores_0_and_one_without_truth_is_left_out() -> None:
    truths = [truth([[0, 20]]), truth([[0, 20]], qid=2), truth([], qid=3)]
    guesses = [guess([[0, 20, 1]], qid=2), guess([]), guess([[0, 9, 1]], qid=3)]
    scores = evaluate(truths, guesses)
    assert scores["full"]["MR-mAP"]["0.5"] == scores["full"]["MR-R1"]["0.5"] == 50.0


def slow_precision(guesses: Floats, true: Floats, threshold: float) -> float:
    free, found = list(true), []
    for window in sorted(guesses.tolist(), key=lambda w: -w[2]):
        overlaps = [(slow_iou(window[:2], t.tolist()), i) for i, t in enumerate(free)]
        best, at = max(overlaps, default=(0.0, 0))
        found.append(best >= threshold)
        if found[-1]:
            free.pop(at)
    precision = [sum(found[: i + 1]) / (i + 1) for i in range(len(found))]
    return sum(max(precision[i:]) for i, hit in enumerate(found) if hit) / len(true)


def slow_iou(a: list[float], b: list[float]) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def test_all_queries_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(0)
    truths, guesses = [], []
    for qid in range(60):
        edges = np.sort(rng.choice(150, size=2 * rng.integers(1, 6), replace=False)).reshape(-1, 2)
        near = edges[rng.integers(0, len(edges), size=rng.integers(0, 11))] + rng.normal(0, 2, size=(1, 2))
        near = np.column_stack([near[:, 0], np.maximum(near[:, 1], near[:, 0] + 0.5)])
        truths.append(truth(edges.astype(float).tolist(), qid=qid))
        guesses.append(guess(np.column_stack([near, rng.integers(0, 5, len(near))]).tolist(), qid=qid))
    table = evaluate(truths, guesses)["full"]
    for at in IOU_THRESHOLDS:
        slow = [slow_precision(g.windows, t.windows, at) for t, g in zip(truths, guesses, strict=True)]
        assert table["MR-mAP"][str(at)] == pytest.approx(100 * np.mean(slow), abs=0.0051)
        first = [
            any(slow_iou(w[:2].tolist(), t.tolist()) >= at for w, t in product(g.windows[:1], truth.windows))
            for truth, g in zip(truths, guesses, strict=True)
        ]
        assert table["MR-R1"][str(at)] == pytest.approx(100 * np.mean(first), abs=0.0051)


# Highlights


def test_highlights_by_hand() -> None:
    votes = [[4, 0, 2], [0, 0, 3], [4, 0, 4], [0, 0, 0]]
    scores = evaluate([truth([[0, 2]], votes)], [guess([], [0.9, 0.8, 0.1, 0.1])])
    # Very good are clips 0 and 2 of the first annotator (precision 1, then 2/4 as clips 2 and 3 tie), none of the
    # second, and clip 2 of the third (1/4).
    assert scores["HL-min-VeryGood"] == {"HL-mAP": 33.33, "HL-Hit1": 100.0}
    # Good of the third are clips 1 and 2: 2/4 and 2/4, interpolated and averaged; Fair 0, 1, 2: 1, 1, 3/4, a tie each.
    assert scores["HL-min-Good"] == {"HL-mAP": round(100 * (3 / 4 + 0 + 1 / 2) / 3, 2), "HL-Hit1": 100.0}
    assert scores["HL-min-Fair"]["HL-mAP"] == round(100 * (3 / 4 + 0 + (1 + 1 + 3 / 4) / 3) / 3, 2)


def test_saliency_of_another_length_is_cut_or_filled_with_0() -> None:
    votes = [[4], [0], [4]]
    assert evaluate([truth([], votes)], [guess([], [0.5])])["HL-min-Fair"]["HL-Hit1"] == 100.0
    long = evaluate([truth([], votes)], [guess([], [0.5, 0.1, 0.4, 0.9])])["HL-min-Fair"]
    assert long == {"HL-mAP": 100.0, "HL-Hit1": 0.0}


def test_predictions_of_other_queries_are_refused() -> None:
    with pytest.raises(InputError, match="not of the same queries"):
        evaluate([truth([])], [guess([], qid=2)])


# One ranking, one threshold


def test_temporal_iou() -> None:
    iou = temporal_iou([[0, 10], [5, 5]], [[0, 10], [5, 15], [20, 30], [5, 5]])
    assert iou.tolist() == [[1, 1 / 3, 0, 0], [0, 0, 0, 0]]
    assert temporal_iou([], [[0, 1]]).shape == (0, 1)


def test_windows_hold_their_start_and_not_their_end() -> None:
    assert inside([0, 1, 2, 3, 4], [[1, 2], [3, 9]]).tolist() == [False, True, False, True, True]
    assert not inside([1.0], []).any()


def test_average_precision_by_hand() -> None:
    assert average_precision([1, 0, 1, 0], [4, 3, 2, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([0, 0, 1], [3, 2, 1]) == pytest.approx(1 / 3)
    assert math.isnan(average_precision([0, 0], [1, 2]))
    with pytest.raises(ValueError, match="without NaN"):
        average_precision([1, 0], [math.nan, 1])


def test_ties_are_not_rewarded_by_their_order() -> None:
    assert average_precision([1, 0, 0, 0], [0.5] * 4) == average_precision([0, 0, 0, 1], [0.5] * 4) == 0.25
    assert average_precision([1, 0, 1, 1], [2, 2, 1, 1]) == pytest.approx(1 / 3 * 1 / 2 + 2 / 3 * 3 / 4)


def test_average_precision_equals_its_definition_at_each_distinct_score() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        labels, scores = rng.random(40) < 0.3, rng.integers(0, 12, 40)
        if not labels.any():
            continue
        area = before = 0.0
        for least in sorted(set(scores.tolist()), reverse=True):
            taken = scores >= least
            recall = (taken & labels).sum() / labels.sum()
            area += (recall - before) * (taken & labels).sum() / taken.sum()
            before = recall
        assert average_precision(labels, scores) == pytest.approx(area)


def test_frame_f1_micro_and_per_query() -> None:
    f1 = frame_f1([[1, 1, 0, 0], [0, 0], [0, 1]], [[0.6, 0.1, 0.5, 0.2], [0.1, 0.2], [0.1, 0.9]], 0.5)
    assert f1.per_query[0] == 0.5 and math.isnan(f1.per_query[1]) and f1.per_query[2] == 1.0
    assert f1.micro == pytest.approx(2 * 2 / (3 + 3))


# Files

LINE: dict[str, Any] = {
    "qid": 7,
    "query": "a dog",
    "vid": "v",
    "duration": 10.5,
    "relevant_windows": [[2, 6]],
    "relevant_clip_ids": [1, 2],
    "saliency_scores": [[4, 3, 2], [1, 1, 1]],
    "something_else": None,
}


def test_truths_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(LINE) + "\n\n" + json.dumps(LINE | {"qid": "x", "relevant_windows": []}) + "\n")
    first, second = read_jsonl(path, Truth)
    assert (first.qid, first.query, first.vid, first.duration) == (7, "a dog", "v", 10.5)
    assert first.windows.tolist() == [[2, 6]] and second.windows.shape == (0, 2)
    assert first.saliency.tolist() == [[0, 0, 0], [4, 3, 2], [1, 1, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"vid": ...}, "missing key 'vid'"),
        ({"qid": None}, "qid must be"),
        ({"qid": 7}, "qid 7 came before"),
        ({"duration": math.nan}, "NaN is not a number"),
        ({"duration": "long"}, "duration: expected numbers"),
        ({"relevant_windows": [[6, 2]]}, "ends before it starts"),
        ({"relevant_windows": [[2]]}, "relevant_windows: expected numbers"),
        ({"relevant_windows": [[2, 3], [4]]}, "relevant_windows: expected numbers"),
        ({"relevant_clip_ids": [1, 5]}, "clips 0 to 4"),
        ({"relevant_clip_ids": [1]}, "saliency_scores: expected numbers"),
        ({"saliency_scores": [[1e999, 1], [1, 1]]}, "is not a number"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | dict[str, Any], complaint: str) -> None:
    path = tmp_path / "t.jsonl"
    if isinstance(line, dict):
        line = json.dumps({k: v for k, v in (LINE | {"qid": 8} | line).items() if v is not ...})
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(InputError, match=complaint) as caught:
        read_jsonl(path, Truth)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_a_number_too_large_for_a_float_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(LINE).replace("10.5", "1e999"))
    with pytest.raises(InputError, match=r"t\.jsonl:1: duration: holds a number that is not finite"):
        read_jsonl(path, Truth)


def test_predictions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = {"qid": 1, "pred_relevant_windows": [[0, 2, 0.5]], "pred_saliency_scores": [1, 2]}
    path.write_text(json.dumps(line))
    (prediction,) = read_jsonl(path, Prediction)
    assert prediction.windows.tolist() == [[0, 2, 0.5]] and prediction.saliency.tolist() == [1, 2]
    path.write_text(json.dumps(line | {"pred_relevant_windows": [[2, 0, 0.5]]}))
    with pytest.raises(InputError, match=r"p\.jsonl:1: pred_relevant_windows: a window ends before it starts"):
        read_jsonl(path, Prediction)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        read_jsonl(tmp_path / "none.jsonl", Truth)
