"""Who is subscribed to what: the rules of the WebSocket server, without sockets and without threads.

The protocol is one JSON object a message. What a client may ask, each answered by one object with the same `op` in the
past tense, or by {"op": "error", "message": TEXT}:

    subscribe    query TEXT ("*": every event that anybody asks for), and where wanted:
                 stream NAME ("*", the default: all of them), threshold 0..1, cooldown SECONDS between two moments,
                 backfill SECONDS of the past to be answered for (default: all that is kept),
                 since NUMBER: every event after this one of the log, in order, instead of backfill
    unsubscribe  query, stream, threshold, as subscribed
    list         this client's subscriptions
    why          query, stream, threshold: what it scores at present, and why nothing is told
    streams      all streams and how they are
    curves       on BOOL: from now on the scores of every query that runs, as they come; first those that are kept
    add_stream   stream NAME, source TEXT;  remove_stream   stream NAME

{"op": "curve", "stream", "query_id", "query", "threshold", "hop_s", "times", "scores"} comes to who asked for curves:
times in ms UTC, of the middle of each hop; "anew": true where what came before of that curve is to be forgotten.

What has `type` instead of `op` is an event. {"op": "caught_up", "query_id", "stream", "lognumber"} comes, for each
stream, once the past of a subscription has been told up to that number: from there on events come live. An event that
two subscriptions ask for comes once; only the past by `backfill` is told to each that asks.

A client is a place in the event log, not a queue: one that reads slowly gets everything later, as long as the log holds
it, and is told how much it does not hold any more. With `since` that place goes back, and everything comes in order
from there.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, overload

from kernels.errors import InputError, LimitError, LivemomentsError
from stream.config.schema import Limits
from stream.curves import Curve
from stream.deliver.interest import ANY, Interest
from stream.deliver.log import EventLog
from stream.deliver.peer import Join, Key, Peer, Tally, Want
from stream.events import to_json
from stream.types import NS, Query, tidy

_PAST = {
    "subscribe": "subscribed",
    "unsubscribe": "unsubscribed",
    "list": "list",
    "why": "why",
    "streams": "streams",
    "curves": "curves",
    "add_stream": "stream_added",
    "remove_stream": "stream_removed",
}
_TEXT_LIMIT = 4096  # characters: clients are told what others look for, so it travels with each event


class Program(Protocol):
    """What serves the clients. A LivemomentsError from it is the answer to the client."""

    interest: Interest
    """A query that is held here is followed by `Switchboard.join` for each stream on which it runs, now and later."""

    def why(self, stream: str, query: Query) -> list[dict[str, Any]]: ...

    def streams(self) -> list[dict[str, Any]]: ...

    def curves(self) -> Iterable[Curve]: ...

    def add_stream(self, name: str, source: str) -> None: ...

    def remove_stream(self, name: str) -> None: ...


class Switchboard:
    """Turns a client's message into the answer."""

    def __init__(self, program: Program, log: EventLog, limits: Limits, history_s: float) -> None:
        """history_s: how much of the past is kept for backfill."""
        self.limits = limits
        self._program, self._log, self._history_s = program, log, history_s
        self._encoding = asyncio.Semaphore(1)  # one at a time: the streams need the processor, too
        self.peers: set[Peer] = set()
        self.tally = Tally()
        self.curious = False  # somebody follows the curves; any thread may look

    @property
    def full(self) -> bool:
        """As many clients have entered as may."""
        return len(self.peers) >= self.limits.clients

    def wake_curious(self) -> None:
        for peer in self.peers:
            if peer.curves is not None:
                peer.wake.set()

    def curves(self, peer: Peer) -> Iterator[bytes]:
        """What is new of the curves, for a client that follows them: one message for each that has grown."""
        if peer.curves is None:
            return
        running = {}
        for curve in self._program.curves():
            key = curve.stream, curve.query.id
            scores, count = peer.curves.get(key, (None, 0))
            anew = scores is not curve.scores
            windows, values, count = curve.scores.since(0 if anew else count)
            running[key] = curve.scores, count
            if anew or len(windows):
                yield to_json(curve.message(windows, values, anew=anew))
        peer.curves = running

    def enter(self) -> Peer:
        peer = Peer(self._log.last, self.tally)
        self.peers.add(peer)
        return peer

    def leave(self, peer: Peer) -> None:
        """Forgets a client, and lets go of what it held."""
        self.peers.discard(peer)
        self._count_curious()
        for key in list(peer.wants):
            self._drop(peer, key)

    async def answer(self, peer: Peer, message: str | bytes) -> bytes:
        """Does what a client asks. Whatever it sent, there is one answer."""
        reason = "rate"
        try:
            if not peer.may_ask(self.limits.messages_per_second):
                raise InputError(f"more than {self.limits.messages_per_second:g} messages a second: slow down")
            reason = "malformed"
            request = _parse(message)
            reason = "request"
            return to_json({"op": _PAST[request["op"]], **await self._obey(peer, request)})
        except LivemomentsError as error:
            self.tally.messages["limit" if isinstance(error, LimitError) else reason] += 1
            return to_json({"op": "error", "message": str(error)})

    def join(self, stream: str, query_id: str, number: int) -> None:
        """A query runs on a stream, and what it told up to `number` of the log is all there is to its past."""
        for peer in self.peers:
            for want in peer.wants.values():
                if want.query_id == query_id and want.stream in (stream, ANY) and stream not in want.joined:
                    # The client may have been sent more of the log meanwhile: then that is its past, too.
                    want.joined[stream] = max(number, peer.position, want.told)
                    peer.joins.append(Join(want, stream, want.joined[stream]))
                    peer.wake.set()

    async def _obey(self, peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
        match request["op"]:
            case "list":
                return {"subscriptions": [want.describe() for want in peer.wants.values()]}
            case "curves":
                on = request.get("on", True)
                if not isinstance(on, bool):
                    raise InputError('"on" is true or false')
                peer.curves = {} if on else None
                self._count_curious()
                peer.wake.set()
                return {"on": on}
            case "streams":
                return {"streams": self._program.streams(), "lognumber": self._log.last}
            case "add_stream":
                name = _text(request, "stream")
                self._program.add_stream(name, _text(request, "source"))
                return {"stream": name}
            case "remove_stream":
                self._program.remove_stream(name := _text(request, "stream"))
                return {"stream": name}
        key = _key(request)
        match request["op"]:
            case "subscribe":
                return await self._subscribe(peer, key, request)
            case "why":
                _one_query(key)
                query = await self._encode(key)
                return {"query_id": query.id, "streams": self._program.why(key[0], query)}
        want = self._drop(peer, key)
        if want is None:
            at = "" if key[2] is None else f" at {key[2]:g}"
            raise InputError(
                f'no subscription to "{key[1][:80]}"{at} on stream "{key[0]}": "list" shows those you have'
            )
        return want.describe()

    async def _subscribe(self, peer: Peer, key: Key, request: dict[str, Any]) -> dict[str, Any]:
        stream, text, threshold = key
        cooldown_s = _number(request, "cooldown", 0.0)
        backfill_s = min(_number(request, "backfill", self._history_s), self._history_s)
        since = _number(request, "since", None)
        if since is not None and (since != int(since) or since < 0):
            raise InputError('"since" is the number of an event in the log, its "lognumber"')
        if threshold is not None:
            _one_query(key)
        query = None if text == ANY else await self._encode(key)
        if key not in peer.wants and len(peer.wants) >= self.limits.queries_per_client:
            most = self.limits.queries_per_client
            raise LimitError(f"{most} subscriptions are the most for one client: unsubscribe first")
        last = self._log.last
        if query:
            self._program.interest.hold(stream, query)
        self._drop(peer, key)
        want = Want(
            stream=stream,
            query_id=query.id if query else ANY,
            text=query.text if query else ANY,
            threshold=threshold,
            cooldown_ns=int(cooldown_s * NS),
            since_ns=None if since is not None or query is None else time.time_ns() - int(backfill_s * NS),
            begin=last if since is None else min(int(since), last),  # beyond the last: that was another log
        )
        if since is not None:
            peer.go_back(want.begin)
            if query is None:  # nothing has to be started: nobody will call `join`
                peer.joins.append(Join(want, ANY, last))
        peer.wants[key] = want
        return want.describe() | {"lognumber": last}

    def _count_curious(self) -> None:
        self.curious = any(peer.curves is not None for peer in self.peers)

    async def _encode(self, key: Key) -> Query:
        async with self._encoding:
            return await asyncio.to_thread(self._program.interest.encode, key[1], key[2])

    def _drop(self, peer: Peer, key: Key) -> Want | None:
        want = peer.drop(key)
        if want and want.query_id != ANY:
            self._program.interest.release(want.stream, want.query_id)
        return want


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
    if not isinstance(request.get("op"), str) or request["op"] not in _PAST:
        raise InputError(f'"op" must be one of {", ".join(_PAST)}')
    return request


def _key(request: dict[str, Any]) -> Key:
    """The same for each spelling of a subscription."""
    stream, text, threshold = request.get("stream", ANY), _text(request, "query"), _number(request, "threshold", None)
    if not isinstance(stream, str) or not 0 < len(stream) <= _TEXT_LIMIT:
        raise InputError('"stream" is a name or "*"')
    return stream, tidy(text), threshold if threshold is None else round(threshold, 4)


def _one_query(key: Key) -> None:
    if key[1] == ANY:
        raise InputError(f'"{ANY}" is every query: a threshold, and "why", are for one query')


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str) or not tidy(value):
        raise InputError(f'{request["op"]} needs "{name}", a text')
    if len(value) > _TEXT_LIMIT:
        raise InputError(f'"{name}" is {len(value)} characters long, {_TEXT_LIMIT} are the most')
    return value


@overload
def _number(request: dict[str, Any], name: str, otherwise: float) -> float: ...


@overload
def _number(request: dict[str, Any], name: str, otherwise: None) -> float | None: ...


def _number(request: dict[str, Any], name: str, otherwise: float | None) -> float | None:
    value = request.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise InputError(f'"{name}" is a number, 0 or more')
    return float(value)
