"""`livemoments subscribe`: what a running detector says, as a live table, as lines, or as JSON."""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kernels.errors import InputError
from stream.events import LOST_TYPE, GapCounter, to_json, topic_prefix
from stream.types import normalise

DEFAULT_URL = "ws://127.0.0.1:8765"
TICK_S = 0.25
"""The listener comes up for air this often, so that deadlines hold and clocks tick when nothing happens."""
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 10.0
MAX_ROWS = 200
"""Moments the table remembers; it shows the newest that fit the screen."""

Message = Mapping[str, Any]
Item = Message | str | None
"""An event, a notice for the user, or nothing yet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        nargs="?",
        default=DEFAULT_URL,
        metavar="URL",
        help="ws://HOST:PORT (WebSocket) or tcp://HOST:PORT (ZeroMQ), default %(default)s",
    )
    parser.add_argument(
        "-q",
        "--query",
        action="append",
        default=[],
        metavar="TEXT",
        help="only this query, may be repeated; over WebSocket it is started if it does not run yet",
    )
    parser.add_argument("--stream", metavar="NAME", help="only this stream")
    parser.add_argument("--json", action="store_true", help="print one event a line, as CloudEvents JSON")
    parser.add_argument("--for", dest="seconds", type=float, metavar="SECONDS", help="stop after this long")


def run(args: argparse.Namespace) -> int:
    """Shows events until --for is over, Ctrl-C, or the reader of stdout goes away.

    Raises InputError if nothing answers at the address to begin with, or the server refuses a query. A server that
    goes away later is waited for.
    """
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise InputError(f"--for must be a number of seconds above 0, got {args.seconds:g}")
    deadline = math.inf if args.seconds is None else time.monotonic() + args.seconds
    items = listen(args.url, args.query, args.stream)
    with contextlib.closing(items), _output(args.json) as show:
        for item in items:
            show(item)
            if time.monotonic() >= deadline:
                break
    return 0


def listen(url: str, queries: list[str], stream: str | None) -> Generator[Item, None, None]:
    """What the server at `url` sends, for ever, with at least one item every TICK_S or so.

    Over ZeroMQ all queries of a stream arrive, and those not in `queries` (if it names any) are skipped here.
    """
    # A WebSocket server sends what was asked for, and may write a query in a tidier way than the user did.
    shown = queries if url.startswith("tcp:") else []
    reached, retry_s = False, FIRST_RETRY_S
    while True:
        try:
            with _connect(url, queries, stream) as receive:
                if reached:
                    yield f"connected to {url} again"
                reached = True
                while True:
                    message = _decode(receive(TICK_S), url)
                    if message is not None:
                        # Not as soon as it connects: a server that is full accepts and then hangs up.
                        retry_s = FIRST_RETRY_S
                    yield message if message is not None and _wanted(message, shown) else None
        except ConnectionError as error:
            if not reached:
                raise InputError(f"nothing answers at {url} ({error}): start it, or check the port") from None
            yield f"{url} has gone ({error}): trying again in {retry_s:g} s"
        again = time.monotonic() + retry_s
        while time.monotonic() < again:
            time.sleep(TICK_S)
            yield None
        retry_s = min(2 * retry_s, LAST_RETRY_S)


@contextlib.contextmanager
def _connect(url: str, queries: list[str], stream: str | None) -> Iterator[Callable[[float], bytes | None]]:
    # Imported here, so that either transport works where the other's library is missing.
    match url.partition("://")[0]:
        case "ws" | "wss":
            from stream.switchboard import ANY
            from stream.websocket import Client

            with Client(url) as client:
                for query in queries or [ANY]:
                    client.send({"op": "subscribe", "query": query, "stream": stream or ANY})
                yield client.receive
        case "tcp":
            from stream.zeromq import Subscriber

            with Subscriber(url, topic_prefix(stream)) as subscriber:
                yield subscriber.receive
        case _:
            raise InputError(f"{url} is neither ws://HOST:PORT (WebSocket) nor tcp://HOST:PORT (ZeroMQ)")


def _decode(payload: bytes | None, url: str) -> Message | None:
    if payload is None:
        return None
    try:
        message = json.loads(payload)
    except ValueError:
        message = None
    if isinstance(message, dict) and message.get("op") == "error":
        raise InputError(f"{url} refuses: {_clean(message.get('message'))}")
    if not isinstance(message, dict) or not ("op" in message or {"type", "id", "data"} <= message.keys()):
        raise InputError(f"what answers at {url} is not livemoments")
    return message


def _wanted(message: Message, queries: list[str]) -> bool:
    """Whether to show it: no answers to requests, and of the moments those of `queries`."""
    if "op" in message:
        return False
    text = message["data"].get("query")
    return not queries or text is None or normalise(text) in map(normalise, queries)


@contextlib.contextmanager
def _output(as_json: bool) -> Iterator[Callable[[Item], None]]:
    """A function that shows one item: JSON, the table on a terminal, or lines."""
    if as_json:
        yield _show_json
    elif sys.stdout is None or not sys.stdout.isatty():
        gaps = GapCounter()
        yield lambda item: _show_line(item, gaps)
    else:
        board, console, drawn_s = Board(), Console(), -math.inf
        with Live(console=console, auto_refresh=False) as live:

            def show(item: Item) -> None:
                nonlocal drawn_s
                board.apply(item)
                if time.monotonic() - drawn_s >= 0.9 * TICK_S:  # however many events a second
                    live.update(board.render(datetime.now(UTC), console.height - 6), refresh=True)
                    drawn_s = time.monotonic()

            yield show


def _show_json(item: Item) -> None:
    if isinstance(item, str):
        print(item, file=sys.stderr, flush=True)
    elif item is not None:
        print(to_json(item).decode(), flush=True)


def _show_line(item: Item, gaps: GapCounter) -> None:
    if isinstance(item, str):
        print(item, file=sys.stderr, flush=True)
    elif item is not None:
        missed = 0 if item["type"] == LOST_TYPE else gaps.count(item)
        print(_line(item) + (f"  ({missed} missed before it)" if missed else ""), flush=True)


def _line(message: Message) -> str:
    data, kind = message["data"], message["type"].split(".")[-2]
    if message["type"] == LOST_TYPE:
        return f"{'':8}  lost       {data['lost']} events: this reader is too slow"
    line = f"{_clock(message['time'])}  {kind:9}  {_clean(data['stream'])}"
    if "query" not in data:
        return f"{line}  {_status(data)}"
    line += f'  "{_clean(data["query"])}"  {data["start_s"]:.1f} s to '
    line += "..." if data["end_s"] is None else f"{data['end_s']:.1f} s"
    late_ms = data["capture_to_publish_ms"]
    return f"{line}  score {data['score']:.2f}" + ("" if late_ms is None else f"  late {late_ms:.0f} ms")


@dataclass
class _Row:
    kind: str  # opened, updated, closed or highlight
    data: Message
    start: datetime


class Board:
    """The table: a row for each moment, then the streams' state and what was missed. No clock, no terminal."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], _Row] = {}  # oldest first
        self._streams: dict[str, str] = {}
        self._gaps = GapCounter()
        self._lost = 0
        self._notice = ""

    def apply(self, item: Item) -> None:
        if isinstance(item, str):
            self._notice = item
        elif item is not None and item["type"] == LOST_TYPE:
            self._lost += item["data"]["lost"]
        elif item is not None:
            self._gaps.count(item)
            data = item["data"]
            if "query" not in data:
                self._streams[_clean(data["stream"])] = _status(data)
                return
            row = _Row(item["type"].split(".")[-2], data, datetime.fromisoformat(data["start"]))
            self._rows[data["stream"], data["moment_id"]] = row
            if len(self._rows) > MAX_ROWS:
                del self._rows[next(iter(self._rows))]

    def render(self, now: datetime, height: int) -> RenderableType:
        """The newest `height` moments; `now` (UTC) is what open ones last until."""
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("", "stream", "query", "start", "end", "lasts", "score", "late"):
            table.add_column(name, no_wrap=True, justify="right" if name in ("lasts", "late") else "left")
        for row in list(self._rows.values())[-max(1, height) :]:
            table.add_row(*_cells(row, now))
        streams = "  ".join(f"{name}: {state}" for name, state in self._streams.items())
        lines = [streams if streams or self._rows else "waiting for the first event", self._notice]
        if self._gaps.total or self._lost:
            lines.insert(1, f"missed {self._gaps.total} events by their numbers; the server dropped {self._lost}")
        return Group(table, *(Text(line, style="dim") for line in lines if line))


def _cells(row: _Row, now: datetime) -> list[Text]:
    data = row.data
    is_open = data["end"] is None
    seconds = (now - row.start).total_seconds() if is_open else data["end_s"] - data["start_s"]
    filled, late_ms = round(10 * data["score"]), data["capture_to_publish_ms"]
    return [
        Text("★ highlight" if row.kind == "highlight" else "● open" if is_open else "closed", "green" * is_open),
        Text(_clean(data["stream"])),
        Text(_clean(data["query"])),
        Text(_clock(data["start"])),
        Text("…" if is_open else _clock(data["end"])),
        Text(f"{seconds:.0f} s" if seconds >= 0 else "…"),  # a file may be read faster than it lasts
        Text("█" * filled + "░" * (10 - filled) + f" {data['score']:.2f}"),
        Text("" if late_ms is None else f"{late_ms:.0f} ms"),
    ]


def _status(data: Message) -> str:
    more = ", ".join(f"{key} {value}" for key, value in data.items() if key not in ("stream", "seq", "state"))
    return _clean(data["state"]) + (f" ({_clean(more)})" if more else "")


def _clock(rfc3339: str) -> str:
    return f"{datetime.fromisoformat(rfc3339).astimezone():%H:%M:%S}"


def _clean(text: object) -> str:
    """Any client may name a query: what could steer the terminal is not passed on to it."""
    return "".join(char if char.isprintable() else "?" for char in str(text))
