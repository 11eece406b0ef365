"""Which queries anybody wants on which stream: clients, the config and the command line together."""

import threading
from collections import Counter

from kernels.engine import Engine
from kernels.errors import LimitError
from stream.detector import make_query
from stream.types import Query

ANY = "*"
"""In the place of a stream or a query: all of them."""


class Interest:
    """Counts who holds what. Any thread may call; one thread brings the rows of the streams up to it."""

    def __init__(self, engine: Engine, most: int) -> None:
        """most: queries at a time, so that no client can fill the memory; each costs up to some hundred kilobytes."""
        self.most, self.version = most, 0  # the latter grows with every change
        self._engine = engine
        self._lock = threading.Lock()
        self._held: Counter[tuple[str, str]] = Counter()  # (stream or ANY, query id)
        self._queries: dict[str, Query] = {}
        self._asked: dict[tuple[str, str], None] = {}  # in order, each once: nobody may be there to take them

    def encode(self, text: str, threshold: float | None) -> Query:
        """The query that holds it already, or a new one, which takes milliseconds.

        Raises:
            InputError: see `make_query`.
        """
        with self._lock:
            for query in self._queries.values():
                if query.threshold == threshold and query.text == text:
                    return query
        return make_query(self._engine, text, threshold)

    def hold(self, stream: str, query: Query) -> None:
        """Somebody wants it.

        Raises:
            LimitError: there are as many queries as there may be.
        """
        with self._lock:
            if query.id not in self._queries and len(self._queries) >= self.most:
                raise LimitError(f"{self.most} queries run already: unsubscribe from one first")
            self._queries.setdefault(query.id, query)
            self._held[stream, query.id] += 1
            self._asked[stream, query.id] = None
            self.version += 1

    def release(self, stream: str, query_id: str) -> None:
        """Somebody wants it no longer."""
        with self._lock:
            self._held[stream, query_id] -= 1
            self.version += 1
            if self._held[stream, query_id] <= 0:
                del self._held[stream, query_id]
                self._asked.pop((stream, query_id), None)
                if not any(held == query_id for _, held in self._held):
                    self._queries.pop(query_id, None)

    def wanted(self, stream: str) -> dict[str, Query]:
        """By id, what is to run on a stream, in the order in which it was asked for."""
        with self._lock:
            return {
                query_id: query
                for query_id, query in self._queries.items()
                if (stream, query_id) in self._held or (ANY, query_id) in self._held
            }

    def asked(self) -> list[tuple[str, str]]:
        """(stream or ANY, query id) of every `hold` since the last call that is still held."""
        with self._lock:
            asked = list(self._asked)
            self._asked.clear()
        return asked
