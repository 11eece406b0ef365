"""Where events go out: each is stored, then told to ZeroMQ, WebSocket clients and webhooks, in a thread of its own."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from kernels.errors import LogError
from stream.config.schema import Limits, ServerConfig
from stream.deliver.entrance import Door
from stream.deliver.log import Entry, EventLog
from stream.deliver.switchboard import Program, Switchboard
from stream.deliver.webhook import Webhook
from stream.deliver.websocket import Server
from stream.deliver.zeromq import Publisher
from stream.events import topic
from stream.timings import Durations
from stream.types import Event

log = logging.getLogger(__name__)

BATCH = 256
"""Events of one transaction at most."""
WAITING_LIMIT = 10_000
"""Events that wait in memory while they cannot be stored; beyond, the oldest go."""
RETRY_S = 1.0
DRAIN_S = 3.0
"""How long the end tries to store what is left."""


@dataclass(frozen=True)
class _Running:
    """Takes its place among the events: what a query told so far stands before it."""

    stream: str
    query_id: str


class Sockets:
    """The event log with everything that listens to it, opened and closed together. Any thread may call.

    Nobody hears of an event that is not stored. While the disk is full events wait, and what does not fit is lost:
    `lost` counts it, `problem` says why.
    """

    def __init__(
        self,
        program: Program,
        events: EventLog,
        server: ServerConfig,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        history_s: float = 0.0,
        webhooks: Sequence[Webhook] = (),
        doors: Sequence[Door] = (),
    ) -> None:
        """doors: other ways in than the WebSocket, see `websocket.Server`."""
        self.lost = 0
        self.problem: str | None = None
        self.stored = Durations()  # from an event's emission until it is stored and with the sockets
        self._log = events
        self._waiting: deque[Event | _Running] = deque()
        self._arrived, self._closing, self._until_s = threading.Condition(), False, math.inf
        curve = (server.curve.secret_key, server.curve.clients) if server.curve else None
        self._publisher = None if server.zmq_port is None else Publisher(server.zmq_port, host=server.bind, curve=curve)
        try:
            self._server = Server(
                program,
                events,
                port=server.ws_port,
                host=server.bind,
                limits=limits,
                history_s=history_s,
                token=server.token,
                tls=(server.tls_cert, server.tls_key) if server.tls_cert and server.tls_key else None,
                doors=doors,
            )
            self._server.start()
            try:
                self.webhooks = list(webhooks)
                for webhook in self.webhooks:
                    webhook.start()
            except BaseException:
                _close(self.webhooks)
                self._server.close()
                raise
        except BaseException:
            if self._publisher:
                self._publisher.close()
            raise
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    @property
    def ws_url(self) -> str:
        """Where the WebSocket server listens; the port was chosen by the system if 0 was asked for."""
        return self._server.url

    @property
    def zmq_address(self) -> str | None:
        return self._publisher.address if self._publisher else None

    @property
    def waiting(self) -> int:
        """Events, and what takes its place among them, that are still to be stored."""
        return len(self._waiting)

    @property
    def board(self) -> Switchboard:
        """The clients."""
        return self._server.board

    @property
    def alive(self) -> bool:
        """Both threads run: that which stores, and that which serves clients."""
        return self._thread.is_alive() and self._server.alive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Stores and tells what is left, then says goodbye. The log stays open."""
        with self._arrived:
            self._closing, self._until_s = True, time.monotonic() + DRAIN_S
            self._arrived.notify()
        self._thread.join()
        _close(self.webhooks)
        self._server.close()
        if self._publisher:
            self._publisher.close()

    def limit(self, limits: Limits) -> None:
        """What clients may do from now on."""
        self._server.limit(limits)

    def follow(self, webhooks: Sequence[Webhook]) -> list[str]:
        """Other webhooks instead of those there are. Returns those that the log has no place for: its disk is full."""
        _close(self.webhooks)
        started, failed = list[Webhook](), list[str]()
        for webhook in webhooks:
            try:
                webhook.start()
                started.append(webhook)
            except LogError as error:
                failed.append(f"webhook {webhook.state.name} ({error})")
        self.webhooks = started
        return failed

    def scored(self) -> None:
        """There are new scores to draw. Never blocks."""
        self._server.scored()

    def tell(self, event: Event) -> None:
        """Store and publish an event. Never blocks."""
        self._put(event)

    def running(self, stream: str, query_id: str) -> None:
        """A query runs on a stream: who asked for it is told its past now, and from here on what comes."""
        self._put(_Running(stream, query_id))

    def _put(self, item: Event | _Running) -> None:
        with self._arrived:
            if len(self._waiting) >= WAITING_LIMIT:
                oldest = self._waiting.popleft()
                if isinstance(oldest, Event):
                    self.lost += 1
                else:  # what stood before it is stored or lost
                    self._server.join(oldest.stream, oldest.query_id, self._log.last)
            self._waiting.append(item)
            self._arrived.notify()

    def _run(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting or self._closing)
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if not batch or not self._store([item for item in batch if isinstance(item, Event)]):
                break
            for item in batch:
                if isinstance(item, _Running):
                    self._server.join(item.stream, item.query_id, self._log.last)
        if lost := sum(isinstance(item, Event) for item in self._waiting):
            self._lose(lost)

    def _store(self, events: list[Event]) -> bool:
        """Stores and tells events, as soon as it can; False if it cannot before the end."""
        lost = self.lost
        while True:
            try:
                entries = self._log.append(events)
            except LogError as error:
                if self.problem is None:
                    log.error("%s: events wait until they can be stored", error)
                self.problem = str(error)
                if not self._may_retry():
                    self._lose(len(events))
                    return False
            except Exception:  # one event that cannot be stored must neither be the last that is told, nor take others
                if len(events) > 1:
                    return all([self._store([event]) for event in events])
                log.exception("an event cannot be stored")
                self._lose(len(events))
                return True
            else:
                if self.problem is not None:
                    self.problem = None
                    log.warning("events are stored again, %d were lost meanwhile", self.lost - lost)
                self._tell(events, entries)
                return True

    def _may_retry(self) -> bool:
        """Waits a little; whether there is time for another try."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._closing, RETRY_S)
        if self._closing:
            time.sleep(min(RETRY_S, DRAIN_S / 10))
        return time.monotonic() < self._until_s

    def _lose(self, count: int) -> None:
        with self._arrived:
            self.lost += count
        log.error("%d events are lost", count)

    def _tell(self, events: list[Event], entries: list[Entry]) -> None:
        if not entries:
            return
        if self._publisher:
            for event, entry in zip(events, entries, strict=True):
                self._publisher.publish(topic(event), entry.payload)
        self._server.wake()
        for webhook in self.webhooks:
            webhook.wake()
        now_ns = time.time_ns()
        for event in events:
            self.stored.append(now_ns - event.emitted_ns)


def _close(webhooks: Sequence[Webhook]) -> None:
    """All at once: each may take its time."""
    threads = [threading.Thread(target=webhook.close) for webhook in webhooks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
