"""Offline scores: QVHighlights' official evaluation, and what measures one ranking or one threshold over frames.

`evaluate` gives the numbers of the official scorer (Lei et al., "QVHighlights", NeurIPS 2021; standalone_eval of
Moment-DETR), two decimals and all: moment retrieval (MR) and highlight detection (HL). The functions below it
are the textbook ones. How annotations and predictions are read is here too, for every data set. The other data sets
are scored in trainer.benchmark_metrics, what was published when in trainer.streaming_metrics.

Times are seconds, windows half-open [start, end). numpy only: the base install scores without torch.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CLIP_S = 2
"""Length of the clips that saliency is given for."""
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MAX_PREDICTIONS = 10
"""The official mAP reads this many windows of a query, in the order listed."""
LENGTHS_S = {"full": (0, math.inf), "long": (30, math.inf), "middle": (10, 30), "short": (0, 10)}
"""True windows in (first, second]. Officially "long" ends at 150 s, which is where those videos end."""
LONGEST_S = 1e6
"""Of a video, and the farthest that a window may lie from its beginning: eleven days. Beyond, the number is wrong."""
LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}
"""The least vote (0..4) of an annotator that makes a clip a highlight."""


@dataclass(frozen=True, eq=False)
class Truth:
    """One annotated query of one video."""

    qid: int | str
    query: str
    vid: str
    duration: float
    windows: Floats  # (n, 2); none if the query never comes true
    saliency: Floats  # (duration // CLIP_S, annotators) votes, 0 outside the relevant clips

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Self:
        """Of one line of jsonl; raises InputError."""
        duration, windows = parse_duration(line), parse_windows(line, "relevant_windows", 2)
        if (windows[:, 0] == windows[:, 1]).any():
            raise InputError("relevant_windows: a window ends where it starts")
        ids = parse_numbers(line, "relevant_clip_ids", (-1,))
        votes = parse_numbers(line, "saliency_scores", (len(ids), -1))
        saliency = np.zeros((max(0, int(duration // CLIP_S)), votes.shape[1]))
        if not np.isin(ids, np.arange(len(saliency))).all():
            raise InputError(f"relevant_clip_ids: {duration} s have the clips 0 to {len(saliency) - 1}")
        saliency[ids.astype(int)] = votes
        return cls(parse_qid(line), str(get(line, "query")), str(get(line, "vid")), duration, windows, saliency)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was predicted for one query."""

    qid: int | str
    windows: Floats  # (n, 3) start, end, score; best first
    saliency: Floats  # (clips,) any scale

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Self:
        """Of one line of jsonl; raises InputError."""
        windows = parse_windows(line, "pred_relevant_windows", 3)
        return cls(parse_qid(line), windows, parse_numbers(line, "pred_saliency_scores", (-1,)))


class HasQid(Protocol):
    """What a line is about: a query, or a video."""

    @property
    def qid(self) -> int | str: ...


Record = TypeVar("Record", bound=HasQid)
Own = TypeVar("Own", Truth, Prediction)


def read_jsonl(path: Path, record: type[Own]) -> list[Own]:
    """The records of a QVHighlights file, in its order. Raises InputError as read_lines does."""
    return [parsed for _, parsed in read_lines(path, record.parse).values()]


def read_lines(path: Path, parse: Callable[[dict[str, Any]], Record]) -> dict[int | str, tuple[int, Record]]:
    """qid -> number of its line, from 1, and what `parse` makes of it. Keys that are not needed are ignored.

    Raises:
        InputError: the file cannot be read or is empty, or a line is not JSON, is refused by `parse` (a key misses, a
            number is not finite, a window ends before it starts), or has a qid that came before. Names file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # a string may hold what str.splitlines() takes for the end of a line
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    records: dict[int | str, tuple[int, Record]] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode(), parse_constant=_refuse)
            if not isinstance(line, dict):
                raise InputError("not a JSON object")
            parsed = parse(line)
            if parsed.qid in records:
                raise InputError(f"qid {parsed.qid!r:.60} came before, in line {records[parsed.qid][0]}")
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error.msg}") from None
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, brackets without end
            raise InputError(f"{path}:{number}: cannot be read: {error}") from None
        records[parsed.qid] = number, parsed
    if not records:
        raise InputError(f"{path}:1: the file is empty, so there is nothing to score")
    return records


def _refuse(constant: str) -> NoReturn:
    raise InputError(f"{constant} is not a number")


def get(line: dict[str, Any], key: str) -> Any:
    """Raises InputError if the line has no such key."""
    if key not in line:
        raise InputError(f"missing key {key!r}")
    return line[key]


def parse_qid(line: dict[str, Any]) -> int | str:
    qid = get(line, "qid")
    if isinstance(qid, bool) or not isinstance(qid, int | str):
        raise InputError(f"qid must be a whole number or a string, got {qid!r:.60}")
    return qid


def parse_duration(line: dict[str, Any]) -> float:
    duration = float(parse_numbers(line, "duration", ()))
    if not 0 < duration <= LONGEST_S:
        raise InputError(f"duration: must be above 0 and at most {LONGEST_S:g} s, got {duration:g}")
    return duration


def parse_windows(line: dict[str, Any], key: str, columns: int) -> Floats:
    """(n, columns) of which the first two are start and end, in seconds; a window may be empty."""
    windows = parse_numbers(line, key, (-1, columns))
    if (backward := windows[:, 0] > windows[:, 1]).any():
        raise InputError(f"{key}: a window ends before it starts: {windows[backward][0].tolist()}")
    if (far := (np.abs(windows[:, :2]) > LONGEST_S).any(axis=1)).any():
        raise InputError(f"{key}: a window lies beyond {LONGEST_S:g} s: {windows[far][0].tolist()}")
    return windows


def parse_numbers(line: dict[str, Any], key: str, shape: tuple[int, ...]) -> Floats:
    """Finite numbers in the shape, where -1 is any length. An empty list is an array without rows."""
    value = get(line, key)
    try:
        array = np.asarray(value if value != [] else np.zeros([max(0, n) for n in shape]))
    except ValueError:  # ragged
        array = np.asarray(None)
    fits = array.ndim == len(shape) and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in "iuf" or _holds_bool(value):  # numpy takes true for 1
        raise InputError(f"{key}: expected numbers of shape {shape}, got {value!r:.60}")
    if not np.isfinite(array).all():
        raise InputError(f"{key}: holds a number that is not finite")
    return array.astype(np.float64)


def _holds_bool(value: Any) -> bool:
    return any(map(_holds_bool, value)) if isinstance(value, list) else isinstance(value, bool)


def evaluate(truths: Sequence[Truth], predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Percentages keyed as the official scorer's: "brief", "HL-min-Fair", .., "full", "long", "middle", "short".

    A query without true windows counts in HL only. NaN stands where no query has a window of that length.

    Raises:
        InputError: the two do not speak of the same queries.
    """
    by_qid = {prediction.qid: prediction for prediction in predictions}
    if by_qid.keys() != {truth.qid for truth in truths}:
        raise InputError(f"{len(by_qid)} predictions and {len(truths)} annotations are not of the same queries")
    ordered = [by_qid[truth.qid] for truth in truths]
    moments, highlights = _moment_retrieval(truths, ordered), _highlight_detection(truths, ordered)
    full = moments["full"]
    brief = {f"MR-full-R1@{at}": full["MR-R1"][at] for at in ("0.5", "0.7")}
    brief["MR-full-mAP"] = full["MR-mAP"]["average"]
    brief |= {f"MR-full-mAP@{at}": full["MR-mAP"][at] for at in ("0.5", "0.75")}
    brief |= {f"MR-{name}-mAP": moments[name]["MR-mAP"]["average"] for name in ("long", "middle", "short")}
    brief |= {name.replace("HL", level, 1): value for level, s in highlights.items() for name, value in s.items()}
    return {"brief": brief, **highlights, **moments}


def percent(share: float) -> float:
    """With the two decimals that are published."""
    return float(f"{100 * share:.2f}")


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else math.nan


def _moment_retrieval(
    truths: Sequence[Truth], predictions: Sequence[Prediction]
) -> dict[str, dict[str, dict[str, float]]]:
    # Q queries, P predicted windows, G true windows; short lists are padded with windows that meet nothing.
    # Sorting is stable: of equal scores the window listed first goes first.
    listed = [prediction.windows[:MAX_PREDICTIONS] for prediction in predictions]
    ranked = [windows[np.argsort(-windows[:, 2], kind="stable"), :2] for windows in listed]
    true, guess = _padded([truth.windows for truth in truths]), _padded(ranked)
    first = _padded([windows[:1, :2] for windows in listed])
    lengths = np.nan_to_num(true[..., 1] - true[..., 0])  # (Q, G)
    iou, first_iou = _iou(guess, true), _iou(first, true)[:, 0]  # (Q, P, G), (Q, G)
    first_hull_iou = hull_iou(first, true)[:, 0]  # which true window is met is told by one, how well by the other
    tables = {}
    for name, (low, high) in LENGTHS_S.items():
        kept = (low < lengths) & (lengths <= high)  # (Q, G)
        some = kept.any(axis=1)
        met = np.where(kept, first_iou, -1).argmax(axis=1)
        best = np.take_along_axis(first_hull_iou, met[:, None], axis=1)[some, 0]
        found = _found(np.where(kept[:, None], iou, -1)[some])
        precision = _average_precisions(found, kept.sum(axis=1)[some])  # (Q, thresholds)
        per_threshold = {str(at): _mean(column) for at, column in zip(IOU_THRESHOLDS, precision.T, strict=True)}
        per_threshold["average"] = _mean(precision)
        recall = {str(at): _mean((best >= at).astype(float)) for at in IOU_THRESHOLDS}
        tables[name] = {
            "MR-mAP": {at: percent(value) for at, value in per_threshold.items()},
            "MR-R1": {at: percent(value) for at, value in recall.items()},
        }
    return tables


def _padded(lists: Sequence[Floats]) -> Floats:
    """(queries, longest or 1, 2) with NaN after the end of each list."""
    stacked = np.full((len(lists), max([1, *map(len, lists)]), 2), np.nan)
    for row, windows in zip(stacked, lists, strict=True):
        row[: len(windows)] = windows
    return stacked


def _found(iou: Floats) -> Bools:
    """(Q, P, thresholds): which prediction, in order, takes a true window that no earlier one took.

    It takes the free window that it overlaps best, if by the threshold at least; of equals the last one.
    """
    queries, guesses, truths = iou.shape
    free = np.ones((queries, len(IOU_THRESHOLDS), truths), dtype=bool)
    found = np.zeros((queries, guesses, len(IOU_THRESHOLDS)), dtype=bool)
    for rank in range(guesses):
        overlap = iou[:, rank, None, :]  # (Q, 1, G)
        reached = free & (overlap >= np.array(IOU_THRESHOLDS)[:, None])
        best = truths - 1 - np.where(reached, overlap, -1)[..., ::-1].argmax(axis=-1)
        found[:, rank] = reached.any(axis=-1)
        free &= ~(found[:, rank, :, None] & (np.arange(truths) == best[..., None]))
    return found


def _average_precisions(found: Bools, positives: NDArray[np.int_]) -> Floats:
    """(Q, thresholds) areas under the interpolated precision, of hits (Q, P, thresholds) for `positives` (Q,)."""
    precision = found.cumsum(axis=1) / np.arange(1, found.shape[1] + 1)[:, None]
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return np.asarray((envelope * found).sum(axis=1) / positives[:, None])


def _highlight_detection(truths: Sequence[Truth], predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    tables = {}
    for name, least in LEVELS.items():
        precision, hits = [], []
        for truth, prediction in zip(truths, predictions, strict=True):
            liked = truth.saliency >= least  # (clips, annotators)
            scores = np.zeros(len(liked))  # clips that the prediction does not reach score 0
            scores[: len(prediction.saliency)] = prediction.saliency[: len(liked)]
            precision += [_highlight_precision(votes, scores) for votes in liked.T]
            best = int(prediction.saliency.argmax()) if prediction.saliency.size else len(liked)
            hits.append(best < len(liked) and bool(liked[best].any()))
        tables[f"HL-min-{name}"] = {
            "HL-mAP": percent(_mean(np.array(precision))),
            "HL-Hit1": percent(_mean(np.array(hits, dtype=float))),
        }
    return tables


def _highlight_precision(truth: Bools, scores: Floats) -> float:
    """The official one of an annotator: interpolated, and its mean over the recalls reached is not weighted by them."""
    if truth.all() or not truth.any():
        return float(truth.any())
    precision, recall = _curve(truth, scores)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[np.diff(recall, prepend=0) > 0].mean())


def _curve(truth: Bools, scores: Floats) -> tuple[Floats, Floats]:
    """Precision and recall, each (distinct scores,), when everything from a score upwards is taken; highest first."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each run of equal scores
    true = truth[order].cumsum()[last]
    return true / (last + 1), true / truth.sum()


def _iou(a: Floats, b: Floats) -> Floats:
    """(..., n, m) of (..., n, 2) and (..., m, 2); -1 where a window is NaN."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    shared = np.clip(np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]), 0, None)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - shared
    ratio = np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
    return np.where(np.isnan(union), -1.0, ratio)


def hull_iou(a: Floats, b: Floats) -> Floats:
    """As _iou, divided by the time from the first start to the last end, which is the union where windows meet.

    The public code computes recall so and AP the other way. They round apart, and one bit tells 0.5 from less.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    shared = np.clip(np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0]), 0, None)
    hull = np.maximum(a[..., 1], b[..., 1]) - np.minimum(a[..., 0], b[..., 0])
    ratio = np.divide(shared, hull, out=np.zeros_like(hull), where=hull > 0)
    return np.where(np.isnan(hull), -1.0, ratio)


def temporal_iou(a: ArrayLike, b: ArrayLike) -> Floats:
    """(n, m) intersection over union of windows (n, 2) and (m, 2); 0 for two empty ones."""
    return _iou(np.asarray(a, dtype=np.float64).reshape(-1, 2), np.asarray(b, dtype=np.float64).reshape(-1, 2))


def inside(times: ArrayLike, windows: ArrayLike) -> Bools:
    """(n,) whether each time lies in one of the windows (m, 2)."""
    edges = np.asarray(windows, dtype=np.float64).reshape(-1, 2)
    at = np.asarray(times, dtype=np.float64)[:, None]
    return np.asarray(((edges[:, 0] <= at) & (at < edges[:, 1])).any(axis=1))


def average_precision(truth: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall steps, sum of (R_n - R_(n-1)) P_n over the distinct scores (frame AP).

    Equal scores enter together, so their order is worth nothing: a constant score gets the share of positives. NaN if
    nothing is true.
    """
    labels, values = np.asarray(truth, dtype=bool), np.asarray(scores, dtype=np.float64)
    if labels.shape != values.shape or labels.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"expected two lists of one length without NaN, got {labels.shape} and {values.shape}")
    if not labels.any():
        return math.nan
    precision, recall = _curve(labels, values)
    return float((np.diff(recall, prepend=0) * precision).sum())


@dataclass(frozen=True, eq=False)
class FrameF1:
    micro: float  # of all frames of all queries together
    per_query: Floats  # (queries,); NaN for a query with nothing true and nothing predicted


def frame_f1(truths: Sequence[ArrayLike], scores: Sequence[ArrayLike], threshold: float) -> FrameF1:
    """F1 of the frames that score `threshold` or more, one list of frames per query."""
    counts = []
    for labels, values in zip(truths, scores, strict=True):
        true, taken = np.asarray(labels, dtype=bool), np.asarray(values) >= threshold
        counts.append((2 * (true & taken).sum(), true.sum() + taken.sum()))
    table = np.array([*counts, np.sum(counts, axis=0)], dtype=np.float64)
    f1 = np.divide(table[:, 0], table[:, 1], out=np.full(len(table), np.nan), where=table[:, 1] > 0)
    return FrameF1(float(f1[-1]), f1[:-1])
