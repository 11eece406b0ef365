"""`livemoments bench soak`: a service that watches live streams for long: its memory, its latency, what it loses.

Cameras on loopback, each in a process of its own, play real clips for ever, in turn with an empty room, so that moments
open and close all the time. `livemoments serve` watches them in a process of its own; its log is so small that old
events go after some minutes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from bench.camera import clips_folder, serve
from bench.environment import environment, resident_mb
from bench.plots import plot_soak
from bench.service import FPS, SIZE, Listener, Served, Setup, Spent, between, setup_of
from bench.service import add_arguments as add_service_arguments
from kernels.errors import InputError
from stream.output import check_writable
from stream.report import percentiles
from trainer.render import Kind, Segment, render

EVERY_S = 2
SETTLED_S = 15 * 60  # the past that is kept for new queries, 10 minutes, has filled by then
MOMENTS = {"threshold": 0.3, "update_s": 0.0}  # an open moment is told at every window
LOG_MB = 8
CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")
CLIP_S, ROOM_S = 10, 5


@dataclass(frozen=True)
class Watched:
    """What was noted every EVERY_S."""

    rss_mb: list[float]
    late: list[NDArray[np.int64]]  # (n, 2) ns from capture to publish and to the client, of the events since the last
    spent: Spent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_service_arguments(parser, queries=16)
    parser.add_argument("--streams", type=int, default=4, metavar="N", help="live streams (default 4)")
    parser.add_argument("--minutes", type=float, default=60, metavar="M", help="how long (default 60)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and latency over time")


def run(args: argparse.Namespace) -> int:
    setup = setup_of(args)
    if not 0.1 <= args.minutes < 1e6:
        raise InputError(f"--minutes must be at least 0.1, got {args.minutes:g}")
    if not 1 <= args.streams <= 64:
        raise InputError(f"--streams must be from 1 to 64, got {args.streams}")
    if args.plot:
        check_writable(args.plot)
    watched = measure(setup, args.streams, args.minutes * 60, Console(stderr=True, highlight=False))
    result = summarise(watched)
    Console(highlight=False).print(_words(result, args.streams), soft_wrap=True)
    if args.plot:
        minutes = np.arange(1, len(watched.rss_mb) + 1) * EVERY_S / 60
        p95 = result["glass_to_client_p95_by_minute_ms"]
        told = np.array([np.nan if value is None else value for value in p95], np.float64)
        plot_soak(minutes, np.array(watched.rss_mb), np.arange(1, len(told) + 1, dtype=np.float64), told, args.plot)
    print(json.dumps(result | {"streams": args.streams} | setup.describe() | environment()))
    return 0


def measure(setup: Setup, streams: int, seconds: float, console: Console) -> Watched:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sources = {}
        for i in track(range(streams), "making streams out of real clips", console=console, transient=True):
            scene(i, folder / f"{i}.mp4")
            sources[f"camera-{i + 1}"] = serve(stack, folder / f"{i}.mp4", loop=True)
        served = stack.enter_context(Served(setup, sources, MOMENTS, log_mb=LOG_MB))
        listener = stack.enter_context(Listener(served.ws_url))
        if not served.connected():
            raise InputError("not every camera answers: is the machine overloaded?")
        begin, begin_s = served.snapshot(), time.monotonic()
        rss_mb, late = [], []
        for k in track(range(1, max(2, round(seconds / EVERY_S)) + 1), "watching", console=console):
            time.sleep(max(0.0, begin_s + k * EVERY_S - time.monotonic()))
            served.check()
            rss_mb.append(resident_mb(served.process.pid))
            late.append(listener.take())
        return Watched(rss_mb, late, between(begin, served.snapshot()))


def summarise(watched: Watched) -> dict[str, Any]:
    """Memory at the end against memory after 15 minutes, or a quarter of the time if that is shorter; medians."""
    rss, spent = watched.rss_mb, watched.spent
    minute = 60 // EVERY_S
    settled = min(SETTLED_S // EVERY_S, len(rss) // 4)
    some = max(1, min(minute, len(rss) // 4))
    first, last = float(np.median(rss[settled : settled + some])), float(np.median(rss[-some:]))
    late = np.concatenate(watched.late)
    result: dict[str, Any] = {
        "minutes": round(len(rss) * EVERY_S / 60, 2),
        "settled_minutes": round(settled * EVERY_S / 60, 2),
        "rss_settled_mb": round(first, 2),
        "rss_at_end_mb": round(last, 2),
        "rss_highest_mb": round(max(rss), 2),
        "growth": round(last / first - 1, 5),
        "rss_by_minute_mb": [round(value, 2) for value in rss[minute - 1 :: minute]],
        "events": len(late),
    }
    for column, name in enumerate(("glass_to_event", "glass_to_client")):
        for label, value in zip(("p50", "p95"), _percentiles([late[:, column]]), strict=True):
            result[f"{name}_{label}_ms"] = value
    minutes = [[each[:, 1] for each in watched.late[at : at + minute]] for at in range(0, len(rss), minute)]
    result["glass_to_client_p95_by_minute_ms"] = [_percentiles(each)[1] for each in minutes]
    counts = {name: getattr(spent, name) for name in ("decoded", "dropped", "reconnects")}
    result |= counts | {"lost": round(spent.lost, 5)}
    result["cpu"] = {name: round(value, 4) for name, value in spent.cores.items()}
    result |= {f"cpu_{name}": round(getattr(spent, name), 3) for name in ("service", "cameras", "bench", "others")}
    return result


def _percentiles(late_ns: Sequence[NDArray[np.int64]]) -> list[float | None]:
    """p50 and p95 in ms, None where no event came."""
    values = np.concatenate(late_ns)
    return [round(value, 2) for value in percentiles(values)[:2]] if len(values) else [None, None]


def scene(number: int, path: Path) -> None:
    """A clip of its own, and more of the others the more streams there are; then an empty room."""
    names = [CLIPS[(number + k) % len(CLIPS)] for k in range(1 + number // len(CLIPS))]
    clips = [Segment(Kind.CLIP, CLIP_S * FPS, clips_folder() / f"{name}.mp4") for name in names]
    render([*clips, Segment(Kind.ROOM, ROOM_S * FPS, seed=number)], path, SIZE, FPS)


def _words(result: dict[str, Any], streams: int) -> str:
    late = result["glass_to_client_p95_ms"]
    return (
        f"{result['minutes']:.1f} minutes of {streams} streams: {result['rss_settled_mb']:.1f} MB after "
        f"{result['settled_minutes']:.1f} minutes, {result['rss_at_end_mb']:.1f} MB at the end "
        f"({result['growth']:+.2%}); {result['events']} events, glass to client p95 "
        f"{'unknown' if late is None else f'{late:.0f} ms'}; {result['dropped']} frames dropped of "
        f"{result['decoded']} decoded, {result['reconnects']} reconnects; {result['cpu_service']:.2f} processors busy"
    )
