"""`livemoments bench capacity`: how many live 720p streams, each with its queries, one machine bears.

A number of streams is borne while 95% of the events reach a client within two hops of their capture, and at most 1% of
the frames are lost. Cameras on loopback, in processes of their own, serve H.264 (each to a few streams, which decode
for themselves); `livemoments serve` watches them, its log on disk. All streams begin at once, so that their windows
fall together, and every query tells something at every window: the worst case.

The cameras and the client work on the same processors as the service; what they take is told beside it.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.camera import serve, street_scene
from bench.environment import environment
from bench.plots import plot_capacity
from bench.service import (
    EVERY_WINDOW,
    FPS,
    SIZE,
    WARM_UP_S,
    Listener,
    Served,
    Setup,
    between,
    cores,
    setup_of,
)
from bench.service import (
    add_arguments as add_service_arguments,
)
from kernels.errors import InputError
from stream.output import check_writable
from stream.report import percentiles

HOPS, LOST = 2, 0.01
"""What is borne: so many hops until 95% of the events have come, such a share of the frames lost."""
STREAMS_PER_CAMERA = 4
BEGIN_S = 5  # what starting and ending a service takes, for the time left
FULL = 0.9
"""Share of a processor from which on whatever must run on it is what limits."""
STAGES = {
    "decode": "decoding",  # network, decoder, colour conversion
    "image": "the image engine",
    "head": "the head",
    "engine": "the rest of the engine's thread",  # windows, moments, events
    "delivery": "storing and telling events",
    "other": "the rest of the service",
}

Step = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_service_arguments(parser)
    parser.add_argument("--seconds", type=int, default=30, metavar="S", help="how long to measure a step (default 30)")
    parser.add_argument("--most", type=int, default=32, metavar="N", help="try no more streams than this (default 32)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latency over the number of streams")


def run(args: argparse.Namespace) -> int:
    setup = setup_of(args)
    if args.seconds < 3:
        raise InputError(f"--seconds must be at least 3, got {args.seconds}")
    if not 1 <= args.most <= 1000:
        raise InputError(f"--most must be from 1 to 1000, got {args.most}")
    if args.plot:
        check_writable(args.plot)
    steps = measure(setup, args.seconds, args.most, Console(stderr=True, highlight=False))
    capacity = max((step["streams"] for step in steps if step["borne"]), default=0)
    limit = bottleneck(steps)
    console = Console(highlight=False)
    for each in tables(steps):
        console.print(each)
    console.print(f"{capacity} streams with {len(setup.queries)} queries each are borne. {limit}", soft_wrap=True)
    if args.plot:
        plot_capacity(
            [step["streams"] for step in steps],
            [step["glass_to_client_p95_ms"] for step in steps],
            HOPS * setup.hop_s * 1e3,
            args.plot,
        )
    result = {"capacity": capacity, "next_bottleneck": limit, "seconds": args.seconds, "steps": steps}
    print(json.dumps(result | setup.describe() | environment()))
    return 0


def measure(setup: Setup, seconds: int, most: int, console: Console) -> list[Step]:
    """Every number of streams that was tried, in order of their number."""
    with ExitStack() as stack:
        video = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "camera.mp4"
        with console.status("making a 720p stream out of real clips"):
            street_scene(video, SIZE, FPS)
        cameras: list[str] = []
        warm_s = min(WARM_UP_S, seconds)
        step_s = BEGIN_S + warm_s + seconds
        bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), TextColumn("left, at most"), TimeRemainingColumn()),
            console=console,
            transient=True,
        )
        stack.enter_context(bar)
        task = bar.add_task("starting", total=longest(0, None, most) * step_s)

        def attempt(streams: int) -> Step:
            bar.update(task, description=f"{streams} streams")
            while len(cameras) * STREAMS_PER_CAMERA < streams:
                cameras.append(serve(stack, video, loop=True))
            urls = {f"camera-{i + 1}": cameras[i // STREAMS_PER_CAMERA] for i in range(streams)}
            begin_s = time.monotonic()
            step = _attempt(setup, urls, warm_s, seconds, lambda: bar.advance(task, 1.0))
            bar.update(task, completed=bar.tasks[task].completed + time.monotonic() - begin_s - warm_s - seconds)
            console.print(_line(step), soft_wrap=True)
            return step

        def left(steps: int) -> None:
            bar.update(task, total=bar.tasks[task].completed + steps * step_s)

        return search(attempt, most, left)


def search(attempt: Callable[[int], Step], most: int, left: Callable[[int], None] = lambda steps: None) -> list[Step]:
    """Doubling until a number is not borne or `most` is, then bisection; `left` hears how many steps may follow."""
    steps: dict[int, Step] = {}
    good, bad, streams = 0, None, 1
    while streams not in steps:
        left(longest(good, bad, most))
        steps[streams] = attempt(streams)
        if steps[streams]["borne"]:
            good = streams
        else:
            bad = streams
        streams = min(2 * good, most) if bad is None else (good + bad) // 2 or 1
    return [steps[number] for number in sorted(steps)]


def longest(good: int, bad: int | None, most: int) -> int:
    """How many steps a search may still take."""
    if bad is not None:
        return math.ceil(math.log2(bad - good))
    steps, below = 1, good
    while (tried := min(max(1, 2 * below), most)) < most:
        steps, below = steps + 1, tried
    return steps + math.ceil(math.log2(max(1, most - below)))


def _attempt(setup: Setup, urls: dict[str, str], warm_s: int, seconds: int, second: Callable[[], None]) -> Step:
    """Watch so many streams; `second` is called each second."""
    with Served(setup, urls, EVERY_WINDOW) as served, Listener(served.ws_url) as listener:
        connected = served.connected()
        _sleep(warm_s, second)
        begin = served.snapshot()
        listener.take()
        _sleep(seconds, second)
        late, end = listener.take(), served.snapshot()
    spent = between(begin, end)
    told, heard = (percentiles(late[:, column]) for column in (0, 1))
    problems = []
    if not connected:
        problems.append("not every stream connected")
    if not len(late):
        problems.append("no event came")
    elif heard[1] > HOPS * setup.hop_s * 1e3:
        problems.append(f"p95 is above {HOPS} hops")
    if spent.lost > LOST:
        problems.append(f"{spent.lost:.1%} of the frames are lost")
    return {
        "streams": len(urls),
        "borne": not problems,
        "problems": problems,
        "events": len(late),
        **{
            f"glass_to_{name}_{label}_ms": round(value, 1) if len(late) else None
            for name, values in (("event", told), ("client", heard))
            for label, value in zip(("p50", "p95"), values[:2], strict=True)
        },
        "decoded": spent.decoded,
        "dropped": spent.dropped,
        "lost": round(spent.lost, 4),
        "reconnects": spent.reconnects,
        "cores": cores(),
        "cpu": {name: round(value, 3) for name, value in spent.cores.items()},
        "cpu_engine_thread": round(spent.engine_thread, 3),
        **{f"cpu_{name}": round(getattr(spent, name), 3) for name in ("service", "cameras", "bench", "others")},
    }


def bottleneck(steps: list[Step]) -> str:
    """What limits, in a sentence, from the smallest number that was not borne; else from the largest that was."""
    failed = [step for step in steps if not step["borne"]]
    step = failed[0] if failed else steps[-1]
    cpu, many = step["cpu"], f"With {step['streams']} streams"
    first = max(cpu, key=lambda name: float(cpu[name]))
    most = f"{STAGES[first]} takes {cpu[first]:.2f} of the {step['cpu_service']:.2f} that the service takes"
    around = step["cpu_cameras"] + step["cpu_bench"] + step["cpu_others"]
    busy, what = step["cpu_service"] + around, ", ".join(step["problems"])
    if failed and busy >= FULL * step["cores"]:
        shares = f"the cameras take {step['cpu_cameras']:.2f}, other programs {step['cpu_others']:.2f}"
        return f"{many} ({what}) {busy:.2f} of {step['cores']} processors are at work: {most}, {shares}."
    if failed and step["cpu_engine_thread"] >= FULL:
        inside = "the image engine" if cpu["image"] >= cpu["head"] + cpu["engine"] else "the head and what follows"
        return f"{many} ({what}) the one thread of the engine is busy all the time, most of it with {inside}."
    each = step["cpu_service"] / step["streams"]
    at_work = f"{busy:.2f} of {step['cores']} processors are at work"
    if failed:
        return f"{many} ({what}) {at_work}, so its threads wait for each other: {most}."
    room = f"without cameras and others beside it they would be full at about {step['cores'] / each:.0f} streams"
    return f"{many} {at_work}; {most}; {room}."


def tables(steps: list[Step]) -> Iterator[Table]:
    found = Table(title="glass to client", title_justify="left")
    for column in ("streams", "p50", "p95", "frames lost", "borne"):
        found.add_column(column, justify="right")
    for step in steps:
        late = (_ms(step[f"glass_to_client_{label}_ms"]) for label in ("p50", "p95"))
        found.add_row(str(step["streams"]), *late, f"{step['lost']:.1%}", "yes" if step["borne"] else "no")
    yield found
    title = f"processors at work, of {steps[0]['cores']}; cameras and other programs share them with the service"
    spent = Table(title=title, title_justify="left")
    columns = ("decode", "image", "head", "events", "rest", "service", "cameras", "others")
    for column in ("streams", *columns):
        spent.add_column(column, justify="right")
    for step in steps:
        values = step["cpu"] | {"events": step["cpu"]["delivery"], "rest": step["cpu"]["engine"] + step["cpu"]["other"]}
        values |= {name: step[f"cpu_{name}"] for name in ("service", "cameras", "others")}
        spent.add_row(str(step["streams"]), *(f"{values[name]:.2f}" for name in columns))
    yield spent


def _line(step: Step) -> str:
    late = f"p95 {_ms(step['glass_to_client_p95_ms'])}, {step['lost']:.1%} lost, {step['cpu_service']:.2f} processors"
    return f"{step['streams']:>3} streams: {late}" + (f": {', '.join(step['problems'])}" if step["problems"] else "")


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f} ms"


def _sleep(seconds: int, second: Callable[[], None]) -> None:
    for _ in range(seconds):
        time.sleep(1)
        second()
