"""Where events go out, and subscriptions come in: the ZeroMQ publisher and the WebSocket server as one."""

import uuid
from queue import SimpleQueue
from typing import Self

from kernels.engine import Engine
from kernels.errors import InputError
from stream.detector import make_query
from stream.events import encode, topic
from stream.session import Session
from stream.types import Event, Query
from stream.websocket import Server
from stream.zeromq import Publisher

MAX_QUERIES = 1000  # in all, so that no client can fill the memory; each costs some kilobytes, with a head some hundred


class Sockets:
    """Everything that listens: a ZeroMQ publisher and a WebSocket server, opened and closed together.

    Subscriptions that arrive over WebSocket wait until the session's thread applies them.
    """

    def __init__(self, zmq_port: int, ws_port: int, engine: Engine, queries: list[Query]) -> None:
        self._wanted: SimpleQueue[tuple[bool, Query]] = SimpleQueue()
        self._run_id = uuid.uuid4().hex
        self._engine = engine
        self._permanent = {query.id for query in queries}
        self._running = {query.id: query for query in queries}
        self._publisher = Publisher(zmq_port)
        self._server = Server(ws_port, self._subscribe, self._unsubscribe)
        try:
            self._server.start()
        except InputError:
            self._publisher.close()
            raise

    @property
    def ws_port(self) -> int:
        """Where the WebSocket server listens; it was chosen by the system if 0 was asked for."""
        return self._server.port

    @property
    def zmq_address(self) -> str:
        return self._publisher.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.close()
        self._publisher.close()

    def apply(self, session: Session) -> None:
        """Bring the session's queries up to what the clients want. For the thread that runs the session."""
        while not self._wanted.empty():
            watch, query = self._wanted.get()
            if watch:
                session.add(query)
            else:
                session.remove(query.id)

    def tell(self, event: Event) -> None:
        """Publish an event. Never blocks."""
        payload = encode(event, self._run_id)
        self._publisher.publish(topic(event), payload)
        self._server.publish(event.stream, event.query.id if event.query else None, payload)

    # Both run in the server's thread: they leave the session alone and only say what is wanted.

    def _subscribe(self, text: str) -> Query:
        query = make_query(self._engine, text)
        if query.id not in self._running:
            if len(self._running) >= MAX_QUERIES:
                raise InputError(f"{MAX_QUERIES} queries run already: unsubscribe from one first")
            self._running[query.id] = query
            self._wanted.put((True, query))
        return query

    def _unsubscribe(self, query_id: str) -> None:
        if query_id not in self._permanent and (query := self._running.pop(query_id, None)):
            self._wanted.put((False, query))
