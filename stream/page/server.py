"""The page and all that it loads, over HTTP, with a WebSocket beside it. The only file that imports aiohttp.

/  /static/FILE                            the page: holds no data, needs no token
/login                                     POST {"token": T}: a cookie, for a browser that cannot send headers
/ws                                        the protocol of stream/deliver/switchboard.py
/streams/NAME/picture.jpg                  the newest picture
/streams/NAME/pictures/UTC_MS.jpg          the small one that was looked at last at that time
/streams/NAME/moments.vtt, .otio, .jsonl   the closed moments of the log
/clips/FILE                                clips and their thumbnails
/healthz  /readyz  /metrics                the first two need no token
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, WSMsgType, web

from kernels.errors import InputError, LogError
from stream.deliver import entrance
from stream.deliver.conversation import Gone, converse
from stream.deliver.entrance import CLOSE_TIMEOUT_S, HOST, WRITE_LIMIT_BYTES
from stream.deliver.log import EventLog
from stream.deliver.switchboard import Switchboard
from stream.export.formats import FORMATS, TYPES, Format

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
COOKIE = "livemoments"
BODY_BYTES = 4096
"""What a request may bring along."""
WRONG_TOKEN_S = 0.5
"""An answer to a wrong token waits for so long: who guesses has time for few."""
HEADERS = {
    # Nothing is loaded from elsewhere, and nobody shows the page inside of theirs.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks whether it has changed: a new version is seen at once
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Program(Protocol):
    """What is shown. All may be called from any thread; those that look into files take a little time."""

    def picture(self, stream: str) -> bytes | None:
        """The newest, as JPEG."""

    def picture_at(self, stream: str, utc_ns: int) -> bytes | None:
        """The one that was looked at last at that time, as JPEG."""

    def clip(self, name: str) -> Path | None:
        """A file of the clips' folder."""

    def export(self, stream: str, kind: Format, given: Mapping[str, str], base: str) -> bytes:
        """See `formats.export`."""

    def metrics(self) -> tuple[bytes, str]:
        """In Prometheus' text format, and its content type."""

    def health(self) -> tuple[bool, list[str]]:
        """Whether it works, or must be started again; and why not."""

    def readiness(self) -> tuple[bool, list[str]]:
        """Whether it can serve; and what is not as it should be."""


class Page:
    """Serves it on http://HOST:`port`. A `Door`: `bind`, then `serve` in an event loop."""

    def __init__(
        self,
        program: Program,
        *,
        port: int,
        host: str = HOST,
        token: str | None = None,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """port: 0 takes a free one; after bind(), `port` tells which. The others: see `websocket.Server`."""
        entrance.check_port(port, "page")
        entrance.check_bind(host, token)
        self.port = port
        self._program, self._host, self._token = program, host, token
        self._tls = entrance.tls_context(*tls) if tls else None
        # What a cookie holds: it outlives a restart, and who finds it does not learn the token.
        self._pass = hmac.new((token or "").encode(), b"page", hashlib.sha256).hexdigest()
        self._listener: socket.socket | None = None
        self._links: dict[web.WebSocketResponse, asyncio.WriteTransport] = {}

    @property
    def url(self) -> str:
        return entrance.url("http", self._host, self.port, tls=self._tls is not None)

    def bind(self) -> None:
        self._listener = entrance.listen(self._host, self.port, "page", 128)
        self.port = self._listener.getsockname()[1]

    async def serve(self, board: Switchboard, log: EventLog, stop: asyncio.Event) -> None:
        assert self._listener is not None
        self._board, self._log = board, log
        app = web.Application(middlewares=[self._guard], client_max_size=BODY_BYTES)
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/", _index)
        app.router.add_static("/static/", STATIC)
        app.router.add_post("/login", self._login)
        for path, handler in (
            ("/ws", self._talk),
            ("/streams/{stream}/picture.jpg", self._picture),
            (r"/streams/{stream}/pictures/{utc_ms:\d{1,15}}.jpg", self._picture_at),
            (r"/streams/{stream}/moments.{kind:\w+}", self._export),
            (r"/clips/{name}", self._clip),
            ("/healthz", self._health),
            ("/readyz", self._readiness),
            ("/metrics", self._metrics),
        ):
            app.router.add_get(path, handler)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=CLOSE_TIMEOUT_S)
        await runner.setup()
        try:
            await web.SockSite(runner, self._listener, ssl_context=self._tls).start()
            await stop.wait()
        finally:
            links = list(self._links.items())
            for link, _ in links:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S / len(links)):
                        await link.close(code=WSCloseCode.GOING_AWAY, drain=False)
            await runner.cleanup()
            for _, transport in links:
                transport.abort()  # a client that does not read: what waits for it would keep the connection

    # -- who may come in

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "")
        if self._token is None and not entrance.is_this_machine(host):
            # A page from elsewhere may have its name answered with 127.0.0.1: its requests would count as our own.
            self._board.tally.connections["host"] += 1
            raise web.HTTPForbidden(text=f"this is for http://{HOST}:{self.port}, not for {host[:80]!r}\n")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            self._board.tally.connections["origin"] += 1
            raise web.HTTPForbidden(text="only its own page may use this\n")
        public = request.path in ("/", "/login", "/healthz", "/readyz") or request.path.startswith("/static/")
        if self._token is not None and not public and not self._knows(request):
            self._board.tally.connections["token"] += 1
            raise web.HTTPUnauthorized(text="the token is wrong or missing: Authorization: Bearer TOKEN\n")
        try:
            return await handler(request)
        except InputError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        except LogError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None

    def _knows(self, request: web.Request) -> bool:
        assert self._token is not None
        given = entrance.token_of(request.headers.getall("Authorization", []), request.query)
        return entrance.same(given, self._token) or entrance.same(request.cookies.get(COOKIE, ""), self._pass)

    async def _login(self, request: web.Request) -> web.StreamResponse:
        try:
            given = json.loads(await request.text())["token"]
        except (ValueError, KeyError, TypeError, web.HTTPRequestEntityTooLarge):
            raise web.HTTPBadRequest(text='send {"token": "..."}\n') from None
        if self._token is not None and not (isinstance(given, str) and entrance.same(given, self._token)):
            self._board.tally.connections["token"] += 1
            await asyncio.sleep(WRONG_TOKEN_S)
            raise web.HTTPUnauthorized(text="the token is wrong\n")
        response = web.json_response({"ok": True})
        # Not for scripts, nor for requests that other pages make.
        response.set_cookie(COOKIE, self._pass, httponly=True, samesite="Strict", secure=self._tls is not None)
        return response

    # -- what there is

    async def _talk(self, request: web.Request) -> web.StreamResponse:
        if self._board.full:
            self._board.tally.connections["clients"] += 1
            raise web.HTTPServiceUnavailable(
                text=f"{self._board.limits.clients} clients are connected, which is the most\n"
            )
        link = web.WebSocketResponse(
            max_msg_size=self._board.limits.message_bytes,
            compress=False,
            timeout=CLOSE_TIMEOUT_S,
            writer_limit=WRITE_LIMIT_BYTES,
        )
        await link.prepare(request)
        assert isinstance(request.transport, asyncio.WriteTransport)
        self._links[link] = request.transport
        try:
            await converse(_Link(link), self._board, self._log)
        finally:
            self._links.pop(link)
        return link

    async def _picture(self, request: web.Request) -> web.StreamResponse:
        stream = request.match_info["stream"]
        return _jpeg(await asyncio.to_thread(self._program.picture, stream), f"no picture of {stream} yet")

    async def _picture_at(self, request: web.Request) -> web.StreamResponse:
        stream, utc_ms = request.match_info["stream"], int(request.match_info["utc_ms"])
        found = self._program.picture_at(stream, utc_ms * 1_000_000)
        return _jpeg(found, f"no picture of {stream} is kept of that time", lasts=True)

    async def _export(self, request: web.Request) -> web.StreamResponse:
        stream, asked = request.match_info["stream"], request.match_info["kind"]
        if (kind := next((each for each in FORMATS if each == asked), None)) is None:
            raise web.HTTPNotFound(text=f"moments are given as {', '.join(FORMATS)}\n")
        base = f"{request.scheme}://{request.host}"
        body = await asyncio.to_thread(self._program.export, stream, kind, dict(request.query), base)
        name = f'attachment; filename="{stream}.{kind}"'
        return web.Response(body=body, headers={"Content-Type": TYPES[kind], "Content-Disposition": name})

    async def _clip(self, request: web.Request) -> web.StreamResponse:
        if (path := await asyncio.to_thread(self._program.clip, request.match_info["name"])) is None:
            raise web.HTTPNotFound(text="there is no such clip: it may have made room for newer ones\n")
        return web.FileResponse(path)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return _state(*self._program.health())

    async def _readiness(self, request: web.Request) -> web.StreamResponse:
        ok, reasons = self._program.readiness()
        # They name streams, which is nothing for who has no token.
        return _state(ok, reasons if self._token is None or self._knows(request) else [])

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        body, content_type = await asyncio.to_thread(self._program.metrics)
        return web.Response(body=body, headers={"Content-Type": content_type})


class _Link:
    """A WebSocket as conversations take it."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def messages(self) -> AsyncIterator[str | bytes]:
        too_large = False
        async for message in self._socket:
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                yield message.data
            else:  # the socket's own code is by now how the client took it
                too_large = getattr(message.data, "code", None) == WSCloseCode.MESSAGE_TOO_BIG
        raise Gone(f"code {self._socket.close_code}", too_large=too_large)

    async def send(self, payload: bytes) -> None:
        try:
            await self._socket.send_frame(payload, WSMsgType.TEXT)
        except ConnectionError as error:
            raise Gone(str(error)) from None

    async def give_up(self) -> None:
        await self._socket.close(code=WSCloseCode.INTERNAL_ERROR)


async def _index(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(STATIC / "index.html")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


def _jpeg(body: bytes | None, otherwise: str, *, lasts: bool = False) -> web.Response:
    if body is None:
        raise web.HTTPNotFound(text=f"{otherwise}\n")
    headers = {"Cache-Control": "private, max-age=3600"} if lasts else {}
    return web.Response(body=body, content_type="image/jpeg", headers=headers)


def _state(ok: bool, reasons: list[str]) -> web.Response:
    body: dict[str, Any] = {"ok": ok, "reasons": reasons}
    return web.json_response(body, status=200 if ok else 503)
