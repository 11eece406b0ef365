"""`livemoments run`: one source to its end, moments as they come."""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

from kernels.bundle import EMBEDDED
from kernels.engine import Engine
from kernels.errors import InputError, LivemomentsError, SourceError
from stream.detector import make_query
from stream.ingest import VideoSource, open_source
from stream.moments import MomentOptions
from stream.one_stream import OneStream
from stream.output import check_writable, write
from stream.page.collector import Collector
from stream.page.report import Report, render, stages
from stream.predictions import Predictions, to_jsonl
from stream.report import Terminal, clock, print_event, print_summary, progress_bar
from stream.session import Session, Step
from stream.sources import SourceStatus, parse_source
from stream.types import NS, Event, Kind
from stream.window import hop_from_seconds

POLL_S = 0.2  # how soon Ctrl-C, --for and new subscriptions are noticed on a silent source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file, http(s)://, HLS, rtsp(s)://, rtmp://, srt://, udp:// (MPEG-TS), /dev/videoN, test:[PATTERN], "
        "or a gst-launch description that ends in raw video",
    )
    parser.add_argument(
        "-q", "--query", action="append", default=[], metavar="TEXT", help="what to wait for; may be repeated"
    )
    parser.add_argument("--engine", type=Path, default=EMBEDDED, metavar="DIR", help="engine bundle (default: lite)")
    parser.add_argument("--zero-shot", action="store_true", help="leave the engine's trained head out, at any --hop")
    parser.add_argument("--hop", type=float, default=1.0, metavar="S", help="seconds between windows (default 1)")
    parser.add_argument(
        "--threshold", type=float, default=MomentOptions.threshold, metavar="P", help="score that opens a moment"
    )
    parser.add_argument(
        "--pace",
        choices=("real", "max"),
        default="max",
        help="recordings: as they were filmed, or as fast as it goes (default); the events are the same",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the stream (default: made from SOURCE)")
    parser.add_argument("--publish", action="store_true", help="publish on ZeroMQ and WebSocket too")
    parser.add_argument("--zmq-port", type=int, default=5555, metavar="PORT", help="ZeroMQ PUB (default 5555)")
    parser.add_argument("--ws-port", type=int, default=8765, metavar="PORT", help="WebSocket (default 8765)")
    parser.add_argument("--out", metavar="FILE|-", help="write moments and saliency as QVHighlights jsonl")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="write a page of curves, moments with pictures and latencies"
    )
    parser.add_argument("--for", dest="seconds", type=float, metavar="SECONDS", help="stop after this much stream time")


def play(video: VideoSource, session: Session, *, until_ns: int | None = None) -> Iterator[Step | None]:
    """Drive a session with a source until it ends: what each frame led to, or None where something else happened.

    The first is a None, before the first frame, and there is one at least every POLL_S. It ends at `until_ns` of
    stream time, which goes on while a live source is silent.
    """
    now_ns, heard_ns = 0, time.monotonic_ns()
    while not video.ended:
        item = video.read(POLL_S)
        if isinstance(item, SourceStatus):
            details = {"reason": item.reason, "retry_s": item.retry_s}
            session.status(item.state, **{key: value for key, value in details.items() if value is not None})
            yield session.interrupt() if item.state == "reconnecting" else None
        elif item is None:
            silent_ns = time.monotonic_ns() - heard_ns if video.live else 0
            if until_ns is not None and now_ns + silent_ns >= until_ns:
                return
            yield None
        elif until_ns is not None and item.pts_ns >= until_ns:
            return
        else:
            now_ns, heard_ns = item.pts_ns, time.monotonic_ns()
            yield session.push(item)


def run(args: argparse.Namespace) -> int:
    options = MomentOptions(threshold=args.threshold)
    hop_ns = hop_from_seconds(args.hop)
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise InputError(f"--for must be a number of seconds above 0, got {args.seconds:g}")
    until_ns = None if args.seconds is None else int(args.seconds * NS)
    if not args.query and not args.publish:
        raise InputError("nothing to wait for: give a -q TEXT, or --publish, so that queries can come by WebSocket")
    source = parse_source(args.source)
    out = Path(args.out) if args.out and args.out != "-" else None
    for path in filter(None, (out, args.report)):
        check_writable(path, source=source.path)
    if out and out == args.report:
        raise InputError(f"--out and --report cannot both be {out}")
    engine = Engine(args.engine, zero_shot=args.zero_shot)
    queries = list({query.id: query for query in (make_query(engine, text) for text in args.query)}.values())
    # Results on stdout leave stderr to the people.
    console = Terminal(stderr=args.out == "-", highlight=False)

    with contextlib.ExitStack() as stack:
        served: OneStream | None = None
        if args.publish:
            served = stack.enter_context(OneStream(engine, queries, zmq_port=args.zmq_port, ws_port=args.ws_port))
        video = open_source(source, hop_ns=hop_ns, pace=args.pace, name=args.name)
        stack.callback(video.close)
        closed = 0

        def tell(event: Event) -> None:
            nonlocal closed
            closed += event.kind is Kind.CLOSED
            print_event(console, event)
            if served:
                if event.status:
                    served.state = SourceStatus(event.status["state"], event.status.get("reason"))
                served.tell(event)

        session = Session(engine, video.name, hop_ns, options, recorded=not video.live, tell=tell)
        for query in queries:
            session.add(query)
        predictions = Predictions(video.name, queries) if args.out else None
        collector = Collector(session, recorded=not video.live) if args.report else None
        started_ns, stream_ns, exit_code = time.monotonic_ns(), 0, 0
        problem: LivemomentsError | None = None
        with progress_bar(console, video) as progress:
            try:
                for step in play(video, session, until_ns=until_ns):
                    if served:
                        served.apply(session)
                    if step is not None:
                        stream_ns = step.time_ns
                        progress.update(progress.task_ids[0], completed=stream_ns / NS)
                        if predictions:
                            predictions.add(step)
                        if collector:
                            collector.add(step)
            except KeyboardInterrupt:
                exit_code = 130
            except SourceError as error:
                problem = error  # what was found until then is not lost for it
        last = session.drain()
        wall_ns = time.monotonic_ns() - started_ns
        print_summary(console, video, session.timings, stream_ns=stream_ns, wall_ns=wall_ns, moments=closed)
        if predictions:
            predictions.add(last)
            write(out, to_jsonl(predictions.rows(range(1, len(queries) + 1))))
        if collector:
            collector.add(last)
            try:
                write(args.report, render(_report(engine, video, session, collector, stream_ns, wall_ns)))
            except InputError as error:
                problem = problem or error
    if problem:
        raise problem
    return exit_code


def _report(
    engine: Engine, video: VideoSource, session: Session, collector: Collector, stream_ns: int, wall_ns: int
) -> Report:
    facts = {
        "stream": f"{clock(stream_ns)}, {'live' if video.live else 'recorded'}",
        "engine": f"{engine.manifest.model}{'' if engine.head else ', zero-shot'}",
        "hop": f"{session.hop_ns / NS:g} s",
        "threshold": f"{session.options.threshold:g}",
        "frames": f"{video.decoded} decoded, {video.taken - video.dropped} looked at, {video.dropped} dropped",
        "real-time factor": f"{stream_ns / max(wall_ns, 1):.1f}",
    }
    if video.live:
        facts["reconnected"] = f"{video.reconnects} times"
    latencies, tables = stages(session.timings, live=video.live)
    length_s = (video.duration_ns or 0) / NS
    return Report(video.name, facts, [collector.recording(length_s)], latencies=latencies, tables=tables)
