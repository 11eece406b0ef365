"""`livemoments bench accuracy`: recorded videos through the very code of `run`, scored on what was published when.

Frame measures count hops: hop j is [j hop, (j + 1) hop), true when its middle lies in a true window, and scored by the
first window that holds it, because that is what a viewer had at the time.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench.environment import environment
from bench.plots import plot_queries
from bench.tables import facts, show
from kernels.bundle import EMBEDDED
from kernels.engine import Engine
from kernels.errors import InputError
from stream.detector import make_query
from stream.ingest import open_source
from stream.moments import MomentOptions
from stream.output import check_folder, check_writable, write
from stream.page.collector import Collector, Recording
from stream.page.report import Report, Table, render
from stream.predictions import Predictions, to_jsonl
from stream.report import progress_bar
from stream.run import play
from stream.session import Session, Step
from stream.sources import parse_source
from stream.types import NS, Event, Kind
from stream.window import hop_from_seconds
from trainer.metrics import Prediction, Truth, average_precision, evaluate, frame_f1, inside, read_jsonl
from trainer.streaming_metrics import Closed, Opened, QueryRun, streaming_scores

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts")


@dataclass(eq=False)
class Watched:
    """What one query got to see and say."""

    truth: Truth
    scores: NDArray[np.float64]  # (hops,) of the truth's duration, NaN where no window held the hop
    opened: list[Opened] = field(default_factory=list)
    closed: list[Closed] = field(default_factory=list)

    def hops(self, hop_s: float) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Truth and score of every hop, each (hops,); what no window held was not found, and scores 0."""
        middles = (np.arange(len(self.scores)) + 0.5) * hop_s
        return inside(middles, self.truth.windows), np.nan_to_num(self.scores)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=Path, metavar="FILE.jsonl", help="truth, QVHighlights style")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="where the videos lie, by their vid")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="in place of videos: features of the tvstream form, or of `livemoments extract` with --streams",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="with --features: the trained model")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="with --features: whole recordings at once, not window by window: the same scores to 1e-4, sooner",
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="with --features: which (default test)")
    parser.add_argument("--engine", type=Path, default=EMBEDDED, metavar="DIR", help="engine bundle (default: lite)")
    parser.add_argument("--zero-shot", action="store_true", help="leave the engine's trained head out, at any --hop")
    parser.add_argument("--hop", type=float, default=1.0, metavar="S", help="seconds between windows (default 1)")
    parser.add_argument(
        "--threshold", type=float, default=MomentOptions.threshold, metavar="P", help="score that opens a moment"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write what was found, in the same jsonl; with --features the frame AP of every query",
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw truth, score and moments of every query")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="write a page of truth, curves, moments with pictures, measures",
    )


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_folder(args.plot)
    if args.report and (args.features or args.checkpoint):
        raise InputError("--report shows recordings: leave it or --features out")
    if args.features or args.checkpoint:
        return _run_features(args)
    if not (args.streams and args.videos):
        raise InputError("nothing to score: give --streams and --videos, or --features and --checkpoint")
    truths = sorted(read_jsonl(args.streams, Truth), key=lambda truth: truth.vid)
    if not any(len(truth.windows) for truth in truths):
        raise InputError(f"{args.streams}: no query in it ever comes true, so there is nothing to score")
    hop_ns, options = hop_from_seconds(args.hop), MomentOptions(threshold=args.threshold)
    for path in filter(None, (args.out, args.report)):
        check_writable(path)
    engine, console = Engine(args.engine, zero_shot=args.zero_shot), Console(stderr=True, highlight=False)
    videos = {vid: _find(args.videos, vid) for vid in dict.fromkeys(truth.vid for truth in truths)}
    watched: list[Watched] = []
    rows: list[dict[str, Any]] = []
    recordings: list[Recording] | None = [] if args.report else None
    for vid, group in groupby(truths, key=lambda truth: truth.vid):
        found, predictions = watch(engine, videos[vid], list(group), hop_ns, options, console, recordings)
        watched += found
        rows += predictions
    if args.out:
        write(args.out, to_jsonl(rows))
    result = score(watched, rows, hop_ns / NS, options.threshold)
    tables = _tables(watched, result, hop_ns / NS)
    show(Console(highlight=False), tables)
    if args.plot:
        plot_queries(watched, hop_ns / NS, options.threshold, args.plot)
    made = {"engine": engine.manifest.model, "zero_shot": engine.head is None, "hop_s": hop_ns / NS} | environment()
    print(json.dumps(result | made, allow_nan=False))
    if recordings is not None:
        title, (by_query, measures) = f"accuracy on {args.streams.name}", tables
        page = Report(title, facts(made), recordings, summary=[measures], tables=[by_query])
        write(args.report, render(page))
    return 0


def _run_features(args: argparse.Namespace) -> int:
    if not (args.features and args.checkpoint) or args.videos:
        raise InputError("--features DIR and --checkpoint FILE go together, without --videos")
    try:
        from bench import features
    except ModuleNotFoundError as error:
        raise InputError(f"this needs the package {error.name}: pip install 'livemoments[train]'") from None
    return features.run(args)


def watch(
    engine: Engine,
    path: Path,
    truths: Sequence[Truth],
    hop_ns: int,
    options: MomentOptions,
    console: Console,
    recordings: list[Recording] | None = None,
) -> tuple[list[Watched], list[dict[str, Any]]]:
    """Replay one video for its queries as fast as it goes: what each said, and the predictions in the field's jsonl.

    recordings: where what a report shows of it is put.

    Raises:
        InputError: two queries are the same, or the video breaks off: half a video would be half a score.
    """
    queries = [make_query(engine, truth.query) for truth in truths]
    if len({query.id for query in queries}) < len(queries):
        raise InputError(f"{path.stem}: two of its queries are the same text: give each once")
    video = open_source(parse_source(str(path)), hop_ns=hop_ns, pace="max", name=truths[0].vid)
    try:
        told: list[Event] = []
        session = Session(engine, video.name, hop_ns, options, recorded=True, tell=told.append)
        predictions = Predictions(video.name, queries)
        watched = {}
        for query, truth in zip(queries, truths, strict=True):
            session.add(query)
            watched[query.id] = Watched(truth, np.full(math.ceil(truth.duration * NS / hop_ns - 1e-6), np.nan))
        known = {query.id: truth.windows.tolist() for query, truth in zip(queries, truths, strict=True)}
        collector = None if recordings is None else Collector(session, recorded=True, truth=known)
        with progress_bar(console, video) as progress:
            for step in play(video, session):
                if step is not None:
                    _note(step, watched, hop_ns)
                    predictions.add(step)
                    if collector:
                        collector.add(step)
                    progress.update(progress.task_ids[0], completed=step.time_ns / NS)
        if reason := next((e.status["reason"] for e in told if e.status and "reason" in e.status), None):
            raise InputError(f"{path}: {reason}")
        last = session.drain()
        _note(last, watched, hop_ns)
        predictions.add(last)
        if collector and recordings is not None:
            collector.add(last)
            recordings.append(collector.recording(truths[0].duration))
    finally:
        video.close()
    return list(watched.values()), predictions.rows([truth.qid for truth in truths])


def score(
    watched: Sequence[Watched], rows: Sequence[dict[str, Any]], hop_s: float, threshold: float
) -> dict[str, float | int | None]:
    """Every measure of the table, by name: shares in [0, 1], but percent for mr_*, hd_map and hit1, as is published."""
    # Row i is what query i said.
    answered = [(w.truth, Prediction.parse(row)) for w, row in zip(watched, rows, strict=True) if len(w.truth.windows)]
    truths, scores = zip(*(w.hops(hop_s) for w in watched), strict=True)
    f1 = frame_f1(truths, scores, threshold)
    official = evaluate([truth for truth, _ in answered], [prediction for _, prediction in answered])
    streaming = streaming_scores([QueryRun(w.truth.windows, w.truth.duration, w.opened, w.closed) for w in watched])
    brief = official["brief"]
    return {
        "queries": len(watched),
        "prior": float(np.mean([t.mean() for t in truths])),
        "frame_ap": _mean_known([average_precision(t, s) for t, s in zip(truths, scores, strict=True)]),
        "f1_default": _mean_known([f1.micro]),
        "f1_per_query": _mean_known(f1.per_query),
        "threshold": threshold,
        "hd_map": brief["HL-min-VeryGood-mAP"],
        "hit1": brief["HL-min-VeryGood-Hit1"],
        "mr_r1_50": brief["MR-full-R1@0.5"],
        "mr_r1_70": brief["MR-full-R1@0.7"],
        "mr_map": brief["MR-full-mAP"],
        **streaming.named(),
    }


def _note(step: Step, watched: dict[str, Watched], hop_ns: int) -> None:
    """Keep what one step said, at the stream time at which it said it."""
    for window, saliencies in step.scores:
        hops = slice(window.index, window.end_ns // hop_ns)
        for saliency in saliencies:
            held = watched[saliency.query].scores[hops]
            held[np.isnan(held)] = saliency.score
    publish_s = step.time_ns / NS
    for event in step.events:
        if event.moment is None:
            continue
        moment, query = event.moment, watched[event.moment.query]
        if event.kind is Kind.OPENED:
            query.opened.append(Opened(publish_s, moment.start_ns / NS))
        elif event.kind is Kind.CLOSED and moment.end_ns is not None:
            query.closed.append(Closed(publish_s, moment.start_ns / NS, moment.end_ns / NS, moment.score))


def _find(folder: Path, vid: str) -> Path:
    for suffix in VIDEO_SUFFIXES:
        if (path := folder / f"{vid}{suffix}").is_file():
            return path
    raise InputError(f"no video for vid {vid} in {folder}: looked for {vid}{{{','.join(VIDEO_SUFFIXES)}}}")


def _mean_known(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    """Of those that are defined; None if none is."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _tables(watched: Sequence[Watched], result: dict[str, float | int | None], hop_s: float) -> list[Table]:
    rows = []
    for w in watched:
        truth, scores = w.hops(hop_s)
        threshold = result["threshold"]
        assert threshold is not None
        rows.append(
            [
                w.truth.vid,
                w.truth.query,
                f"{truth.mean():.2f}",
                f"{average_precision(truth, scores):.2f}",
                f"{frame_f1([truth], [scores], threshold).micro:.2f}",
                str(len(w.truth.windows)),
                str(len(w.opened)),
            ]
        )
    measures = [
        [name, "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)]
        for name, value in result.items()
    ]
    return [
        Table("by query", ("stream ", "query ", "prior", "frame AP", "F1", "true", "opened"), rows),
        Table("all queries", ("measure ", "value"), measures),
    ]
