"""Offline scores of the data sets beside QVHighlights, as the public evaluations define them; the code is our own.

Moment retrieval - Charades-STA, TACoS, Ego4D-NLQ - by `recall`; highlights - TVSum, YouTube Highlights - by
`highlights`. Percentages with two decimals. numpy only.

Where the definitions were read:

    TencentARC/UMT        datasets/tvsum.py, datasets/youtube.py (highlights; Liu et al., CVPR 2022)
    showlab/UniVTG        eval/eval.py, main/dataset.py (both; Lin et al., ICCV 2023)
    yeliudev/R2-Tuning    datasets/eval/evaluation.py, datasets/tvsum.py, datasets/youtube.py (both; ECCV 2024)
    line/lighthouse, wjun0830/QD-DETR    training/evaluate.py, qd_detr/inference.py: UMT's highlights again
    jiyanggao/TALL        main.py (recall; Gao et al., ICCV 2017)
    EGO4D/episodic-memory NLQ/VSLNet/utils/evaluate_ego4d_nlq.py and, beside it, a copy of 2D-TAN's (recall)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kernels.errors import InputError
from trainer.metrics import (
    Bools,
    Floats,
    get,
    hull_iou,
    parse_duration,
    parse_numbers,
    parse_qid,
    parse_windows,
    percent,
)

RECALL_IOUS = {
    "charades": (0.3, 0.5, 0.7),
    "tacos": (0.1, 0.3, 0.5, 0.7),
    "nlq": (0.01, 0.3, 0.5, 0.7),
}
"""The thresholds that are published for each. TACoS: 0.1 to 0.5 by TALL and 2D-TAN, 0.3 to 0.7 by R2-Tuning. NLQ: 0.3
and 0.5 in the challenge, 0.01 too while its baseline trains, 0.3 to 0.7 by R2-Tuning."""
RANKS = (1, 5)
TVSUM_ANNOTATORS = 20
TVSUM_TOP = 5
"""Clips of a video that its precision looks at."""


@dataclass(frozen=True, eq=False)
class Moments:
    """One annotated query, without saliency."""

    qid: int | str
    duration: float
    windows: Floats  # (n, 2); an empty one, as NLQ has some, is never met

    @classmethod
    def parse(cls, line: dict[str, Any], *, true: bool = False) -> Self:
        """Of one line of jsonl; `true` asks for a window at least. Raises InputError."""
        windows = parse_windows(line, "relevant_windows", 2)
        if true and not len(windows):
            raise InputError("relevant_windows: there is none, and recall asks for one")
        return cls(parse_qid(line), parse_duration(line), windows)


@dataclass(frozen=True, eq=False)
class Guesses:
    """The windows that were predicted for one query."""

    qid: int | str
    windows: Floats  # (n, 3) start, end, score; in any order

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Self:
        """Of one line of jsonl; raises InputError."""
        return cls(parse_qid(line), parse_windows(line, "pred_relevant_windows", 3))


@dataclass(frozen=True, eq=False)
class Labels:
    """One annotated video: a line of the jsonl that QD-DETR (TVSum) and lighthouse (YouTube Highlights) publish."""

    qid: int | str
    domain: str
    clips: Floats  # (clips, annotators): importance 1..5 of TVSum, one column above 0 if a highlight of YouTube

    @classmethod
    def parse(cls, line: dict[str, Any], *, annotators: int) -> Self:
        """Of one line of jsonl; raises InputError."""
        clips, domain = parse_numbers(line, "label", (-1, annotators)), get(line, "domain")
        if not len(clips):
            raise InputError("label: no clip is labelled")
        if not isinstance(domain, str):
            raise InputError(f"domain must be a string, got {domain!r:.60}")
        return cls(parse_qid(line), domain, clips)


@dataclass(frozen=True, eq=False)
class Saliency:
    """What was predicted for the clips of one video."""

    qid: int | str
    scores: Floats  # (clips,) any scale

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Self:
        """Of one line of jsonl; raises InputError."""
        return cls(parse_qid(line), parse_numbers(line, "pred_saliency_scores", (-1,)))


def recall(pairs: Sequence[tuple[Moments, Guesses]], ious: Sequence[float]) -> dict[str, dict[str, float]]:
    """R@n at each IoU and mIoU, named as R2-Tuning's "brief": MR-full-R1@0.5, MR-full-R5@0.5, MR-full-mIoU.

    R@n, IoU=m: share of queries of which one of the n best-scored windows overlaps a true one by m or more. mIoU: mean
    overlap of the best-scored window alone. Of equal scores the window listed first goes first, and a query without
    guesses is a miss. No window is suppressed for lying on another: R2-Tuning, UMT and 2D-TAN do that to their
    predictions before they score them, at thresholds of their own.

    These are the R1 and mIoU of UniVTG and R2-Tuning (Charades-STA, TACoS, NLQ), the R1 and R5 of UMT (Charades-STA)
    and TALL's. They take the windows as listed; listed by score, as all of them write, that is the same. The official
    evaluation of Ego4D-NLQ and 2D-TAN want more than m: apart only where an overlap is m exactly.

    Every query must have a true window.
    """
    best = np.array([_best(truth, guesses) for truth, guesses in pairs])  # (queries, RANKS)
    brief = {
        f"MR-full-R{rank}@{at}": percent(float((column >= at).mean()))
        for rank, column in zip(RANKS, best.T, strict=True)
        for at in ious
    }
    return {"brief": brief | {"MR-full-mIoU": percent(float(best[:, 0].mean()))}}


def _best(truth: Moments, guesses: Guesses) -> list[float]:
    """The largest overlap of the first n guesses with a true window, for each n of RANKS."""
    ranked = guesses.windows[np.argsort(-guesses.windows[:, 2], kind="stable"), :2]
    overlap = hull_iou(ranked, truth.windows)
    return [float(overlap[:rank].max(initial=0)) for rank in RANKS]


def highlights(
    pairs: Sequence[tuple[Labels, Saliency]], precision: Callable[[Floats, Floats], float]
) -> dict[str, dict[str, float]]:
    """mAP: of each video by `precision`, of each domain as the mean over its videos, in all as the mean over domains.

    {"brief": {"mAP": ..}, "domains": {domain: ..}, "videos": {qid: ..}}. The domains are the columns of the published
    tables and brief is their "Avg."; each is trained on its own there, and a file may hold one domain or all.
    A prediction is cut to the labelled clips, as published; clips that it does not reach rank last.
    """
    videos: dict[str, float] = {}
    domains: dict[str, list[float]] = {}
    for truth, prediction in pairs:
        scores = np.full(len(truth.clips), -math.inf)
        scores[: len(prediction.scores)] = prediction.scores[: len(scores)]
        value = precision(truth.clips, scores)
        videos[str(truth.qid)] = value
        domains.setdefault(truth.domain, []).append(value)
    means = {domain: float(np.mean(values)) for domain, values in domains.items()}
    return {
        "brief": {"mAP": percent(float(np.mean(list(means.values()))))},
        "domains": {domain: percent(mean) for domain, mean in means.items()},
        "videos": {video: percent(value) for video, value in videos.items()},
    }


def tvsum_precision(labels: Floats, scores: Floats) -> float:
    """TVSum's top-5: the precision of the five best-scored clips, averaged over annotators.

    `labels` (clips, annotators), `scores` (clips,). To an annotator a clip is a highlight that he holds more important
    than his median clip. The recall is of the highlights among the five, not of all: five hits are 100% however many
    there are elsewhere. UMT's lower median in place of the mean of the middle two makes no difference to "more than".
    """
    liked = labels > np.median(labels, axis=0)
    top = _ranking(scores)[:TVSUM_TOP]
    return float(np.mean([ranked_precision(column) for column in liked[top].T]))


def youtube_precision(labels: Floats, scores: Floats) -> float:
    """YouTube Highlights: the precision over all clips. `labels` (clips, 1), above 0 a highlight; `scores` (clips,)."""
    return ranked_precision(labels[_ranking(scores), 0] > 0)


def _ranking(scores: Floats) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Clips by falling score; of equal ones the earlier, where the published code leaves the order to chance."""
    return np.argsort(-scores, kind="stable")


def ranked_precision(hits: Bools) -> float:
    """UMT's area under precision and recall of a ranking (n,), by trapezoids from (0, 1); 0 without any hit.

    A hit at rank j adds the mean of the precisions at j - 1 and j. The AP of trainer.metrics adds the one at j alone.
    """
    if not hits.any():
        return 0.0
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    before = np.append(1.0, precision[:-1])
    return float(((before + precision) / 2)[hits].mean())
