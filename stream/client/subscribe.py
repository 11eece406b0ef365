"""`livemoments subscribe`: what a running detector says, as a live table, as lines, or as JSON."""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from kernels.errors import InputError
from stream.client.access import DEFAULT_URL, Access, access, add_access_arguments, secret
from stream.client.board import Board, Item, Message, clean, line
from stream.client.resume import Resume
from stream.deliver.interest import ANY
from stream.events import LOST_TYPE, GapCounter, to_json, topic_prefix
from stream.types import normalise

TICK_S = 0.25
"""The listener comes up for air this often, so that deadlines hold and clocks tick when nothing happens."""
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 10.0


@dataclass(frozen=True)
class Request:
    """Whom to listen to, and for what."""

    url: str
    queries: list[str] = field(default_factory=list)  # texts; none: all
    stream: str | None = None
    options: dict[str, float] = field(default_factory=dict)  # of the WebSocket server's `subscribe`
    since: int | None = None
    access: Access = field(default_factory=Access)  # to a WebSocket server
    curve: tuple[str, str] | None = field(default=None, repr=False)  # ZeroMQ: its public key, our secret key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        nargs="?",
        default=DEFAULT_URL,
        metavar="URL",
        help="ws://HOST:PORT (WebSocket, encrypted wss://) or tcp://HOST:PORT (ZeroMQ), default %(default)s",
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
    ws = parser.add_argument_group("over WebSocket")
    ws.add_argument("--threshold", type=float, metavar="P", help="score from which the queries have a moment")
    ws.add_argument("--cooldown", type=float, metavar="SECONDS", help="no moment that begins so soon after another")
    ws.add_argument(
        "--backfill", type=float, metavar="SECONDS", help="how much of the past to answer for, default all that is kept"
    )
    ws.add_argument("--since", type=int, metavar="NUMBER", help="instead: all events after this number of the log")
    add_access_arguments(ws)
    zmq = parser.add_argument_group("over ZeroMQ with keys")
    zmq.add_argument("--server-key", metavar="KEY", help="the publisher's public key")
    zmq.add_argument("--secret-key-file", type=Path, metavar="FILE", help="holds the secret key of this client")


def run(args: argparse.Namespace) -> int:
    """Shows events until --for is over, Ctrl-C, or the reader of stdout goes away.

    Raises InputError if nothing answers at the address to begin with, or the server refuses a query. A server that
    goes away later is waited for.
    """
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise InputError(f"--for must be a number of seconds above 0, got {args.seconds:g}")
    request = _request(args)
    deadline = math.inf if args.seconds is None else time.monotonic() + args.seconds
    # What a cooldown leaves out is not missing.
    gaps = None if args.cooldown else GapCounter()
    items = listen(request)
    with contextlib.closing(items), _output(args.json, gaps) as show:
        for item in items:
            show(item)
            if time.monotonic() >= deadline:
                break
    return 0


def _request(args: argparse.Namespace) -> Request:
    """What the options ask for. InputError, one line, for those that do not go together."""
    url = args.url
    over_ws = ["threshold", "cooldown", "backfill", "since", "token", "token_file", "certificate"]
    over_zmq = ["server_key", "secret_key_file"]
    match url.partition("://")[0]:
        case "ws" | "wss":
            wrong, here, there = over_zmq, "WebSocket", "ZeroMQ (tcp://)"
        case "tcp":
            wrong, here, there = over_ws, "ZeroMQ", "WebSocket (ws://)"
        case _:
            raise InputError(f"{url} is neither ws://HOST:PORT (WebSocket) nor tcp://HOST:PORT (ZeroMQ)")
    for name in wrong:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for {there}, and {url} is {here}")
    if here == "ZeroMQ":
        if (args.server_key is None) != (args.secret_key_file is None):
            raise InputError("--server-key and --secret-key-file are needed together")
        keys = args.server_key and (args.server_key, secret("--secret-key-file", args.secret_key_file))
        return Request(url, args.query, args.stream, curve=keys or None)
    options = {name: getattr(args, name) for name in ("threshold", "cooldown", "backfill")}
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if not 0 <= value < math.inf or (name == "threshold" and not 0 < value <= 1):
            limits = "above 0 and at most 1" if name == "threshold" else "of seconds, 0 or more"
            raise InputError(f"--{name} must be a number {limits}, got {value:g}")
    if args.since is not None and args.since < 0:
        raise InputError(f"--since must be the number of an event in the log, 0 or more, got {args.since}")
    if args.since is not None and args.backfill is not None:
        raise InputError("--since and --backfill both say where to begin: keep one")
    for name in ("threshold", "backfill"):
        if name in given and (not args.query or ANY in args.query):
            raise InputError(f"--{name} is for a query: add --query TEXT")
    return Request(url, args.query, args.stream, given, args.since, access(args, url))


def listen(request: Request) -> Generator[Item, None, None]:
    """What the server sends, for ever, with at least one item every TICK_S or so.

    Over ZeroMQ all queries of a stream arrive, and those not asked for (if any are) are skipped here. A WebSocket
    server is asked, after a break, for all that it told meanwhile.
    """
    url, resume, reached, retry_s = request.url, None, False, FIRST_RETRY_S
    if not url.startswith("tcp:"):
        stream = request.stream or ANY
        resume = Resume(request.queries, {"stream": stream, **request.options}, request.since)
    while True:
        try:
            with _connect(request, resume) as receive:
                if reached:
                    yield f"connected to {url} again"
                reached = True
                while True:
                    message = _decode(receive(TICK_S), url)
                    if message is not None:
                        # Not as soon as it connects: a server that is full accepts and then hangs up.
                        retry_s = FIRST_RETRY_S
                    is_wanted = message and (resume.is_news(message) if resume else _matches(message, request.queries))
                    yield message if is_wanted else None
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
def _connect(request: Request, resume: Resume | None) -> Iterator[Callable[[float], bytes | None]]:
    # Imported here, so that either transport works where the other's library is missing.
    if resume:
        from stream.deliver.websocket import Client

        with Client(request.url, token=request.access.token, certificate=request.access.certificate) as client:
            for each in resume.requests():
                client.send(each)
            yield client.receive
    else:
        from stream.deliver.zeromq import Subscriber

        server_key, secret_key = request.curve or (None, None)
        prefix = topic_prefix(request.stream)
        with Subscriber(request.url, prefix, server_key=server_key, secret_key=secret_key) as subscriber:
            yield subscriber.receive


def _decode(payload: bytes | None, url: str) -> Message | None:
    return None if payload is None else decode(payload, url)


def decode(payload: bytes, url: str) -> dict[str, Any]:
    """What the server at `url` says. InputError if it refuses something, or is another program."""
    try:
        message = json.loads(payload)
    except ValueError:
        message = None
    if isinstance(message, dict) and message.get("op") == "error":
        raise InputError(f"{url} refuses: {clean(message.get('message'))}")
    if not isinstance(message, dict) or not ("op" in message or {"type", "id", "data"} <= message.keys()):
        raise InputError(f"what answers at {url} is not livemoments")
    return message


def _matches(message: Message, queries: list[str]) -> bool:
    """Whether an event belongs to one of the queries, if there are any. A status belongs to all."""
    text = message["data"].get("query")
    return not queries or text is None or normalise(text) in map(normalise, queries)


@contextlib.contextmanager
def _output(as_json: bool, gaps: GapCounter | None) -> Iterator[Callable[[Item], None]]:
    """A function that shows one item: JSON, the table on a terminal, or lines."""
    if as_json:
        yield _show_json
    elif sys.stdout is None or not sys.stdout.isatty():
        yield lambda item: _show_line(item, gaps)
    else:
        board, console, drawn_s = Board(gaps), Console(), -math.inf
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


def _show_line(item: Item, gaps: GapCounter | None) -> None:
    if isinstance(item, str):
        print(item, file=sys.stderr, flush=True)
    elif item is not None:
        missed = gaps.count(item) if gaps and item["type"] != LOST_TYPE else 0
        print(line(item) + (f"  ({missed} missed before it)" if missed else ""), flush=True)
