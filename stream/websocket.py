"""Events over WebSocket: a server on loopback and a client for it. The only file that imports websockets.

`stream/switchboard.py` holds the protocol and the rules (who gets what, what a slow client loses); here they meet the
network.
"""

import asyncio
import contextlib
import errno
import logging
import re
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import connect

from kernels.errors import InputError
from stream.events import to_json
from stream.switchboard import Peer, Switchboard
from stream.types import Query

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_CLIENTS = 256
MAX_MESSAGE_BYTES = 64 * 1024
"""Of a message from a client. A larger one ends the connection (1009): the library cannot skip it."""
WRITE_LIMIT_BYTES = 16 * 1024
SEND_BUFFER_BYTES = 32 * 1024
CLOSE_TIMEOUT_S = 1.0
ORIGINS = (None, re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"))
"""Any page in a browser can reach loopback: only pages served from this machine, and programs, are let in."""


class Server:
    """Serves events on ws://127.0.0.1:`port`, in a thread of its own with one event loop.

    Each client has an Outbox and a task that empties it, so one that stops reading loses its own oldest messages (and
    is told) and slows nobody else. The callbacks (see Switchboard) run in the server's thread: while one runs, no
    client gets anything, and what is published waits in the loop. On close() every client leaves, with callbacks.
    """

    def __init__(self, port: int, on_subscribe: Callable[[str], Query], on_unsubscribe: Callable[[str], None]) -> None:
        """`port` 0 takes a free one; after start(), `port` tells which."""
        if not 0 <= port <= 65535:
            raise InputError(f"the WebSocket port must be a number from 0 to 65535, got {port}")
        self.port = port
        self._board = Switchboard(on_subscribe, on_unsubscribe)
        self._links: set[ServerConnection] = set()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Binds and begins to serve; clients can connect when it returns. InputError if it cannot bind."""
        try:
            listener = socket.create_server((HOST, self.port), backlog=MAX_CLIENTS)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port {self.port} (WebSocket) is taken by another program: stop that, or choose another port"
                ) from None
            raise InputError(f"cannot serve on {HOST}:{self.port}: {error}") from None
        # Accepted connections inherit it. The kernel would buffer megabytes for a client that does not read, all of
        # it stale by the time it reads again: what waits should wait in the Outbox, where the oldest goes first.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.port = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop, listener), name="websocket", daemon=True)
        self._thread.start()

    def publish(self, stream: str, query_id: str | None, payload: bytes) -> None:
        """Sends an event to those who want it; `query_id` None for a status. Never blocks; any thread may call.

        Before start() and after close() it does nothing.
        """
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
                self._loop.call_soon_threadsafe(self._fan_out, stream, query_id, payload)

    def close(self) -> None:
        """Says goodbye (1001) to every client and is back in about a second, even if one does not read."""
        if self._loop is None or self._thread is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: this is the second close()
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _fan_out(self, stream: str, query_id: str | None, payload: bytes) -> None:
        for peer in self._board.receivers(stream, query_id):
            peer.outbox.put(payload)
            peer.wake.set()

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        async with serve(
            self._talk,
            sock=listener,
            origins=ORIGINS,
            compression=None,  # would cost memory per client and time per event, to save bytes on loopback
            # No pings: the kernel tells when a peer on this machine dies, and one that is only slow may stay.
            ping_interval=None,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=MAX_MESSAGE_BYTES,
            max_queue=4,
            write_limit=WRITE_LIMIT_BYTES,
        ) as server:
            await self._stop.wait()
            server.close()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await server.wait_closed()
            except TimeoutError:
                # The library's close waits without limit for a client that does not read.
                for link in self._links:
                    link.transport.abort()

    async def _talk(self, link: ServerConnection) -> None:
        """One client, from its handshake until it has gone."""
        if len(self._links) == MAX_CLIENTS:
            await link.close(CloseCode.TRY_AGAIN_LATER, f"{MAX_CLIENTS} clients are connected, which is the most")
            return
        peer = Peer()
        self._links.add(link)
        self._board.peers.add(peer)
        writer = asyncio.create_task(self._write(link, peer))
        try:
            async for message in link:
                # Not through the outbox: an answer is never dropped, and a client that does not read its answers is
                # not read either. It is written before anything published later, since nothing is awaited in between.
                await link.send(self._board.answer(peer, message), text=True)
        except ConnectionClosed as error:
            log.debug("a client has gone: %s", error)
        finally:
            writer.cancel()
            self._links.discard(link)
            self._board.leave(peer)

    async def _write(self, link: ServerConnection, peer: Peer) -> None:
        with contextlib.suppress(ConnectionClosed):  # _talk hears of it too
            while True:
                while (message := peer.outbox.take()) is not None:
                    await link.send(message, text=True)  # returns when the client has taken most of it
                peer.wake.clear()
                await peer.wake.wait()


class Client:
    """One connection to a server, blocking, for one thread. Use it as a context manager."""

    def __init__(self, url: str, timeout_s: float = 3.0) -> None:
        """Raises InputError if `url` is none, ConnectionError if no server answers within `timeout_s`."""
        self._stack = contextlib.ExitStack()
        try:
            self._link = self._stack.enter_context(
                # proxy: loopback is not reached through the proxy that the environment may name
                connect(url, proxy=None, compression=None, open_timeout=timeout_s, close_timeout=CLOSE_TIMEOUT_S)
            )
        except (InvalidURI, ValueError) as error:
            raise InputError(f"{url} is not an address like ws://127.0.0.1:8765: {error}") from None
        except (OSError, WebSocketException) as error:
            raise ConnectionError(str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises ConnectionError when the server has gone, like `receive`."""
        try:
            self._link.send(to_json(message), text=True)
        except ConnectionClosed as error:
            raise ConnectionError(str(error)) from None

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None if none came in `timeout_s`."""
        try:
            return self._link.recv(timeout_s, decode=False)
        except TimeoutError:
            return None
        except ConnectionClosed as error:
            raise ConnectionError(str(error)) from None
