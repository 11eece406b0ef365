"""`livemoments bench backfill`: how long a new query takes to be answered for the past.

A session keeps as many windows as a service does by default, of real clips; new queries, one and many, go through all
of them, by the very code of the service. Nothing else runs meanwhile: beside a live stream it goes on in slices.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.camera import street_scene
from bench.environment import environment
from bench.service import FPS, SIZE, Setup, setup_of, texts
from bench.service import add_arguments as add_service_arguments
from kernels.engine import Engine
from kernels.errors import InputError
from stream.config.schema import Limits
from stream.detector import make_query
from stream.history import History
from stream.ingest import open_source
from stream.moments import MomentOptions
from stream.session import Session
from stream.sources import parse_source
from stream.types import NS, Frame
from stream.window import hop_from_seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_service_arguments(parser, queries=16)
    history_s = Limits().history_s
    parser.add_argument(
        "--seconds", type=float, default=history_s, metavar="S", help=f"of the past (default {history_s:g})"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median counts (default 5)")


def run(args: argparse.Namespace) -> int:
    setup = setup_of(args)
    if not 10 <= args.seconds <= 86_400:
        raise InputError(f"--seconds must be from 10 to 86400, got {args.seconds:g}")
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {args.rounds}")
    result = measure(setup, args.seconds, args.rounds, Console(stderr=True, highlight=False))
    table = Table(title=f"{result['windows']} windows of the past", title_justify="left")
    for column in ("new queries", "from asking to answered"):
        table.add_column(column, justify="right")
    for count, ms in result["answered_ms"].items():
        table.add_row(count, f"{ms:.0f} ms")
    Console(highlight=False).print(table)
    print(json.dumps(result | setup.describe() | environment()))
    return 0


def measure(setup: Setup, seconds: float, rounds: int, console: Console) -> dict[str, Any]:
    """Medians in ms, encoding of the texts included, by the number of queries that come together."""
    hop_ns = hop_from_seconds(setup.hop_s)
    engine = Engine(setup.engine, zero_shot=setup.zero_shot)
    windows = int(seconds * NS) // hop_ns
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "recording.mp4"
        with console.status("making a recording out of real clips"):
            street_scene(video, SIZE, FPS)
        with closing(open_source(parse_source(str(video)), hop_ns=hop_ns, pace="max")) as source:
            frames = [item for item in source if isinstance(item, Frame)]
    session = Session(engine, "past", hop_ns, MomentOptions(), recorded=True, history=History(windows))
    for k in track(range(windows + 1), "looking at the past", console=console):
        session.push(replace(frames[k % len(frames)], index=k, pts_ns=k * hop_ns + hop_ns // 2))
    answered: dict[str, float] = {}
    for count in sorted({1, len(setup.queries)}):
        took_ms = []
        for turn in range(rounds):
            begin_ns = time.monotonic_ns()
            queries = [make_query(engine, f"{text}, time {turn + 1}") for text in texts(count)]
            backfill = session.backfill(queries)
            while not backfill.advance(begin_ns):
                pass
            session.adopt(backfill)
            took_ms.append((time.monotonic_ns() - begin_ns) / 1e6)
            for query in queries:
                session.remove(query.id)
        answered[str(count)] = round(statistics.median(took_ms), 1)
    return {"windows": windows, "answered_ms": answered}
