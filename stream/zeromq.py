"""Events over ZeroMQ: a PUB socket on loopback and a reader for it. The only file that imports zmq."""

import contextlib
import errno
import threading
import time
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from kernels.errors import InputError

HIGH_WATER = 1000
"""Messages kept for one subscriber that does not keep up. What comes beyond is dropped."""
LINGER_MS = 200
"""How long close() lets the last messages leave."""


class Publisher:
    """Sends [topic, JSON] to whoever is connected. Never blocks; any thread may publish.

    Failure mode: each subscriber has a queue of HIGH_WATER messages of its own. When one is full, ZeroMQ silently
    drops the NEWEST messages for that subscriber alone; it sees the gap in `seq`. A subscriber that connects gets
    what is published from then on.
    """

    def __init__(self, port: int) -> None:
        """Binds tcp://127.0.0.1:`port`, or a free port if 0: `address` tells. InputError if it cannot."""
        if not 0 <= port <= 65535:  # ZeroMQ itself would take it modulo 65536
            raise InputError(f"the ZeroMQ port must be a number from 0 to 65535, got {port}")
        self._lock = threading.Lock()  # a ZeroMQ socket is not for two threads at once
        self._socket: zmq.SyncSocket = zmq.SyncContext.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        try:
            self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        except zmq.ZMQError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"port {port} (ZeroMQ) is taken by another program: stop that, or choose another port"
                ) from None
            raise InputError(f"cannot publish on tcp://127.0.0.1:{port}: {error.strerror}") from None
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    def publish(self, topic: str, payload: bytes) -> None:
        """Queues one message. After close() it does nothing."""
        with self._lock:
            if not self._socket.closed:
                self._socket.send_multipart([topic.encode(), payload], flags=zmq.NOBLOCK)

    def close(self) -> None:
        with self._lock:
            self._socket.close()


class Subscriber:
    """Reads one publisher, from one thread. Use it as a context manager.

    Failure mode: a reader that falls behind has HIGH_WATER messages waiting on its own side, then as many at the
    publisher, then the newest are dropped there.
    """

    def __init__(self, address: str, prefix: str, timeout_s: float = 3.0) -> None:
        """Connects to `address` and asks for the topics that begin with `prefix`.

        Raises InputError for an address that is none, ConnectionError if no publisher answers in `timeout_s`. The
        publisher hears of the prefix a moment later than this returns: what it sends before that does not come.
        """
        self._socket: zmq.SyncSocket = zmq.SyncContext.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self._socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
        # ZeroMQ would reconnect without a word. A live view must say that nothing comes any more, so watch the link.
        self._link: zmq.SyncSocket = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        )
        try:
            try:
                self._socket.connect(address)
            except zmq.ZMQError as error:
                raise InputError(f"{address} is not an address like tcp://127.0.0.1:5555: {error}") from None
            if not self._link.poll(round(timeout_s * 1000)):
                raise ConnectionError(f"no ZeroMQ publisher answers within {timeout_s:g} s")
            if recv_monitor_message(self._link)["event"] == zmq.Event.DISCONNECTED:
                raise ConnectionError("what listens there is no ZeroMQ publisher")
        except BaseException:
            self.close()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._link, zmq.POLLIN)

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
