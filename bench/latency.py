"""`livemoments bench latency`: glass to event on a live RTSP stream, and what each stage takes of it.

A camera on loopback, in a process of its own, serves H.264 and stamps each frame with its clock (RTCP). `livemoments
serve` watches it, its log on disk, with a WebSocket client listening. The threshold is set so low that every query
tells something at every window: the worst case for publishing.

`--compare-queries` needs no stream: windows of two sessions on the same recorded frames, which take turns.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from bench.camera import serve, street_scene
from bench.environment import environment
from bench.plots import plot_latency
from bench.service import EVERY_WINDOW, FPS, SIZE, WARM_UP_S, Listener, Served, Setup, setup_of, texts
from bench.service import add_arguments as add_service_arguments
from bench.tables import facts, show
from kernels.engine import Engine
from kernels.errors import InputError
from stream.config.schema import Limits
from stream.detector import make_query
from stream.history import History
from stream.ingest import open_source
from stream.moments import MomentOptions
from stream.one_stream import OneStream
from stream.output import check_writable, write
from stream.page.report import Latency, Report, Table, render
from stream.report import percentiles
from stream.session import Session
from stream.sources import parse_source
from stream.timings import Timings
from stream.types import Frame
from stream.window import hop_from_seconds

STAGES = ("decode", "wait", "image", "head", "publish", "delivery")
"""Capture to decoder; conversion and queues; crop and engine; all queries; making events; storing and handing out."""
REST = ("wait", "head", "publish", "delivery")
COMPARED = (10, 100)  # queries
FIRST = 10  # windows of a comparison that are left out: caches fill

Durations = dict[str, NDArray[np.int64]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_service_arguments(parser)
    parser.add_argument("--seconds", type=int, default=120, metavar="S", help="of stream to measure (default 120)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies as a histogram")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page: histogram, stages, ratios")
    parser.add_argument(
        "--compare-queries", action="store_true", help="instead: windows with 10 and with 100 queries on a recording"
    )


def run(args: argparse.Namespace) -> int:
    setup = setup_of(args)
    if args.seconds < 5:
        raise InputError(f"--seconds must be at least 5, got {args.seconds}")
    for name in ("plot", "report"):
        if getattr(args, name) and args.compare_queries:
            raise InputError(f"--{name} draws the latencies of a live stream: leave it or --compare-queries out")
        if getattr(args, name):
            check_writable(getattr(args, name))
    progress, console = Console(stderr=True, highlight=False), Console(highlight=False)
    if args.compare_queries:
        result = compare(setup, args.seconds, progress)
        show(console, [_comparison(result)])
        print(json.dumps(result | setup.describe() | {"queries": list(COMPARED)} | environment()))
        return 0
    durations, late = measure(setup, args.seconds, progress)
    result = summarise(durations, late)
    tables = _tables(result)
    show(console, tables)
    event_ms, client_ms = durations["total"] / 1e6, late[:, 1] / 1e6
    if args.plot:
        plot_latency(event_ms, client_ms, args.plot)
    print(json.dumps(result | setup.describe() | environment()))
    if args.report:
        latency = Latency("glass to event, glass to client", {"glass to event": event_ms, "glass to client": client_ms})
        made = facts(setup.describe() | environment())
        write(args.report, render(Report("latency of a live stream", made, latencies=[latency], tables=tables)))
    return 0


def measure(setup: Setup, seconds: int, console: Console) -> tuple[Durations, NDArray[np.int64]]:
    """ns that each stage took, and (n, 2) ns from capture to publish and to the client's hands, after the warm-up."""
    with ExitStack() as stack:
        video = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "camera.mp4"
        with console.status("making a 720p stream out of real clips"):
            street_scene(video, SIZE, FPS)
        url = serve(stack, video, loop=True)
        served = stack.enter_context(Served(setup, {"camera": url}, EVERY_WINDOW))
        listener = stack.enter_context(Listener(served.ws_url))
        if not served.connected():
            raise InputError(f"the camera at {url} does not answer")
        warm_s = min(WARM_UP_S, seconds)
        for second in track(range(warm_s + seconds), "measuring", console=console):
            if second == warm_s:
                served.snapshot()
                listener.take()
            time.sleep(1)
        late = listener.take()
        durations = dict(served.snapshot().durations)
    if not len(late) or not len(durations["total"]):
        raise InputError("no event came while it was measured: is the machine overloaded?")
    return durations, late


def summarise(durations: Durations, late: NDArray[np.int64]) -> dict[str, Any]:
    """Percentiles in ms; of each stage the share of the mean and the ratio to the image engine.

    `rest` is everything except the decoder and the image engine. Of it, `wait` is mostly the pixels' way.
    """
    stages = {name: float(durations[name].mean()) for name in STAGES}
    whole = sum(stages.values())
    result: dict[str, Any] = {"windows": len(durations["total"]), "events": len(late)}
    for name, values in (
        ("glass_to_event", durations["total"]),
        ("glass_to_client", late[:, 1]),
        ("event_to_stored", durations["delivery"]),
    ):
        for label, value in zip(("p50", "p95", "p99"), percentiles(values), strict=True):
            result[f"{name}_{label}_ms"] = round(value, 2)
    result["share"] = {name: round(value / whole, 3) for name, value in stages.items()}
    ratios = {name: value / stages["image"] for name, value in stages.items()}
    result["ratio_to_image_engine"] = {name: round(value, 3) for name, value in ratios.items()}
    result["rest"] = round(sum(ratios[name] for name in REST), 3)
    result["rest_without_wait"] = round(result["rest"] - ratios["wait"], 3)
    return result


def compare(setup: Setup, seconds: int, console: Console) -> dict[str, Any]:
    """Medians in ms of a window, and of all of it but the image engine, with few and with many queries."""
    hop_ns = hop_from_seconds(setup.hop_s)
    engine = Engine(setup.engine, zero_shot=setup.zero_shot)
    with ExitStack() as stack:
        video = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "recording.mp4"
        with console.status("making a 720p recording out of real clips"):
            street_scene(video, SIZE, FPS)
        source = open_source(parse_source(str(video)), hop_ns=hop_ns, pace="max")
        stack.callback(source.close)
        frames = [item for item in source if isinstance(item, Frame)]
        sessions: dict[int, Session] = {}
        for count in COMPARED:
            queries = [make_query(engine, text) for text in texts(count)]
            served = stack.enter_context(OneStream(engine, queries, zmq_port=0, ws_port=0))
            history = History(round(Limits().history_s / setup.hop_s))
            sessions[count] = Session(
                *(engine, f"with-{count}", hop_ns, MomentOptions()), recorded=True, tell=served.tell, history=history
            )
            for query in queries:
                sessions[count].add(query)
        windows: dict[int, list[int]] = {count: [] for count in COMPARED}
        for k in track(range(FIRST + round(seconds / setup.hop_s)), "measuring", console=console):
            frame = replace(frames[k % len(frames)], index=k, pts_ns=k * hop_ns + hop_ns // 2)
            for count in COMPARED if k % 2 else reversed(COMPARED):
                if k == FIRST:
                    sessions[count].timings = Timings()
                before_ns = time.monotonic_ns()
                step = sessions[count].push(frame)
                if step.scores and k >= FIRST:
                    windows[count].append(time.monotonic_ns() - before_ns)
    result: dict[str, Any] = {"windows": len(windows[COMPARED[0]])}
    medians: dict[str, list[float]] = {"rest": [], "window": []}
    for count, session in sessions.items():
        timings = session.timings
        medians["rest"].append(percentiles(timings.head.values() + timings.publish.values())[0])
        medians["window"].append(percentiles(windows[count])[0])
        result[f"image_{count}_queries_ms"] = round(percentiles(timings.image.values())[0], 3)
    for name, (few, many) in medians.items():
        result |= {f"{name}_{count}_queries_ms": round(ms, 3) for count, ms in zip(COMPARED, (few, many), strict=True)}
        result[f"{name}_ratio"] = round(many / few, 3)
    return result


def _tables(result: dict[str, Any]) -> list[Table]:
    names = ("glass_to_event", "event_to_stored", "glass_to_client")
    late = [
        [name.replace("_", " "), *(f"{result[f'{name}_{p}_ms']:.1f} ms" for p in ("p50", "p95", "p99"))]
        for name in names
    ]
    ratios = result["ratio_to_image_engine"]
    stages = [[name, f"{share:.1%}", f"{ratios[name]:.2f}"] for name, share in result["share"].items()]
    stages.append([f"rest: {', '.join(REST)}", "", f"{result['rest']:.2f}"])
    stages.append(["rest without wait", "", f"{result['rest_without_wait']:.2f}"])
    return [
        Table(f"{result['windows']} windows, {result['events']} events", (" ", "p50", "p95", "p99"), late),
        Table("stages", ("stage ", "share of the mean", "image engine = 1"), stages),
    ]


def _comparison(result: dict[str, Any]) -> Table:
    rows = []
    for name, title in (("rest", "all but the image engine"), ("window", "whole window, decoder left out")):
        times = (f"{result[f'{name}_{count}_queries_ms']:.2f} ms" for count in COMPARED)
        rows.append([title, *times, f"{result[f'{name}_ratio']:.2f}"])
    columns = (" ", *(f"{count} queries" for count in COMPARED), "ratio")
    return Table(f"medians of {result['windows']} windows", columns, rows)
