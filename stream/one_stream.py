"""What `livemoments run --publish` serves: one session, whose events are kept in memory only."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

from kernels.engine import Engine
from kernels.errors import InputError
from stream.config.schema import Limits, ServerConfig
from stream.curves import Curve, curves_of
from stream.deliver.interest import ANY, Interest
from stream.deliver.log import EventLog
from stream.deliver.publish import Sockets
from stream.service.why import why
from stream.session import Session
from stream.sources import SourceStatus
from stream.types import Event, Query

LOG_BYTES = 4 << 20
"""Some thousand events for clients that were away."""


class OneStream:
    """Sockets on loopback for one session. Use it as a context manager."""

    def __init__(self, engine: Engine, queries: Sequence[Query], *, zmq_port: int, ws_port: int) -> None:
        """queries: those that run whether a client wants them or not. Ports: 0 takes a free one."""
        self.interest = Interest(engine, Limits().queries + len(queries))
        for query in queries:
            self.interest.hold(ANY, query)
        self.state = SourceStatus("connected")
        self._session: Session | None = None
        self._version = -1
        self._events = EventLog(None, max_bytes=LOG_BYTES)
        self.sockets = Sockets(self, self._events, ServerConfig(ws_port=ws_port, zmq_port=zmq_port, page_port=None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.sockets.__exit__()
        self._events.close()

    def tell(self, event: Event) -> None:
        """Publish an event. Never blocks."""
        self.sockets.tell(event)

    def apply(self, session: Session) -> None:
        """Bring the session's queries up to what is wanted. For the thread that runs the session."""
        self._session = session
        self.sockets.scored()
        asked = self.interest.asked()
        if self._version != self.interest.version:
            self._version = self.interest.version
            wanted = self.interest.wanted(session.stream)
            for query in session.queries:
                if query.id not in wanted:
                    session.remove(query.id)
            for query in wanted.values():
                session.add(query)
        for stream, query_id in asked:
            if stream in (session.stream, ANY):
                self.sockets.running(session.stream, query_id)

    # -- what clients ask; see stream/deliver/switchboard.py

    def streams(self) -> list[dict[str, Any]]:
        session = self._session
        return (
            [{"stream": session.stream, "state": self.state.state, "queries": len(session.queries)}] if session else []
        )

    def curves(self) -> Iterator[Curve]:
        return curves_of(self._session) if self._session else iter(())

    def why(self, stream: str, query: Query) -> list[dict[str, Any]]:
        session = self._session
        if session is None or stream not in (session.stream, ANY):
            raise InputError(f'there is no stream "{stream}": {session.stream if session else "there is none yet"}')
        return [why(session, query, self.state)]

    def add_stream(self, name: str, source: str) -> None:
        raise InputError("this is `livemoments run`, which watches one source: `livemoments serve` takes more")

    def remove_stream(self, name: str) -> None:
        raise InputError("this is `livemoments run`, which watches one source: `livemoments serve` takes more")
