"""`livemoments bench latency`: glass to event on a live RTSP stream, and what each stage takes of it.

A camera on loopback, in a process of its own, serves H.264 and stamps each frame with its clock (RTCP). The rest is the
code of `livemoments run --publish`, with a WebSocket client listening. The threshold is set so low that every query
tells something at every window: the worst case for publishing.
"""

import argparse
import json
import tempfile
import threading
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.camera import serve, street_scene
from bench.environment import environment
from bench.plots import plot_latency
from kernels.bundle import EMBEDDED
from kernels.engine import Engine
from kernels.errors import InputError
from stream.detector import make_query
from stream.ingest import open_source
from stream.moments import MomentOptions
from stream.output import check_writable
from stream.publish import Sockets
from stream.report import percentiles
from stream.run import play
from stream.session import Session, Timings
from stream.sources import parse_source
from stream.types import NS
from stream.websocket import Client
from stream.window import hop_from_seconds

QUERIES = (
    "a cartoon rabbit on a meadow",
    "cars in a city street",
    "a bicycle leaning on a fence",
    "a person enters the room",
    "a goal is scored",
    "a dog runs along the beach",
    "a man in a suit and a bow tie",
    "a train arrives at the station",
)
WARM_UP_S = 10  # the camera's clock comes with its first RTCP report; caches fill; all of it is left out
SIZE, FPS = (1280, 720), 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=int, default=120, help="how long to measure (default 120)")
    parser.add_argument("--hop", type=float, default=1.0, metavar="S", help="seconds between windows (default 1)")
    parser.add_argument("--engine", type=Path, default=EMBEDDED, metavar="DIR", help="engine bundle (default: lite)")
    parser.add_argument("--zero-shot", action="store_true", help="leave the engine's trained head out, at any --hop")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies as a histogram")


def run(args: argparse.Namespace) -> int:
    hop_ns = hop_from_seconds(args.hop)
    if args.seconds < 5:
        raise InputError(f"--seconds must be at least 5, got {args.seconds}")
    if args.plot:
        check_writable(args.plot)
    engine, console = Engine(args.engine, zero_shot=args.zero_shot), Console(stderr=True, highlight=False)
    timings, delivered = measure(engine, hop_ns, args.seconds, console)
    result = summarise(timings, delivered)
    _print(Console(highlight=False), result)
    if args.plot:
        plot_latency(timings.total.values() / 1e6, np.asarray(delivered) / 1e6, args.plot)
    print(
        json.dumps(
            result
            | {"queries": len(QUERIES), "size": list(SIZE), "hop_s": args.hop, "zero_shot": engine.head is None}
            | environment()
        )
    )
    return 0


def measure(engine: Engine, hop_ns: int, seconds: int, console: Console) -> tuple[Timings, list[int]]:
    """Stage timings of the windows after the warm-up, and the ns from capture to the client's hands of every event."""
    queries = [make_query(engine, text) for text in QUERIES]
    options = MomentOptions(threshold=1e-9, hysteresis=0.0, update_s=0.0)
    delivered: list[int] = []
    with ExitStack() as stack:
        video = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "camera.mp4"
        with console.status("making a 720p stream out of real clips"):
            street_scene(video, SIZE, FPS)
        url = serve(stack, video, loop=True)
        sockets = stack.enter_context(Sockets(0, 0, engine, queries))
        source = open_source(parse_source(url), hop_ns=hop_ns)
        stack.callback(source.close)
        session = Session(engine, source.name, hop_ns, options, recorded=False, tell=sockets.tell)
        for query in queries:
            session.add(query)
        client = threading.Thread(target=_listen, args=(sockets.ws_port, delivered), daemon=True)
        client.start()
        steps = play(source, session, until_ns=(WARM_UP_S + seconds) * NS)
        total = round((WARM_UP_S + seconds) * NS / hop_ns)
        warm = False
        for step in track(steps, "measuring", total=total, console=console):
            if step is not None and step.time_ns >= WARM_UP_S * NS and not warm:
                warm, session.timings = True, Timings()
                delivered.clear()
    client.join()
    return session.timings, delivered


def summarise(timings: Timings, delivered: list[int]) -> dict[str, Any]:
    """Percentiles in ms; the share of the mean and the ratio to the image engine of each stage."""
    stages = {
        name: float(getattr(timings, name).values().mean()) for name in ("decode", "wait", "image", "head", "publish")
    }
    whole = sum(stages.values())
    result: dict[str, Any] = {"windows": len(timings.total), "events": len(delivered)}
    for name, values in (("glass_to_event", timings.total.values()), ("glass_to_client", delivered)):
        for label, value in zip(("p50", "p95", "p99"), percentiles(values), strict=True):
            result[f"{name}_{label}_ms"] = round(value, 2)
    result["share"] = {name: round(value / whole, 3) for name, value in stages.items()}
    result["ratio_to_image_engine"] = {name: round(value / stages["image"], 3) for name, value in stages.items()}
    return result


def _listen(port: int, delivered: list[int]) -> None:
    with Client(f"ws://127.0.0.1:{port}") as client:
        client.send({"op": "subscribe", "query": "*", "stream": "*"})
        while True:
            try:
                payload = client.receive(1.0)
            except ConnectionError:
                return  # the detector has closed: the measurement is over
            arrived_ns = time.time_ns()
            message = json.loads(payload or b"{}")
            if (late_ms := message.get("data", {}).get("capture_to_publish_ms")) is None:
                continue
            published = datetime.fromisoformat(message["time"]).timestamp()
            delivered.append(arrived_ns - int(published * NS) + int(late_ms * 1e6))


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['windows']} windows, {result['events']} events", title_justify="left")
    for column in ("", "p50", "p95", "p99"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("glass_to_event", "glass_to_client"):
        table.add_row(name.replace("_", " "), *(f"{result[f'{name}_{p}_ms']:.1f} ms" for p in ("p50", "p95", "p99")))
    console.print(table)
    stages = Table(title="stages", title_justify="left")
    for column in ("stage", "share of the mean", "image engine = 1"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for name, share in result["share"].items():
        stages.add_row(name, f"{share:.1%}", f"{result['ratio_to_image_engine'][name]:.2f}")
    console.print(stages)
