"""`livemoments bench page`: what clips and the page cost the events.

The same camera is watched again and again, in turn without and with both: clips of every moment, and clients of the
page in a process of their own that read all a browser would. Each turn is a service of its own. Moments open and close
as they do in `bench soak`, and are told at every window.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.camera import serve, start
from bench.environment import environment
from bench.service import WARM_UP_S, Listener, Served, Setup, setup_of
from bench.service import add_arguments as add_service_arguments
from bench.soak import MOMENTS, scene
from kernels.errors import InputError
from stream.report import percentiles

TURNS = ("without", "with")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_service_arguments(parser)
    parser.add_argument("--seconds", type=int, default=120, metavar="S", help="of stream in each turn (default 120)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="turns of either kind (default 2)")
    parser.add_argument("--clients", type=int, default=5, metavar="N", help="of the page (default 5)")


def run(args: argparse.Namespace) -> int:
    setup = setup_of(args)
    for name, least in (("seconds", 3), ("rounds", 1), ("clients", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    turns = measure(setup, args.seconds, args.rounds, args.clients, Console(stderr=True, highlight=False))
    result = summarise(turns)
    _print(Console(highlight=False), result, args.clients)
    print(json.dumps(result | {"clients": args.clients, "seconds": args.seconds} | setup.describe() | environment()))
    return 0


def measure(setup: Setup, seconds: int, rounds: int, clients: int, console: Console) -> list[dict[str, Any]]:
    """One after the other, without and with."""
    turns = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with console.status("making a stream out of real clips"):
            scene(0, folder / "camera.mp4")
        url = serve(stack, folder / "camera.mp4", loop=True)
        plan = [kind for _ in range(rounds) for kind in TURNS]
        warm_s = min(WARM_UP_S, seconds)
        progress = iter(track(range(len(plan) * (warm_s + seconds)), "measuring", console=console))
        for turn, kind in enumerate(plan):
            clips = folder / f"clips-{turn}" if kind == "with" else None
            with ExitStack() as inner:
                served = inner.enter_context(Served(setup, {"camera": url}, MOMENTS, clips=clips))
                listener = inner.enter_context(Listener(served.ws_url))
                if not served.connected():
                    raise InputError(f"the camera at {url} does not answer")
                if clips:
                    viewers = start(
                        inner,
                        "bench.viewers",
                        served.page_url,
                        str(clients),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                    assert viewers.stdout is not None
                    viewers.stdout.readline()
                for second in range(warm_s + seconds):
                    if second == warm_s:
                        listener.take()
                    next(progress)
                    time.sleep(1)
                late = listener.take()
                if not len(late):
                    raise InputError("no event came while it was measured: is the machine overloaded?")
                p50, p95, _ = percentiles(late[:, 0])
                turns.append({"kind": kind, "events": len(late), "p50_ms": round(p50, 2), "p95_ms": round(p95, 2)})
            if clips:  # those of moments that were open are whole now
                files = list(clips.glob("*.mp4"))
                turns[-1] |= {"clips": len(files), "clips_mb": round(sum(f.stat().st_size for f in files) / 1e6, 2)}
    return turns


def summarise(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of the p95 of either kind, and their ratio."""
    p95 = {kind: statistics.median(turn["p95_ms"] for turn in turns if turn["kind"] == kind) for kind in TURNS}
    return {
        "turns": turns,
        **{f"p95_{kind}_ms": round(value, 2) for kind, value in p95.items()},
        "ratio": round(p95["with"] / p95["without"], 3),
    }


def _print(console: Console, result: dict[str, Any], clients: int) -> None:
    table = Table(title="glass to event", title_justify="left")
    for column in ("turn", "p50", "p95", "events", "clips"):
        table.add_column(column, justify="left" if column == "turn" else "right")
    for turn in result["turns"]:
        times = (f"{turn[name]:.1f} ms" for name in ("p50_ms", "p95_ms"))
        table.add_row(f"{turn['kind']} page and clips", *times, str(turn["events"]), str(turn.get("clips", "")))
    console.print(table)
    console.print(
        f"with clips and {clients} clients of the page the p95 is {result['ratio']:.2f} times as long "
        f"(medians of {result['p95_without_ms']:.1f} and {result['p95_with_ms']:.1f} ms)",
        soft_wrap=True,
    )
