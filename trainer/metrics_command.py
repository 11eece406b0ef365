"""`livemoments metrics`: predictions against annotations, as one JSON object.

What the two files hold, one JSON object a line (other keys are ignored):

    kind                  --gt                                              --pred
    qvhighlights          qid query vid duration relevant_windows           qid pred_relevant_windows
                          relevant_clip_ids saliency_scores                 pred_saliency_scores
    charades tacos nlq    qid duration relevant_windows                     qid pred_relevant_windows
    tvsum youtube         qid domain label                                  qid pred_saliency_scores
    streaming             qid duration relevant_windows                     qid opened closed

Windows are [start, end], predicted ones [start, end, score]; `label` has a row per clip, of 20 importances (TVSum) or
of one 0 or 1 (YouTube Highlights); `opened` are [published, start], `closed` [published, start, end, score]. Times are
seconds.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kernels.errors import InputError
from trainer.benchmark_metrics import (
    RECALL_IOUS,
    TVSUM_ANNOTATORS,
    Guesses,
    Labels,
    Moments,
    Saliency,
    highlights,
    recall,
    tvsum_precision,
    youtube_precision,
)
from trainer.metrics import HasQid, Prediction, Truth, evaluate, read_lines
from trainer.streaming_metrics import QueryRun, Told, streaming_scores

KINDS = ("qvhighlights", *RECALL_IOUS, "tvsum", "youtube", "streaming")

T = TypeVar("T", bound=HasQid)
P = TypeVar("P", bound=HasQid)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    assert __doc__ is not None
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = __doc__.partition("\n\n")[2]
    parser.add_argument("--gt", type=Path, required=True, metavar="FILE", help="annotations, jsonl: see below")
    parser.add_argument(
        "--pred", type=Path, required=True, metavar="FILE", help="predictions, jsonl, a line for every query"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="whose measures: qvhighlights (default, the official evaluation); R@1, R@5 and mIoU of charades "
        "(Charades-STA), tacos or nlq (Ego4D-NLQ); top-5 mAP of tvsum; mAP of youtube (YouTube Highlights); or "
        "streaming: what was told when",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the scores. Raises InputError for a file that is wrong in itself or does not fit the other."""
    print(json.dumps(_without_nan(score(args.kind, args.gt, args.pred)), indent=4, allow_nan=False))
    return 0


def score(kind: str, gt: Path, pred: Path) -> dict[str, Any]:
    """The measures of one of KINDS; NaN where nothing is there to be measured."""
    if kind == "qvhighlights":
        truths, predictions = zip(*read_pairs(gt, pred, Truth.parse, Prediction.parse), strict=True)
        return evaluate(truths, predictions)
    if kind in RECALL_IOUS:
        return recall(read_pairs(gt, pred, partial(Moments.parse, true=True), Guesses.parse), RECALL_IOUS[kind])
    if kind == "tvsum":
        parse = partial(Labels.parse, annotators=TVSUM_ANNOTATORS)
        return highlights(read_pairs(gt, pred, parse, Saliency.parse), tvsum_precision)
    if kind == "youtube":
        parse = partial(Labels.parse, annotators=1)
        return highlights(read_pairs(gt, pred, parse, Saliency.parse), youtube_precision)
    told = read_pairs(gt, pred, Moments.parse, Told.parse)
    if not any(len(truth.windows) for truth, _ in told):
        raise InputError(f"{gt}: no query in it ever comes true, so there is nothing to score")
    runs = [QueryRun(truth.windows, truth.duration, events.opened, events.closed) for truth, events in told]
    return {"queries": len(runs), **streaming_scores(runs).named()}


def read_pairs(
    gt: Path, pred: Path, truth: Callable[[dict[str, Any]], T], prediction: Callable[[dict[str, Any]], P]
) -> list[tuple[T, P]]:
    """Every annotation with its prediction, in the order of the annotations.

    Raises:
        InputError: as read_lines, for a prediction of what is not annotated or none of what is, and where both files
            name the video or the query of a qid, but not the same.
    """
    annotated: dict[int | str, dict[str, str]] = {}
    predicted: dict[int | str, dict[str, str]] = {}
    truths, predictions = read_lines(gt, _noting(truth, annotated)), read_lines(pred, _noting(prediction, predicted))
    if unknown := [qid for qid in predictions if qid not in truths]:
        number, _ = predictions[unknown[0]]
        raise InputError(f"{pred}:{number}: qid {unknown[0]!r:.60} is not in {gt}{_others(unknown)}")
    if missing := [qid for qid in truths if qid not in predictions]:
        last = max(number for number, _ in predictions.values())
        asked = f"qid {missing[0]!r:.60} of {gt}:{truths[missing[0]][0]}"
        raise InputError(f"{pred}:{last}: the file ends without a prediction for {asked}{_others(missing)}")
    for qid, (number, _) in predictions.items():
        for key in annotated[qid].keys() & predicted[qid].keys():
            if annotated[qid][key] != predicted[qid][key]:
                where = f"{annotated[qid][key]!r:.60} in {gt}:{truths[qid][0]}"
                raise InputError(f"{pred}:{number}: {key} {predicted[qid][key]!r:.60} of qid {qid!r:.60} is {where}")
    return [(record, predictions[qid][1]) for qid, (_, record) in truths.items()]


def _noting(
    parse: Callable[[dict[str, Any]], T], about: dict[int | str, dict[str, str]]
) -> Callable[[dict[str, Any]], T]:
    """`parse`, which also notes what a line is about: equal qids of other data would score as if they fitted."""

    def noted(line: dict[str, Any]) -> T:
        record = parse(line)
        about[record.qid] = {key: str(line[key]).strip() for key in ("vid", "query") if key in line}
        return record

    return noted


def _others(found: list[int | str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _without_nan(value: Any) -> Any:
    """null for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
