"""Events over ZeroMQ: a PUB socket and a reader for it, in the clear on loopback or with keys (CURVE) anywhere.

The only file that imports zmq. A key is 40 characters of Z85 text. The publisher has a pair and so has every client:
who holds no listed key gets nothing, and what travels is encrypted.
"""

import contextlib
import errno
import ipaddress
import socket
import struct
import threading
import time
from collections.abc import Collection
from typing import Self

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from kernels.errors import InputError

HIGH_WATER = 1000
"""Messages kept for one subscriber that does not keep up. What comes beyond is dropped."""
LINGER_MS = 200
"""How long close() lets the last messages leave."""
MAX_PREFIX_BYTES = 1 << 16
"""Longest thing a client may send: all it has to say is a prefix. ZeroMQ would allocate whatever it announces."""
_GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0"
"""How each side of a connection begins (ZMTP 3): the signature and the version. What protects it (20 bytes) follows."""
_ZAP_DOMAIN = "livemoments"


def new_keys() -> tuple[str, str]:
    """A new pair of CURVE keys in Z85: (public, secret)."""
    _need_curve()
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_key(secret_key: str) -> str:
    """The public key that belongs to `secret_key`. InputError if that is no key; the text does not show it."""
    _check_key("the secret key", secret_key)
    return zmq.curve_public(secret_key.encode()).decode()


def _check_key(name: str, key: str) -> None:
    _need_curve()
    if not is_key(key):
        raise InputError(f"{name} for ZeroMQ is no CURVE key: it must be 40 characters of Z85, as new keys are printed")


def is_key(text: str) -> bool:
    """Whether it is a CURVE key, 32 bytes in Z85."""
    try:
        return len(z85.decode(text)) == 32
    except (ValueError, KeyError, struct.error):  # whatever z85 stumbles over
        return False


def _need_curve() -> None:
    if not zmq.has("curve"):
        raise InputError("this build of ZeroMQ has no CURVE, so it takes no keys: install pyzmq from PyPI, or use none")


class _Clients:
    """Answers for the authenticator which clients are let in."""

    def __init__(self, public_keys: Collection[str]) -> None:
        self._keys = frozenset(key.encode() for key in public_keys)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


class Publisher:
    """Sends [topic, JSON] to whoever is connected. Never blocks; any thread may publish.

    Failure mode: each subscriber has a queue of HIGH_WATER messages of its own. When one is full, ZeroMQ silently
    drops the NEWEST messages for that subscriber alone; it sees the gap in `seq`. A subscriber that connects gets
    what is published from then on.
    """

    def __init__(self, port: int, *, host: str = "127.0.0.1", curve: tuple[str, Collection[str]] | None = None) -> None:
        """Binds tcp://`host`:`port`, or a free port if 0: `address` tells. InputError if it cannot.

        `host` is an IP address of this machine, 0.0.0.0 or :: for all of them. `curve` is (secret key of this
        publisher, public keys of the clients that are let in); without it, only loopback may be bound.
        """
        if not 0 <= port <= 65535:  # ZeroMQ itself would take it modulo 65536
            raise InputError(f"the ZeroMQ port must be a number from 0 to 65535, got {port}")
        endpoint = _endpoint(host, port, open_to_all=curve is None)
        secret_key, clients = curve if curve else ("", ())
        if curve:
            _check_keys(secret_key, clients)
        self._lock = threading.Lock()  # a ZeroMQ socket is not for two threads at once
        # A context of its own, because a context has one place where keys are checked.
        self._context: zmq.SyncContext = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._socket: zmq.SyncSocket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_PREFIX_BYTES)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            if curve:
                self._let_in(secret_key, clients)
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port {port} (ZeroMQ) is taken by another program: stop that, or choose another port"
                ) from None
            raise InputError(f"cannot publish on tcp://{host}:{port}: {error.strerror}") from None
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    def _let_in(self, secret_key: str, clients: Collection[str]) -> None:
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN, _Clients(clients))
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key.encode())
        self._socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
        # Otherwise ZeroMQ lets everybody in whenever nobody is there to check keys.
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def publish(self, topic: str, payload: bytes) -> None:
        """Queues one message. After close() it does nothing."""
        with self._lock:
            if not self._socket.closed:
                self._socket.send_multipart([topic.encode(), payload], flags=zmq.NOBLOCK)

    def close(self) -> None:
        """Returns when the last messages have left, or after LINGER_MS."""
        with self._lock:
            self._socket.close()
            if self._authenticator:
                self._authenticator.stop()
            self._context.term()


def _endpoint(host: str, port: int, *, open_to_all: bool) -> str:
    try:
        ip = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InputError(f"the ZeroMQ host must be an IP address of this machine, got {host!r}") from None
    if open_to_all and not ip.is_loopback:
        raise InputError(f"ZeroMQ on {host} would be open to everyone in the network: give keys, or use 127.0.0.1")
    return f"tcp://{f'[{ip}]' if ip.version == 6 else ip}:{port or '*'}"


def _check_keys(secret_key: str, clients: Collection[str]) -> None:
    _check_key("the secret key", secret_key)
    if not clients:
        raise InputError("no client keys are listed for ZeroMQ, so nobody could connect: list their public keys")
    for number, key in enumerate(clients, 1):
        _check_key(f"client key {number}", key)


class Subscriber:
    """Reads one publisher, from one thread. Use it as a context manager.

    Failure mode: a reader that falls behind has HIGH_WATER messages waiting on its own side, then as many at the
    publisher, then the newest are dropped there.
    """

    def __init__(
        self,
        address: str,
        prefix: str,
        timeout_s: float = 3.0,
        *,
        server_key: str | None = None,
        secret_key: str | None = None,
    ) -> None:
        """Connects to `address` and asks for the topics that begin with `prefix`.

        A publisher with keys wants both: `server_key` is its public key, `secret_key` that of this client.
        Raises InputError for an address or a key that is none, ConnectionError if no publisher answers in `timeout_s`
        or the keys are refused. The publisher hears of the prefix a moment later than this returns: what it sends
        before that does not come.
        """
        keys = _client_keys(server_key, secret_key)
        self._has_keys = bool(keys)
        self._socket: zmq.SyncSocket = zmq.SyncContext.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))  # always on, it would look for localhost at ::1 alone
        self._socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
        for option, key in keys.items():
            self._socket.setsockopt(option, key.encode())
        # ZeroMQ would reconnect without a word. A live view must say that nothing comes any more, so watch the link.
        self._link: zmq.SyncSocket = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED
            | zmq.Event.HANDSHAKE_FAILED_AUTH
            | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
            | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
            | zmq.Event.DISCONNECTED
        )
        try:
            try:
                self._socket.connect(address)
            except zmq.ZMQError as error:
                raise InputError(f"{address} is not an address like tcp://127.0.0.1:5555: {error}") from None
            self._await_handshake(address, timeout_s)
        except BaseException:
            self.close()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._link, zmq.POLLIN)

    def _await_handshake(self, address: str, timeout_s: float) -> None:
        if not self._link.poll(round(timeout_s * 1000)):
            raise ConnectionError(f"no ZeroMQ publisher answers within {timeout_s:g} s")
        match recv_monitor_message(self._link)["event"]:
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                return
            case zmq.Event.HANDSHAKE_FAILED_AUTH:
                raise ConnectionError("the keys were refused: the publisher does not list this client's public key")
        # Both hang up at the first thing they do not like, and whether ZeroMQ learns why is a race. So look for it.
        match _mechanism(address, timeout_s), self._has_keys:
            case b"CURVE", True:
                raise ConnectionError("the keys were refused: the publisher has another public key")
            case b"CURVE", False:
                raise ConnectionError("the keys were refused: the publisher wants keys, and none were given")
            case b"NULL", True:
                raise ConnectionError("the keys were refused: the publisher takes none")
        raise ConnectionError("what listens there is no ZeroMQ publisher")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def receive(self, timeout_s: float) -> bytes | None:
        """The next payload, None if none came in `timeout_s`. ConnectionError once the publisher has gone."""
        deadline = time.monotonic() + timeout_s
        while True:
            ready = dict(self._poller.poll(max(0, round((deadline - time.monotonic()) * 1000))))
            if self._socket in ready:  # first what has come, then the bad news
                return self._socket.recv_multipart()[-1]
            if not ready:
                return None
            if recv_monitor_message(self._link)["event"] == zmq.Event.DISCONNECTED:
                raise ConnectionError("the publisher has gone")

    def close(self) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the monitor of a socket that never connected may be gone already
            self._socket.disable_monitor()
        self._link.close()
        self._socket.close()


def _client_keys(server_key: str | None, secret_key: str | None) -> dict[int, str]:
    """The socket options that carry a client's keys; none if it has none."""
    if server_key is None and secret_key is None:
        return {}
    if server_key is None or secret_key is None:
        raise InputError("ZeroMQ with keys needs both the publisher's public key and a secret key of your own")
    _check_key("the publisher's public key", server_key)
    own_key = public_key(secret_key)
    return {zmq.CURVE_SERVERKEY: server_key, zmq.CURVE_PUBLICKEY: own_key, zmq.CURVE_SECRETKEY: secret_key}


def _mechanism(address: str, timeout_s: float) -> bytes | None:
    """What protects the connections to a ZeroMQ socket, b"NULL" or b"CURVE"; None if it does not speak ZeroMQ."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    start, deadline = b"", time.monotonic() + timeout_s
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as link:
            link.sendall(_GREETING)
            while len(start) < len(_GREETING) + 20 and time.monotonic() < deadline:
                if not (piece := link.recv(64)):
                    return None
                start += piece
    except (OSError, ValueError):  # ValueError: an address that only ZeroMQ understands
        return None
    signed = start[:1] == b"\xff" and start[9:10] == b"\x7f"
    return start[len(_GREETING) : len(_GREETING) + 20].rstrip(b"\0") if signed else None
