"""`livemoments bench soak`: the memory of a detector that watches a live stream for long.

A camera on loopback plays real clips for ever; `livemoments run --publish` watches it with 8 queries in a process of
its own, whose resident memory is read every 5 seconds.
"""

import argparse
import json
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from bench.camera import serve, start, street_scene
from bench.environment import environment, resident_mb
from bench.latency import QUERIES
from kernels.errors import InputError

EVERY_S = 5
WARM_UP = 0.2  # share of the time after which memory must stay where it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30, help="how long (default 30)")


def run(args: argparse.Namespace) -> int:
    if not 0.5 <= args.minutes < 1e6:
        raise InputError(f"--minutes must be at least 0.5, got {args.minutes:g}")
    samples = measure(args.minutes * 60, Console(stderr=True, highlight=False))
    result = summarise(samples)
    Console(highlight=False).print(
        f"{result['minutes']:.1f} minutes: {result['rss_after_warm_up_mb']:.1f} MB after the warm-up, "
        f"{result['rss_at_end_mb']:.1f} MB at the end ({result['growth']:+.2%})"
    )
    print(json.dumps(result | environment()))
    return 0


def measure(seconds: float, console: Console) -> list[float]:
    """Resident memory of the detector in MB, every EVERY_S."""
    with ExitStack() as stack:
        video = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "camera.mp4"
        with console.status("making a stream out of real clips"):
            street_scene(video, (1280, 720), 25)
        url = serve(stack, video, loop=True)
        words = [part for text in QUERIES for part in ("-q", text)]
        ports = ["--publish", "--ws-port", "0", "--zmq-port", "0"]
        detector = start(stack, "livemoments", "run", url, *words, *ports, stdout=subprocess.DEVNULL)
        samples = []
        for _ in track(range(round(seconds / EVERY_S)), "watching", console=console):
            time.sleep(EVERY_S)
            if detector.poll() is not None:
                raise InputError(f"the detector ended by itself with exit code {detector.returncode}")
            samples.append(resident_mb(detector.pid))
    return samples


def summarise(samples: list[float]) -> dict[str, Any]:
    """Growth from the minute after the warm-up to the last minute, medians of both."""
    minute = max(1, 60 // EVERY_S)
    warm = round(len(samples) * WARM_UP)
    first, last = float(np.median(samples[warm : warm + minute])), float(np.median(samples[-minute:]))
    return {
        "minutes": len(samples) * EVERY_S / 60,
        "rss_after_warm_up_mb": round(first, 2),
        "rss_at_end_mb": round(last, 2),
        "rss_highest_mb": round(max(samples), 2),
        "growth": round(last / first - 1, 5),
        "rss_by_minute_mb": [round(value, 2) for value in samples[minute - 1 :: minute]],
    }
