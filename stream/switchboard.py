"""Who is subscribed to what, and what a slow client loses: the rules of the WebSocket server, without sockets.

The protocol is one JSON object a message:

    {"op": "subscribe", "query": TEXT, "stream": NAME}     TEXT "*": every event. `stream` is "*" unless given
    {"op": "unsubscribe", "query": TEXT, "stream": NAME}
    {"op": "list"}                                         this client's subscriptions

Each is answered by one object with `op`: "subscribed", "unsubscribed", "list", or "error" with a `message`. What has
`type` instead is an event. A client that has subscribed to nothing is sent nothing.
"""

import asyncio
import itertools
import json
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

from kernels.errors import InputError, LivemomentsError
from stream.events import lost_notice, to_json
from stream.types import Query

ANY = "*"
QUEUE_LIMIT = 256
"""Messages kept for one client that does not keep up."""
MAX_SUBSCRIPTIONS = 64
"""Of one client."""


class Outbox:
    """The messages waiting for one client.

    Failure mode: when it is full the OLDEST message goes, and the next `take` gives a notice of how many went, which
    is exactly where they would have been. So messages taken + messages lost = messages put, at all times.
    """

    def __init__(self, limit: int = QUEUE_LIMIT) -> None:
        self._waiting: deque[bytes] = deque()
        self._limit = limit
        self._lost = 0  # since the last notice
        self._name = uuid.uuid4().hex
        self._notices = itertools.count(1)

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: bytes) -> None:
        if len(self._waiting) == self._limit:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(message)

    def take(self) -> bytes | None:
        """The next message to send, None if there is none."""
        if self._lost:
            notice = lost_notice(self._lost, f"{self._name}/{next(self._notices)}")
            self._lost = 0
            return notice
        return self._waiting.popleft() if self._waiting else None


class Peer:
    """What the server keeps about one client."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.wake = asyncio.Event()  # set when the outbox may hold something
        self.wants: dict[tuple[str, str], str] = {}  # (stream or *, text) -> query id or *


class Switchboard:
    """Who is subscribed to what. Turns a client's message into the answer, and an event into its receivers.

    `on_subscribe(text)` makes the program run a text that no client holds yet and returns its query; a
    LivemomentsError from it is the client's answer. `on_unsubscribe(query id)` tells that no client holds it any
    more.
    """

    def __init__(self, on_subscribe: Callable[[str], Query], on_unsubscribe: Callable[[str], None]) -> None:
        self._on_subscribe = on_subscribe
        self._on_unsubscribe = on_unsubscribe
        self.peers: set[Peer] = set()

    def answer(self, peer: Peer, message: str | bytes) -> bytes:
        """Does what a client asks. Whatever it sent, there is one answer."""
        try:
            return to_json(self._obey(peer, _parse(message)))
        except LivemomentsError as error:
            return to_json({"op": "error", "message": str(error)})

    def receivers(self, stream: str, query_id: str | None) -> list[Peer]:
        """Who gets an event of this query; None: a status of the stream, for all who listen to the stream."""
        ids, names = (query_id, ANY), (stream, ANY)
        return [
            peer
            for peer in self.peers
            if any(name in names and (query_id is None or held in ids) for (name, _), held in peer.wants.items())
        ]

    def leave(self, peer: Peer) -> None:
        """Forgets a client, and lets go of what only it held."""
        self.peers.discard(peer)
        held = set(peer.wants.values())
        peer.wants.clear()
        for query_id in held:
            self._release(query_id)

    def _obey(self, peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
        op, stream, text = request.get("op"), request.get("stream", ANY), request.get("query")
        if op == "list":
            held = [_describe(stream, text, query_id) for (stream, text), query_id in peer.wants.items()]
            return {"op": "list", "subscriptions": held}
        if op not in ("subscribe", "unsubscribe"):
            raise InputError('"op" must be "subscribe", "unsubscribe" or "list"')
        if not isinstance(text, str) or not text.strip() or not isinstance(stream, str) or not stream:
            raise InputError(f'{op} needs "query", a text, and takes "stream", a name or "*"')
        if op == "subscribe":
            return {"op": "subscribed", **_describe(stream, text, self._subscribe(peer, stream, text))}
        query_id = peer.wants.pop((stream, text), None)
        if query_id is None:
            raise InputError(f'no subscription to "{text}" on stream "{stream}": "list" shows those you have')
        self._release(query_id)
        return {"op": "unsubscribed", **_describe(stream, text, query_id)}

    def _subscribe(self, peer: Peer, stream: str, text: str) -> str:
        if (stream, text) not in peer.wants and len(peer.wants) == MAX_SUBSCRIPTIONS:
            raise InputError(f"{MAX_SUBSCRIPTIONS} subscriptions are the most for one client: unsubscribe first")
        running = (query_id for other in self.peers for (_, held), query_id in other.wants.items() if held == text)
        query_id = ANY if text == ANY else next(running, None) or self._on_subscribe(text).id
        peer.wants[stream, text] = query_id
        return query_id

    def _release(self, query_id: str) -> None:
        if query_id != ANY and not any(query_id in peer.wants.values() for peer in self.peers):
            self._on_unsubscribe(query_id)


def _describe(stream: str, text: str, query_id: str) -> dict[str, str]:
    return {"query_id": query_id, "query": text, "stream": stream}


def _parse(message: str | bytes) -> dict[str, Any]:
    if isinstance(message, bytes):
        raise InputError("this message is binary: send JSON as text")
    try:
        request = json.loads(message)
        # An escape in JSON can make half a surrogate pair, which no text encoder further on can take.
        json.dumps(request, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # RecursionError: ten thousand brackets
        raise InputError('this message is not JSON: send for example {"op":"subscribe","query":"*"}') from None
    if not isinstance(request, dict):
        raise InputError('a message is a JSON object, for example {"op":"subscribe","query":"*"}')
    return request
