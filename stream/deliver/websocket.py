"""Events over WebSocket: a server and a client for it. The only file that imports websockets.

`switchboard.py` holds the protocol and the rules (who gets what, what a slow client loses); here they meet the network.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.sync.client import connect

from kernels.errors import InputError
from stream.config.schema import Limits
from stream.deliver import entrance
from stream.deliver.conversation import Gone, converse
from stream.deliver.entrance import CLOSE_TIMEOUT_S, HOST, WRITE_LIMIT_BYTES, Door
from stream.deliver.log import EventLog
from stream.deliver.switchboard import Program, Switchboard
from stream.events import to_json

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0


class Server:
    """Serves events on ws://HOST:`port`, in a thread of its own with one event loop.

    Each client has a task that follows the event log for it, so one that stops reading falls behind and slows nobody
    else. Program.encode runs in threads of a pool; whatever else clients ask is done in the loop. On close() every
    client leaves, and lets go of what it held.
    """

    def __init__(
        self,
        program: Program,
        log: EventLog,
        *,
        port: int,
        host: str = HOST,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        history_s: float = 0.0,
        token: str | None = None,
        tls: tuple[Path, Path] | None = None,
        doors: Sequence[Door] = (),
    ) -> None:
        """
        Args:
            port: 0 takes a free one; after start(), `port` tells which.
            history_s: how much of the past is kept for backfill.
            token: what every client must send, as `Authorization: Bearer TOKEN` or as ?token=TOKEN.
            tls: certificate chain and key, PEM.
            doors: other servers that let clients in to the same rules, in the same event loop.
        """
        entrance.check_port(port, "WebSocket")
        entrance.check_bind(host, token)
        self.port = port
        self._host, self._token, self._log = host, token, log
        self._tls = entrance.tls_context(*tls) if tls else None
        self.board = Switchboard(program, log, limits, history_s)
        self._doors = doors
        self._links: set[ServerConnection] = set()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where programs on this machine reach it."""
        return entrance.url("ws", self._host, self.port, tls=self._tls is not None)

    @property
    def alive(self) -> bool:
        """Its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def clients(self) -> int:
        """Those of all doors."""
        return len(self.board.peers)

    def start(self) -> None:
        """Binds and begins to serve; clients can connect when it returns. InputError if it cannot bind."""
        listener = entrance.listen(self._host, self.port, "WebSocket", self.board.limits.clients)
        self.port = listener.getsockname()[1]
        try:
            for door in self._doors:
                door.bind()
        except BaseException:
            listener.close()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop, listener), name="websocket", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """The log has grown. Never blocks; any thread may call.

        Before start() and after close() it does nothing.
        """
        self._call(self._wake)

    def scored(self) -> None:
        """There are new scores, for clients that follow the curves. Never blocks; any thread may call."""
        if self.board.curious:
            self._call(self.board.wake_curious)

    def join(self, stream: str, query_id: str, number: int) -> None:
        """See `Switchboard.join`. Never blocks; any thread may call."""
        self._call(self.board.join, stream, query_id, number)

    def limit(self, limits: Limits) -> None:
        """Other limits from now on, but for the length of messages."""
        self.board.limits = limits

    def close(self) -> None:
        """Says goodbye (1001) to every client and is back in about a second, even if one does not read."""
        if self._thread is None:
            return
        self._call(self._stop.set)
        self._thread.join()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
                self._loop.call_soon_threadsafe(function, *arguments)

    def _wake(self) -> None:
        for peer in self.board.peers:
            peer.wake.set()

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        logging.getLogger("asyncio").addFilter(_is_news)
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._serve_all(listener))

    async def _serve_all(self, listener: socket.socket) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve(listener))
            for door in self._doors:
                group.create_task(door.serve(self.board, self._log, self._stop))

    async def _serve(self, listener: socket.socket) -> None:
        async with serve(
            self._talk,
            sock=listener,
            ssl=self._tls,
            process_request=self._admit,
            process_response=self._answered,
            # Without a token any page in a browser could reach loopback: only pages of this machine, and programs.
            origins=entrance.ORIGINS if self._token is None else None,
            compression=None,  # would cost memory per client and time per event, to save bytes on loopback
            ping_interval=None,  # one that is only slow may stay, and TCP tells of those that have gone
            open_timeout=HANDSHAKE_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=self.board.limits.message_bytes,
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

    def _admit(self, link: ServerConnection, request: Request) -> Response | None:
        if self._token is None:
            return None
        query = dict(parse_qsl(request.path.partition("?")[2]))
        if entrance.same(entrance.token_of(request.headers.get_all("Authorization"), query), self._token):
            return None
        self.board.tally.connections["token"] += 1
        return link.respond(HTTPStatus.UNAUTHORIZED, "the token is wrong or missing: Authorization: Bearer TOKEN\n")

    def _answered(self, link: ServerConnection, request: Request, response: Response) -> None:
        if response.status_code == HTTPStatus.FORBIDDEN:  # the library's answer to a foreign origin
            self.board.tally.connections["origin"] += 1

    async def _talk(self, link: ServerConnection) -> None:
        """One client, from its handshake until it has gone."""
        if self.board.full:
            most = self.board.limits.clients
            self.board.tally.connections["clients"] += 1
            await link.close(CloseCode.TRY_AGAIN_LATER, f"{most} clients are connected, which is the most")
            return
        self._links.add(link)
        try:
            await converse(_Link(link), self.board, self._log)
        finally:
            self._links.discard(link)


class _Link:
    """A connection as conversations take it."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    async def messages(self) -> AsyncIterator[str | bytes]:
        try:
            async for message in self._connection:
                yield message
        except ConnectionClosed as error:
            too_large = error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG
            raise Gone(str(error), too_large=too_large) from None

    async def send(self, payload: bytes) -> None:
        try:
            await self._connection.send(payload, text=True)
        except ConnectionClosed as error:
            raise Gone(str(error)) from None

    async def give_up(self) -> None:
        await self._connection.close(CloseCode.INTERNAL_ERROR)


def _is_news(record: logging.LogRecord) -> bool:
    """A client that sends pings and hangs up would write a line into our log for each."""
    return "socket.send() raised" not in str(record.msg)


class Client:
    """One connection to a server, blocking, for one thread. Use it as a context manager."""

    def __init__(
        self, url: str, timeout_s: float = 3.0, *, token: str | None = None, certificate: Path | None = None
    ) -> None:
        """
        Args:
            token: what the server asks for.
            certificate: PEM of whom to trust over wss://, beside the system's authorities.
        Raises:
            InputError: `url` is no address, the token is refused, or the certificate is no good or not trusted.
            ConnectionError: no server answers within `timeout_s`.
        """
        trust = _trust(certificate) if url.startswith("wss:") else None
        self._stack = contextlib.ExitStack()
        try:
            self._link = self._stack.enter_context(
                # proxy: loopback is not reached through the proxy that the environment may name
                connect(
                    url,
                    proxy=None,
                    ssl=trust,
                    additional_headers={"Authorization": f"Bearer {token}"} if token else None,
                    compression=None,
                    open_timeout=timeout_s,
                    close_timeout=CLOSE_TIMEOUT_S,
                )
            )
        except ssl.SSLCertVerificationError as error:
            raise InputError(
                f"{url} is not trusted ({error.verify_message}): give its certificate, or that of who signed it"
            ) from None
        except (InvalidURI, ValueError) as error:
            raise InputError(f"{url} is not an address like ws://127.0.0.1:8765: {error}") from None
        except InvalidStatus as error:
            if error.response.status_code == HTTPStatus.UNAUTHORIZED:
                raise InputError(f"{url} refuses: the token is wrong or missing") from None
            raise ConnectionError(str(error)) from None
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


def _trust(certificate: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if certificate:
        try:
            context.load_verify_locations(certificate)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror if error.strerror and not isinstance(error, ssl.SSLError) else "it is no PEM"
            raise InputError(f"the certificate {certificate} cannot be used: {reason}") from None
    return context
