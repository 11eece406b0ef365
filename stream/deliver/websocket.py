"""Events over WebSocket: a server and a client for it. The only file that imports websockets.

`switchboard.py` holds the protocol and the rules (who gets what, what a slow client loses); here they meet the network.
"""

import asyncio
import contextlib
import errno
import hmac
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.sync.client import connect

from kernels.errors import InputError, LogError
from stream.config.rules import is_loopback
from stream.config.schema import Limits
from stream.deliver.log import EventLog
from stream.deliver.peer import Join, Peer
from stream.deliver.switchboard import Program, Switchboard
from stream.events import to_json

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
WRITE_LIMIT_BYTES = 16 * 1024
SEND_BUFFER_BYTES = 32 * 1024
CLOSE_TIMEOUT_S = 1.0
HANDSHAKE_TIMEOUT_S = 5.0
KEEPALIVE_S = 60
RETRY_S = 1.0
ORIGINS = (None, re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"))
"""Any page in a browser can reach loopback: only pages served from this machine, and programs, are let in."""


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
    ) -> None:
        """
        Args:
            port: 0 takes a free one; after start(), `port` tells which.
            history_s: how much of the past is kept for backfill.
            token: what every client must send, as `Authorization: Bearer TOKEN` or as ?token=TOKEN.
            tls: certificate chain and key, PEM.
        """
        if not 0 <= port <= 65535:
            raise InputError(f"the WebSocket port must be a number from 0 to 65535, got {port}")
        if token is None and not is_loopback(host):
            raise InputError(f"binding to {host} without a token lets anybody in: set a token or bind to {HOST}")
        self.port = port
        self._host, self._token, self._log = host, token, log
        self._tls = _tls_context(*tls) if tls else None
        self._board = Switchboard(program, log, limits, history_s)
        self._links: set[ServerConnection] = set()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where programs on this machine reach it."""
        host = self._host if self._host not in ("0.0.0.0", "::", "") else HOST
        return f"{'wss' if self._tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def clients(self) -> int:
        return len(self._links)

    def start(self) -> None:
        """Binds and begins to serve; clients can connect when it returns. InputError if it cannot bind."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self.port), family=family, backlog=self._board.limits.clients)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port {self.port} (WebSocket) is taken by another program: stop that, or choose another port"
                ) from None
            raise InputError(f"cannot serve on {self._host}:{self.port}: {error}") from None
        # Accepted connections inherit both. The kernel would buffer megabytes for a client that does not read, all of
        # it stale by the time it reads again; and it finds out about hosts that went without a word.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        self.port = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop, listener), name="websocket", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """The log has grown. Never blocks; any thread may call.

        Before start() and after close() it does nothing.
        """
        self._call(self._wake)

    def join(self, stream: str, query_id: str, number: int) -> None:
        """See `Switchboard.join`. Never blocks; any thread may call."""
        self._call(self._board.join, stream, query_id, number)

    def limit(self, limits: Limits) -> None:
        """Other limits from now on, but for the length of messages."""
        self._board.limits = limits

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
        for peer in self._board.peers:
            peer.wake.set()

    def _run(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        logging.getLogger("asyncio").addFilter(_is_news)
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        async with serve(
            self._talk,
            sock=listener,
            ssl=self._tls,
            process_request=self._admit,
            # Without a token any page in a browser could reach loopback: only pages of this machine, and programs.
            origins=ORIGINS if self._token is None else None,
            compression=None,  # would cost memory per client and time per event, to save bytes on loopback
            ping_interval=None,  # one that is only slow may stay, and TCP tells of those that have gone
            open_timeout=HANDSHAKE_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=self._board.limits.message_bytes,
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
        given = parse_qs(request.path.partition("?")[2]).get("token", [""])[-1]
        for header in request.headers.get_all("Authorization"):
            given = header.removeprefix("Bearer ").strip()
        if hmac.compare_digest(given.encode(errors="replace"), self._token.encode()):
            return None
        return link.respond(HTTPStatus.UNAUTHORIZED, "the token is wrong or missing: Authorization: Bearer TOKEN\n")

    async def _talk(self, link: ServerConnection) -> None:
        """One client, from its handshake until it has gone."""
        if len(self._links) >= self._board.limits.clients:
            most = self._board.limits.clients
            await link.close(CloseCode.TRY_AGAIN_LATER, f"{most} clients are connected, which is the most")
            return
        peer = self._board.enter()
        self._links.add(link)
        writer = asyncio.create_task(self._write(link, peer))
        try:
            async for message in link:
                # A client that does not read its answers is not read either. The answer is written before anything
                # that it leads to, since nothing is awaited in between.
                await link.send(await self._board.answer(peer, message), text=True)
        except ConnectionClosed as error:
            log.debug("a client has gone: %s", error)
        finally:
            writer.cancel()
            self._links.discard(link)
            self._board.leave(peer)

    async def _write(self, link: ServerConnection, peer: Peer) -> None:
        """Follow the log for one client; `send` returns when the client has taken most of it."""
        try:
            while True:
                await peer.wake.wait()
                peer.wake.clear()
                while (join := peer.due()) or peer.position < self._log.last:
                    try:
                        await (self._tell_past(link, peer, join) if join else self._tell_next(link, peer))
                    except LogError as error:  # the disk fails: try again, later
                        log.warning("%s", error)
                        await asyncio.sleep(RETRY_S)
        except ConnectionClosed:
            pass  # _talk hears of it too
        except Exception:  # without its writer a client would wait for ever
            log.exception("a client is given up")
            await link.close(CloseCode.INTERNAL_ERROR)

    async def _tell_next(self, link: ServerConnection, peer: Peer) -> None:
        position = peer.position
        if self._log.remembers(position):
            entries = self._log.read(position)
        else:
            entries = await asyncio.to_thread(self._log.read, position)
        if entries and position == peer.position:  # while the disk was read it may have had to go back
            for payload in peer.passed(entries):
                await link.send(payload, text=True)
        await asyncio.sleep(0)  # `send` to who reads fast does not wait: the others have their turn, too

    async def _tell_past(self, link: ServerConnection, peer: Peer, join: Join) -> None:
        want, number = join.want, join.number
        if want.since_ns is None:
            number = peer.position
        else:
            query = join.stream, want.query_id
            past = await asyncio.to_thread(self._log.of_query, *query, want.since_ns, number + 1)
            for entry in past:
                if want.over:
                    return
                if want.lets_through(entry):
                    await link.send(entry.payload, text=True)
        if not want.over:
            peer.joins.remove(join)
            caught_up = {"op": "caught_up", "query_id": want.query_id, "stream": join.stream, "lognumber": number}
            await link.send(to_json(caught_up), text=True)


def _is_news(record: logging.LogRecord) -> bool:
    """A client that sends pings and hangs up would write a line into our log for each."""
    return "socket.send() raised" not in str(record.msg)


def _tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"cannot use {certificate} with {key} for TLS: {error}") from None
    return context


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
