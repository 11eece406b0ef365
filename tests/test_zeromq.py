"""ZeroMQ with keys (CURVE), on real sockets: who gets in, who does not and what is said then."""

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.errors import InputError
from stream.deliver.zeromq import MAX_PREFIX_BYTES, Publisher, Subscriber, new_keys, public_key

WAIT_S = 10.0
"""How long a test waits for what must come. Only a failing test waits so long."""
SERVER_PUBLIC, SERVER_SECRET = new_keys()
CLIENT_PUBLIC, CLIENT_SECRET = new_keys()
OTHER_PUBLIC, OTHER_SECRET = new_keys()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher(0, curve=(SERVER_SECRET, [OTHER_PUBLIC, CLIENT_PUBLIC]))
    yield publisher
    publisher.close()


def hear(publisher: Publisher, subscriber: Subscriber) -> bytes:
    """What arrives of a message that is repeated: the publisher hears of a new subscriber a moment later."""
    deadline = time.monotonic() + WAIT_S
    while (payload := subscriber.receive(0.01)) is None:
        assert time.monotonic() < deadline, "nothing came"
        publisher.publish("livemoments/door/", b"a dog runs")
    return payload


def port_of(publisher: Publisher) -> int:
    return int(publisher.address.rpartition(":")[2])


def test_keys_come_in_pairs() -> None:
    assert public_key(CLIENT_SECRET) == CLIENT_PUBLIC
    assert len(CLIENT_PUBLIC) == len(CLIENT_SECRET) == 40
    assert new_keys() != new_keys()


def test_every_listed_client_hears_the_publisher(publisher: Publisher) -> None:
    for secret in (CLIENT_SECRET, OTHER_SECRET):
        with Subscriber(publisher.address, "livemoments/", server_key=SERVER_PUBLIC, secret_key=secret) as subscriber:
            assert hear(publisher, subscriber) == b"a dog runs"


@pytest.mark.parametrize(
    ("server_key", "secret_key", "why"),
    [
        (OTHER_PUBLIC, CLIENT_SECRET, "has another public key"),
        (SERVER_PUBLIC, new_keys()[1], "does not list this client"),
        (None, None, "wants keys"),
    ],
    ids=["another server's key", "a client that is not listed", "no keys"],
)
def test_whoever_has_not_the_right_keys_is_refused_and_told_so(
    publisher: Publisher, server_key: str | None, secret_key: str | None, why: str
) -> None:
    for _ in range(20):  # who sees the other hang up first is a race
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=f"keys were refused: .*{why}"):
            Subscriber(publisher.address, "", server_key=server_key, secret_key=secret_key)
        assert time.monotonic() - started < 2.0  # and it does not wait for its time limit


def test_keys_where_the_publisher_takes_none() -> None:
    publisher = Publisher(0)
    for _ in range(20):
        with pytest.raises(ConnectionError, match=r"keys were refused: .*takes none"):
            Subscriber(publisher.address, "", server_key=SERVER_PUBLIC, secret_key=CLIENT_SECRET)
    publisher.close()


@pytest.mark.parametrize("with_keys", [True, False])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100, b"", b"\xff\0\0\0\0\0\0\0\1\x7f"])
def test_another_program_at_that_port(answer: bytes, with_keys: bool) -> None:
    keys = (SERVER_PUBLIC, CLIENT_SECRET) if with_keys else (None, None)

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                link, _ = listener.accept()
                link.sendall(answer)
                link.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(5):
            with pytest.raises(ConnectionError, match="is no ZeroMQ publisher"):
                Subscriber(address, "", server_key=keys[0], secret_key=keys[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)


def test_nothing_travels_in_the_clear(publisher: Publisher) -> None:
    """A relay between a client and the publisher sees all that travels."""
    relayed = bytearray()
    entrance = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, sink: socket.socket) -> None:
        while piece := source.recv(65536):
            relayed.extend(piece)
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)

    def relay() -> None:
        inside, _ = entrance.accept()
        with inside, socket.create_connection(("127.0.0.1", port_of(publisher))) as outside:
            back = threading.Thread(target=carry, args=(outside, inside))
            back.start()
            carry(inside, outside)
            back.join()

    thread = threading.Thread(target=relay)
    thread.start()
    address = f"tcp://127.0.0.1:{entrance.getsockname()[1]}"
    with Subscriber(address, "livemoments/", server_key=SERVER_PUBLIC, secret_key=CLIENT_SECRET) as subscriber:
        assert hear(publisher, subscriber) == b"a dog runs"
    thread.join(WAIT_S)
    entrance.close()
    assert b"CURVE" in relayed and b"MESSAGE" in relayed
    assert b"dog" not in relayed and b"livemoments" not in relayed


def test_several_publishers_in_one_process_have_lists_of_their_own() -> None:
    first = Publisher(0, curve=(SERVER_SECRET, [CLIENT_PUBLIC]))
    second = Publisher(0, curve=(SERVER_SECRET, [OTHER_PUBLIC]))
    try:
        with Subscriber(second.address, "", server_key=SERVER_PUBLIC, secret_key=OTHER_SECRET) as subscriber:
            assert hear(second, subscriber) == b"a dog runs"
            with pytest.raises(ConnectionError, match="keys were refused"):
                Subscriber(first.address, "", server_key=SERVER_PUBLIC, secret_key=OTHER_SECRET)
            first.close()
            assert hear(second, subscriber) == b"a dog runs"
    finally:
        first.close()
        second.close()


def test_nobody_gets_in_while_nobody_checks_keys(publisher: Publisher) -> None:
    assert publisher._authenticator
    publisher._authenticator.stop()
    with pytest.raises(ConnectionError):
        Subscriber(publisher.address, "", timeout_s=0.5, server_key=SERVER_PUBLIC, secret_key=CLIENT_SECRET)


def test_close_ends_its_threads_and_may_come_twice() -> None:
    before, kernel_before = threading.active_count(), kernel_threads()
    for _ in range(20):
        publisher = Publisher(0, curve=(SERVER_SECRET, [CLIENT_PUBLIC]))
        with pytest.raises(InputError, match="is taken"):
            Publisher(port_of(publisher), curve=(SERVER_SECRET, [CLIENT_PUBLIC]))
        assert threading.active_count() == before + 1
        publisher.close()
        publisher.close()
        publisher.publish("livemoments/", b"too late, and harmless")
    assert threading.active_count() == before
    assert kernel_threads() <= kernel_before


def kernel_threads() -> int:
    """Threads of this process, those of ZeroMQ itself included."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("bad", ["", "x" * 39, "x" * 41, "~" * 40, "#" * 40, "é" * 40, "0" * 39 + "\0"])
def test_keys_that_are_none(publisher: Publisher, bad: str) -> None:
    for ask in (
        lambda: Publisher(0, curve=(bad, [CLIENT_PUBLIC])),
        lambda: Publisher(0, curve=(SERVER_SECRET, [CLIENT_PUBLIC, bad])),
        lambda: Subscriber(publisher.address, "", server_key=bad, secret_key=CLIENT_SECRET),
        lambda: Subscriber(publisher.address, "", server_key=SERVER_PUBLIC, secret_key=bad),
        lambda: public_key(bad),
    ):
        with pytest.raises(InputError, match=r"is no CURVE key.*40 characters") as caught:
            ask()
        assert "\n" not in str(caught.value) and (not bad or bad not in str(caught.value))


def test_half_of_the_keys_is_a_mistake(publisher: Publisher) -> None:
    with pytest.raises(InputError, match="needs both"):
        Subscriber(publisher.address, "", server_key=SERVER_PUBLIC)
    with pytest.raises(InputError, match="needs both"):
        Subscriber(publisher.address, "", secret_key=CLIENT_SECRET)
    with pytest.raises(InputError, match="nobody could connect"):
        Publisher(0, curve=(SERVER_SECRET, []))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "192.168.1.1"])
def test_nothing_but_loopback_without_keys(host: str) -> None:
    with pytest.raises(InputError, match=f"{re.escape(host)} would be open to everyone.*give keys"):
        Publisher(0, host=host)


def test_hosts() -> None:
    with pytest.raises(InputError, match=r"must be an IP address of this machine, got 'example.com'"):
        Publisher(0, host="example.com")
    with pytest.raises(InputError, match=r"cannot publish on tcp://203.0.113.9:0"):
        Publisher(0, host="203.0.113.9", curve=(SERVER_SECRET, [CLIENT_PUBLIC]))
    everywhere = Publisher(0, host="0.0.0.0", curve=(SERVER_SECRET, [CLIENT_PUBLIC]))
    for name in ("127.0.0.1", "localhost"):
        address = f"tcp://{name}:{port_of(everywhere)}"
        with Subscriber(address, "", server_key=SERVER_PUBLIC, secret_key=CLIENT_SECRET) as subscriber:
            assert hear(everywhere, subscriber) == b"a dog runs"
    everywhere.close()


@pytest.mark.skipif(not Path("/proc/net/if_inet6").is_file(), reason="no IPv6 here")
def test_ipv6_loopback() -> None:
    publisher = Publisher(0, host="::1")
    assert publisher.address.startswith("tcp://[::1]:")
    with Subscriber(publisher.address, "") as subscriber:
        assert hear(publisher, subscriber) == b"a dog runs"
    publisher.close()


@pytest.mark.parametrize("with_keys", [True, False])
def test_two_thousand_connections_with_random_bytes_harm_nobody(with_keys: bool) -> None:
    rng = random.Random(11)
    publisher = Publisher(0, curve=(SERVER_SECRET, [CLIENT_PUBLIC]) if with_keys else None)
    keys = (SERVER_PUBLIC, CLIENT_SECRET) if with_keys else (None, None)
    # How a client of ZeroMQ begins, so that some of the noise gets past the first bytes.
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01" + (b"CURVE" if with_keys else b"NULL").ljust(20, b"\0") + bytes(32)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB"
    with Subscriber(publisher.address, "livemoments/", server_key=keys[0], secret_key=keys[1]) as subscriber:
        hear(publisher, subscriber)
        while subscriber.receive(0.1) is not None:
            pass
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(1, 2001):
            with socket.create_connection(("127.0.0.1", port_of(publisher))) as raw:
                start = rng.choice([b"", greeting, greeting[: rng.randrange(64)], greeting + ready])
                # A frame that announces 2^60 bytes, a HELLO of noise, or just noise.
                noise = rng.choice([b"\x02\x10" + bytes(7), b"\x04\xc8\x05HELLO" + rng.randbytes(194), b""])
                raw.sendall(start + noise + rng.randbytes(rng.randrange(200)))
            if number % 100 == 0:
                publisher.publish("livemoments/door/", str(number).encode())
                assert subscriber.receive(WAIT_S) == str(number).encode()
        assert subscriber.receive(0.2) is None
        with Subscriber(publisher.address, "livemoments/", server_key=keys[0], secret_key=keys[1]) as late:
            assert hear(publisher, late) == b"a dog runs"
        deadline = time.monotonic() + WAIT_S
        while len(list(Path("/proc/self/fd").iterdir())) > descriptors + 5:
            assert time.monotonic() < deadline, "it keeps the connections of those who have gone"
            time.sleep(0.05)
    publisher.close()


def test_a_client_cannot_make_the_publisher_hold_a_long_prefix() -> None:
    publisher = Publisher(0)
    with Subscriber(publisher.address, "x" * (MAX_PREFIX_BYTES - 1)):
        pass
    with (
        Subscriber(publisher.address, "x" * (MAX_PREFIX_BYTES + 1)) as subscriber,
        pytest.raises(ConnectionError, match="has gone"),
    ):
        assert subscriber.receive(WAIT_S) is not None
    publisher.close()
