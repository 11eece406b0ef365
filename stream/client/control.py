"""`livemoments control`: one question to a running service, or one order, and its answer."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernels.errors import InputError
from stream.client.access import DEFAULT_URL, access, add_access_arguments
from stream.client.board import clean
from stream.client.subscribe import decode
from stream.deliver.interest import ANY
from stream.events import to_json

ANSWER_S = 10.0
"""How long to wait: a query may wait for others to be encoded."""
WIDTH = 160
"""Of a table that is not shown on a terminal."""
OPERATIONS = ("streams", "add-stream", "remove-stream", "why")


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """arguments: the words that will be parsed. The URL may be left out, which argparse could not tell."""
    parser.set_defaults(url=DEFAULT_URL)
    if arguments[:1] and arguments[0] not in OPERATIONS:
        parser.add_argument("url", metavar="URL", help=f"ws://HOST:PORT or wss://HOST:PORT, default {DEFAULT_URL}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the answer as it came, one line of JSON")
    add_access_arguments(common)
    operations = parser.add_subparsers(dest="operation", metavar="OPERATION", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return operations.add_parser(name, help=summary, description=f"{summary.capitalize()}.", parents=[common])

    add("streams", "list the streams and how they are")
    stream = add("add-stream", "watch one more stream")
    stream.add_argument("stream", metavar="NAME")
    stream.add_argument("source", metavar="SOURCE", help="as `livemoments run` takes it")
    add("remove-stream", "watch a stream no longer").add_argument("stream", metavar="NAME")
    why = add("why", "say what a query scores, and why nothing is told")
    why.add_argument("query", metavar="TEXT")
    why.add_argument("--stream", default=ANY, metavar="NAME", help="only on this stream")
    why.add_argument("--threshold", type=float, metavar="P", help="as it was subscribed to")


def run(args: argparse.Namespace) -> int:
    """Prints the answer.

    Raises InputError if nobody answers, or the service refuses.
    """
    answer = _ask(args, _request(args))
    if args.json:
        print(to_json(answer).decode())
        return 0
    match args.operation:
        case "streams":
            names = ["stream", "state", "source", "queries", "looked_at", "dropped", "reconnects", "reason"]
            _print_table(answer["streams"], names)
        case "why":
            _print_table(answer["streams"], ["stream", "state", "score", "threshold", "best", "reason"])
        case _:
            print(f"{args.stream} is {'watched' if args.operation == 'add-stream' else 'watched no longer'}")
    return 0


def _request(args: argparse.Namespace) -> dict[str, Any]:
    if args.operation == "why" and args.threshold is not None and not 0 < args.threshold <= 1:
        raise InputError(f"--threshold must be a number above 0 and at most 1, got {args.threshold:g}")
    request = {"op": args.operation.replace("-", "_")}
    names = {"streams": [], "add-stream": ["stream", "source"], "remove-stream": ["stream"]}
    given = {name: getattr(args, name) for name in names.get(args.operation, ["query", "stream", "threshold"])}
    return request | {name: value for name, value in given.items() if value is not None}


def _ask(args: argparse.Namespace, request: Mapping[str, Any]) -> dict[str, Any]:
    # Imported here, as in stream/client/subscribe.py.
    from stream.deliver.websocket import Client

    url = args.url
    if not url.startswith(("ws://", "wss://")):
        raise InputError(f"{url} is not ws://HOST:PORT or wss://HOST:PORT: orders go over WebSocket")
    allowed = access(args, url)
    try:
        with Client(url, token=allowed.token, certificate=allowed.certificate) as client:
            client.send(request)
            deadline = time.monotonic() + ANSWER_S
            while (left_s := deadline - time.monotonic()) > 0:
                if (payload := client.receive(left_s)) is not None:
                    return decode(payload, url)
    except ConnectionError as error:
        raise InputError(f"nothing answers at {url} ({error}): start it, or check the port") from None
    raise InputError(f"{url} does not answer within {ANSWER_S:g} s")


def _print_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Columns that no row has anything for are left out."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    shown = [name for name in names if any(name in row for row in rows)]
    for name in shown:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name))) for name in shown))
    console = Console(width=None if sys.stdout and sys.stdout.isatty() else WIDTH)
    console.print(table if rows else "there are no streams")


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else clean(value)
