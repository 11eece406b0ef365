"""What every server here asks of who comes in, whatever they speak: an address, TLS, the token, the right origin."""

import asyncio
import errno
import hmac
import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from kernels.errors import InputError
from stream.config.rules import is_loopback
from stream.deliver.log import EventLog
from stream.deliver.switchboard import Switchboard

HOST = "127.0.0.1"
CLOSE_TIMEOUT_S = 1.0
WRITE_LIMIT_BYTES = 16 * 1024
"""What may wait in memory for one client; beyond, nothing more is written until it has read."""
_SEND_BUFFER_BYTES = 32 * 1024
_KEEPALIVE_S = 60
_LOOPBACK = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
ORIGINS = (None, re.compile(rf"https?://{_LOOPBACK}"))
"""Any page in a browser can reach loopback: only pages served from this machine, and programs, are let in."""


class Door(Protocol):
    """One more way in: another protocol, on a port of its own, to the same rules."""

    def bind(self) -> None:
        """Take the port. InputError if it cannot."""

    async def serve(self, board: Switchboard, log: EventLog, stop: asyncio.Event) -> None:
        """Let clients in until `stop` is set; every one has left when it returns."""


def check_bind(host: str, token: str | None) -> None:
    """
    Raises:
        InputError: anybody in the network could come in.
    """
    if token is None and not is_loopback(host):
        raise InputError(f"binding to {host} without a token lets anybody in: set a token or bind to {HOST}")


def check_port(port: int, what: str) -> None:
    """
    Raises:
        InputError: it is no port.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"the {what} port must be a number from 0 to 65535, got {port}")


def listen(host: str, port: int, what: str, backlog: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. InputError if it cannot bind. `what`: the name for people."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} ({what}) is taken by another program: stop that, or choose another port"
            ) from None
        raise InputError(f"cannot serve on {host}:{port}: {error}") from None
    # Accepted connections inherit both. The kernel would buffer megabytes for a client that does not read, all of
    # it stale by the time it reads again; and it finds out about hosts that went without a word.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    return listener


def url(scheme: str, host: str, port: int, *, tls: bool) -> str:
    """Where programs on this machine reach it. scheme: without the s of TLS."""
    host = host if host not in ("0.0.0.0", "::", "") else HOST
    return f"{scheme}{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Certificate chain and key, PEM. InputError if they are none, or not of each other."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"cannot use {certificate} with {key} for TLS: {error}") from None
    return context


def token_of(authorization: list[str], query: Mapping[str, str]) -> str:
    """The token that a request brings: `Authorization: Bearer TOKEN` counts before ?token=TOKEN; "" if none."""
    given = query.get("token", "")
    for header in authorization:
        given = header.removeprefix("Bearer ").strip()
    return given


def same(given: str, secret: str) -> bool:
    """Whether they are equal; how long it takes tells nothing."""
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())


def is_this_machine(host: str) -> bool:
    """Whether a request was addressed to loopback by a name that no foreign DNS server answers for."""
    return re.fullmatch(_LOOPBACK, host) is not None
