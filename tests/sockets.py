"""A WebSocket server with a real log and real queries' bookkeeping, and no engine behind it."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import pytest
from websockets.sync.client import ClientConnection, connect

from kernels.engine import Engine
from kernels.errors import InputError
from stream.config.schema import Limits
from stream.curves import Curve
from stream.deliver.interest import ANY, Interest
from stream.deliver.log import Entry, EventLog
from stream.deliver.websocket import Client, Server
from stream.types import Event, Query, tidy
from tests.test_events import query

WAIT_S = 10.0
"""How long a test waits for what must come. Only a failing test waits so long."""
QUIET_S = 0.2
"""How long a test listens for what must not come."""
QUICK = Limits(messages_per_second=1e6)


class Queries(Interest):
    """Encodes texts by their checksum instead of by an engine."""

    def __init__(self, most: int, held: Callable[[], None]) -> None:
        super().__init__(cast(Engine, None), most)
        self._told_held = held

    def encode(self, text: str, threshold: float | None) -> Query:
        if text.startswith("!"):
            raise InputError(f"cannot look for {text}")
        found = query(tidy(text))
        return found if threshold is None else replace(found, id=f"{found.id}-at-{threshold:g}", threshold=threshold)

    def hold(self, stream: str, query: Query) -> None:
        super().hold(stream, query)
        self._told_held()


class Program:
    """Stands for the service: a query runs on each stream as soon as it is held, or when the test calls `run_queries`.

    Use it as a context manager.
    """

    def __init__(
        self,
        log: EventLog | None = None,
        *,
        streams: Sequence[str] = ("door", "yard"),
        waits: bool = False,
        **options: Any,
    ) -> None:
        """waits: for `run_queries`. options: of the server."""
        self.log, self.names = log or EventLog(None), list(streams)
        limits = options.setdefault("limits", QUICK)
        self.interest: Interest = Queries(limits.queries, (lambda: None) if waits else self.run_queries)
        self.server = Server(self, self.log, **{"port": 0, **options})

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.close()
        self.log.close()

    @property
    def url(self) -> str:
        return self.server.url

    def tell(self, *events: Event) -> list[Entry]:
        entries = self.log.append(events)
        self.server.wake()
        return entries

    def run_queries(self) -> None:
        for pattern, query_id in self.interest.asked():
            for name in self.names:
                if pattern in (name, ANY):
                    self.server.join(name, query_id, self.log.last)

    def wanted(self, stream: str = "door") -> set[str]:
        return {each.text for each in self.interest.wanted(stream).values()}

    def streams(self) -> list[dict[str, Any]]:
        return [{"stream": name, "state": "connected"} for name in self.names]

    def curves(self) -> list[Curve]:
        return []

    def why(self, stream: str, query: Query) -> list[dict[str, Any]]:
        found = [name for name in self.names if stream in (name, ANY)]
        if not found:
            raise InputError(f'there is no stream "{stream}"')
        return [
            {
                "stream": name,
                "state": "connected",
                "threshold": query.threshold or 0.5,
                "reason": "no window is complete yet",
            }
            for name in found
        ]

    def add_stream(self, name: str, source: str) -> None:
        if name in self.names:
            raise InputError(f'there is a stream "{name}" already')
        self.names.append(name)

    def remove_stream(self, name: str) -> None:
        if name not in self.names:
            raise InputError(f'there is no stream "{name}"')
        self.names.remove(name)


def next_message(client: Client) -> dict[str, Any]:
    payload = client.receive(WAIT_S)
    assert payload is not None, "nothing came"
    message = json.loads(payload)
    assert isinstance(message, dict)
    return message


def next_event(client: Client) -> dict[str, Any]:
    """Passes over what says that the past is told."""
    while "op" in (message := next_message(client)):
        assert message["op"] == "caught_up", message
    return message


def ask(client: Client, **request: object) -> dict[str, Any]:
    """The answer to a request, of a client to whom nothing else comes but `caught_up`."""
    client.send(request)
    while (answer := next_message(client)).get("op") == "caught_up":
        pass
    assert "op" in answer, answer
    return answer


def quiet(client: Client) -> bool:
    """Whether no event comes."""
    while (payload := client.receive(QUIET_S)) is not None:
        if "op" not in json.loads(payload):
            return False
    return True


def wait_for(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def stalled_client(program: Program, **request: object) -> ClientConnection:
    """A client with tiny buffers that subscribes to everything, and reads only when told to."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", program.server.port))
    stack = contextlib.ExitStack()
    client = stack.enter_context(connect(program.url, sock=raw, max_queue=1, compression=None, close_timeout=0.2))
    client.send(json.dumps({"op": "subscribe", "query": "*", **request}))
    assert json.loads(client.recv(WAIT_S))["op"] == "subscribed"
    return client


def self_signed(folder: Path, name: str, alternative: str) -> tuple[Path, Path]:
    """A certificate for a host and its key, by openssl; without it the test is skipped.

    Args:
        alternative: the host as certificates name it, such as IP:127.0.0.1.
    """
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes a certificate, is not installed")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    words += ["-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}"]
    subprocess.run([*words, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key
