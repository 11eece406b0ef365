"""WebSocket and ZeroMQ on real sockets of 127.0.0.1, and the rules behind them without sockets."""

import json
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets.exceptions
from websockets.sync.client import ClientConnection, connect

from kernels.errors import InputError
from stream import switchboard, websocket
from stream.events import LOST_TYPE, GapCounter, encode, topic
from stream.switchboard import MAX_SUBSCRIPTIONS, Outbox, Peer, Switchboard
from stream.types import Event, Query
from stream.websocket import MAX_MESSAGE_BYTES, Client, Server
from stream.zeromq import HIGH_WATER, Publisher, Subscriber
from tests.test_events import DOG, event, query, status

WAIT_S = 10.0
"""How long a test waits for what must come. Only a failing test waits so long."""
QUIET_S = 0.2
"""How long a test listens for what must not come."""
CAT = query("a cat sleeps")


class Program:
    """Stands for the detector: starts queries for clients, and notes who asked for what."""

    def __init__(self) -> None:
        self.started: queue.Queue[str] = queue.Queue()
        self.stopped: queue.Queue[str] = queue.Queue()

    def on_subscribe(self, text: str) -> Query:
        if text.startswith("!"):
            raise InputError(f"cannot look for {text}")
        self.started.put(text)
        return query(text)

    def on_unsubscribe(self, query_id: str) -> None:
        self.stopped.put(query_id)


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture
def server(program: Program) -> Iterator[Server]:
    server = Server(0, program.on_subscribe, program.on_unsubscribe)
    server.start()
    yield server
    server.close()


def url(server: Server) -> str:
    return f"ws://127.0.0.1:{server.port}"


def publish(server: Server, event: Event) -> None:
    server.publish(event.stream, event.query.id if event.query else None, encode(event, "run1"))


def next_message(client: Client) -> dict[str, Any]:
    payload = client.receive(WAIT_S)
    assert payload is not None, "nothing came"
    message = json.loads(payload)
    assert isinstance(message, dict)
    return message


def ask(client: Client, **request: object) -> dict[str, Any]:
    client.send(request)
    return next_message(client)


# ---- the rules, without sockets --------------------------------------------------------------------------------------


def lost_in(payload: bytes) -> int:
    message = json.loads(payload)
    return message["data"]["lost"] if isinstance(message, dict) and message["type"] == LOST_TYPE else 0


def test_outbox_accounts_for_every_message() -> None:
    rng, outbox, put, expected, notices = random.Random(1), Outbox(limit=8), 0, 0, set()
    for _ in range(5000):
        for _ in range(rng.choice([0, 1, 3, 20])):
            outbox.put(b"%d" % put)
            put += 1
            assert len(outbox) <= 8
        for _ in range(rng.choice([0, 1, 5])):
            payload = outbox.take()
            if payload is None:
                assert expected == put
            elif lost := lost_in(payload):
                expected += lost  # the notice stands exactly where the lost ones would have been
                notices.add(json.loads(payload)["id"])
            else:
                assert int(payload) == expected
                expected += 1
    while (payload := outbox.take()) is not None:
        expected += lost_in(payload) or 1
    assert expected == put
    assert len(notices) > 100  # and each has an id of its own


def test_switchboard_decides_who_gets_what() -> None:
    board = Switchboard(query, lambda query_id: None)
    peers = {name: Peer() for name in ("all", "dog", "door", "dog at door", "nothing")}
    board.peers.update(peers.values())
    for name, stream, text in [
        ("all", "*", "*"),
        ("dog", "*", DOG.text),
        ("dog", "door", DOG.text),  # twice over: it still gets each event once
        ("door", "door", "*"),
        ("dog at door", "door", DOG.text),
    ]:
        request = {"op": "subscribe", "stream": stream, "query": text}
        assert json.loads(board.answer(peers[name], json.dumps(request)))["op"] == "subscribed"

    def receivers(stream: str, query_id: str | None) -> list[str]:
        found = board.receivers(stream, query_id)
        return sorted(name for name, peer in peers.items() for other in found if peer is other)

    assert receivers("door", DOG.id) == ["all", "dog", "dog at door", "door"]
    assert receivers("yard", DOG.id) == ["all", "dog"]
    assert receivers("door", CAT.id) == ["all", "door"]
    assert receivers("yard", CAT.id) == ["all"]
    assert receivers("door", None) == ["all", "dog", "dog at door", "door"]
    assert receivers("yard", None) == ["all", "dog"]


# ---- WebSocket -------------------------------------------------------------------------------------------------------


def test_events_reach_those_who_subscribed(server: Server, program: Program) -> None:
    with Client(url(server)) as dog, Client(url(server)) as everything, Client(url(server)) as silent:
        assert ask(dog, op="subscribe", query=DOG.text) == {
            "op": "subscribed",
            "query_id": DOG.id,
            "query": DOG.text,
            "stream": "*",
        }
        assert ask(everything, op="subscribe", query="*")["query_id"] == "*"
        for sent in (event(1), event(1, asked=CAT), status(1), event(2)):
            publish(server, sent)
        assert [next_message(dog)["data"]["seq"] for _ in range(3)] == [1, 1, 2]
        ids = [next_message(everything)["id"] for _ in range(4)]
        assert ids == [f"run1/{name}" for name in (f"{DOG.id}/1", f"{CAT.id}/1", "status/1", f"{DOG.id}/2")]
        assert dog.receive(QUIET_S) is None  # no cat
        assert silent.receive(0) is None
        assert program.started.get(timeout=WAIT_S) == DOG.text  # "*" starts nothing
        assert program.started.empty()


def test_subscriptions_come_and_go(server: Server, program: Program) -> None:
    with Client(url(server)) as first:
        with Client(url(server)) as second:
            ask(first, op="subscribe", query=DOG.text, stream="door")
            ask(second, op="subscribe", query=DOG.text)  # runs already: the program is not asked again
            ask(second, op="subscribe", query=CAT.text)
            assert [program.started.get(timeout=WAIT_S) for _ in range(2)] == [DOG.text, CAT.text]
            assert ask(first, op="list")["subscriptions"] == [{"query_id": DOG.id, "query": DOG.text, "stream": "door"}]
            unsubscribed = ask(second, op="unsubscribe", query=DOG.text)
            assert unsubscribed["op"] == "unsubscribed" and unsubscribed["query_id"] == DOG.id
            assert "no subscription" in ask(second, op="unsubscribe", query=DOG.text)["message"]
            publish(server, event(1))
            assert next_message(first)["data"]["seq"] == 1
            assert second.receive(QUIET_S) is None
            assert program.stopped.empty()  # the first client still holds the dog
        assert program.stopped.get(timeout=WAIT_S) == CAT.id  # the second went away with the cat
    assert program.stopped.get(timeout=WAIT_S) == DOG.id
    assert program.started.empty() and program.stopped.empty()


def test_a_refused_query_is_told_to_its_client_alone(server: Server) -> None:
    with Client(url(server)) as good, Client(url(server)) as bad:
        ask(good, op="subscribe", query=DOG.text)
        assert ask(bad, op="subscribe", query="!!") == {"op": "error", "message": "cannot look for !!"}
        assert ask(bad, op="list")["subscriptions"] == []
        publish(server, event(1))
        assert next_message(good)["data"]["seq"] == 1  # and nothing came before it
        assert bad.receive(QUIET_S) is None


def test_subscriptions_of_a_client_are_limited(server: Server) -> None:
    with Client(url(server)) as client:
        for index in range(MAX_SUBSCRIPTIONS):
            assert ask(client, op="subscribe", query=f"thing {index}")["op"] == "subscribed"
        assert str(MAX_SUBSCRIPTIONS) in ask(client, op="subscribe", query="one more")["message"]
        assert ask(client, op="subscribe", query="thing 0")["op"] == "subscribed"  # it has this one
        ask(client, op="unsubscribe", query="thing 0")
        assert ask(client, op="subscribe", query="one more")["op"] == "subscribed"


def test_clients_are_limited(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAX_CLIENTS", 2)
    with Client(url(server)) as first, Client(url(server)) as second:
        with Client(url(server)) as third, pytest.raises(ConnectionError, match=r"1013.*2 clients"):
            third.receive(WAIT_S)
        for client in (first, second):
            assert ask(client, op="list")["op"] == "list"
    wait_for(lambda: not server._links)
    with Client(url(server)) as again:
        assert ask(again, op="list")["op"] == "list"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


BAD_MESSAGES: list[tuple[str | bytes, str]] = [
    ("{", "not JSON"),
    ("", "not JSON"),
    ("[" * 60_000, "not JSON"),
    ("9" * 60_000, "not JSON"),
    ('{"op":"subscribe","query":"\\ud800"}', "not JSON"),
    ("[]", "JSON object"),
    ("null", "JSON object"),
    ("{}", '"op" must be'),
    ('{"op":["subscribe"]}', '"op" must be'),
    ('{"op":"destroy"}', '"op" must be'),
    ('{"op":"subscribe"}', 'needs "query"'),
    ('{"op":"subscribe","query":"  "}', 'needs "query"'),
    ('{"op":"subscribe","query":["a"]}', 'needs "query"'),
    ('{"op":"subscribe","query":"a","stream":3}', 'needs "query"'),
    ('{"op":"unsubscribe","query":"never asked"}', "no subscription"),
    (b"\x00\xff", "binary"),
    (b'{"op":"list"}', "binary"),
]


def test_bad_messages_get_one_clear_line_and_the_connection_survives(server: Server) -> None:
    with Client(url(server)) as other, connect(url(server)) as client:
        ask(other, op="subscribe", query="*")
        for message, why in BAD_MESSAGES:
            client.send(message)
            answer = json.loads(client.recv(WAIT_S))
            assert answer["op"] == "error" and why in answer["message"], (message[:40], answer)
            assert "\n" not in answer["message"] and len(answer["message"]) < 200
        client.send('{"op":"list"}')
        assert json.loads(client.recv(WAIT_S)) == {"op": "list", "subscriptions": []}
        assert other.receive(0) is None


def test_a_message_too_large_ends_only_its_own_connection(server: Server) -> None:
    with Client(url(server)) as other, connect(url(server)) as client:
        ask(other, op="subscribe", query="*")
        client.send(" " * (MAX_MESSAGE_BYTES - 13) + '{"op":"list"}')
        assert json.loads(client.recv(WAIT_S))["op"] == "list"  # as large as it may be
        client.send("x" * (MAX_MESSAGE_BYTES + 1))
        with pytest.raises(websockets.exceptions.ConnectionClosedError, match="1009"):
            client.recv(WAIT_S)
        publish(server, event(1))
        assert next_message(other)["data"]["seq"] == 1


def test_a_thousand_random_messages(server: Server) -> None:
    rng = random.Random(7)
    pieces = ['{"op":', '"subscribe"', '"query":', '"*"', "}", "[", ",", '"stream":', "null", "1e999", "\\u0000", "é"]

    def garbage() -> str | bytes:
        match rng.randrange(4):
            case 0:
                return rng.randbytes(rng.randrange(200))
            case 1:
                return "".join(chr(rng.randrange(0xD800)) for _ in range(rng.randrange(50)))
            case 2:
                return "".join(rng.choices(pieces, k=rng.randrange(12)))
            case _:
                values: list[object] = [
                    "subscribe",
                    "unsubscribe",
                    "list",
                    "*",
                    "!",
                    None,
                    3,
                    [],
                    {},
                    "\x00",
                    "x" * 999,
                ]
                names = ["op", "query", "stream", "id"]
                return json.dumps({rng.choice(names): rng.choice(values) for _ in range(rng.randrange(4))})

    with Client(url(server)) as other, connect(url(server)) as client:
        ask(other, op="subscribe", query=DOG.text)
        for _ in range(1000):
            client.send(garbage())
            assert json.loads(client.recv(WAIT_S))["op"] in ("error", "list", "subscribed", "unsubscribed")
        for _ in range(20):  # and some that do not even speak HTTP, or stop in the middle of it
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.sendall(rng.choice([rng.randbytes(300), b"GET / HTTP/1.1\r\nUpgrade: web", b""]))
        publish(server, event(1))
        assert next_message(other)["data"]["seq"] == 1
        assert ask(other, op="list")["subscriptions"][0]["query"] == DOG.text


def test_web_pages_from_elsewhere_are_kept_out(server: Server) -> None:
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        with (
            pytest.raises(websockets.exceptions.InvalidStatus, match="403"),
            connect(url(server), origin=websockets.Origin(origin)),
        ):
            pass
    with connect(url(server), origin=websockets.Origin("http://localhost:3000")) as page:
        page.send('{"op":"list"}')
        assert json.loads(page.recv(WAIT_S))["op"] == "list"


def stalled_client(server: Server) -> ClientConnection:
    """A client with tiny buffers that subscribes to everything, and reads only when told to."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    client = connect(url(server), sock=raw, max_queue=1, compression=None, close_timeout=0.2).__enter__()
    client.send('{"op":"subscribe","query":"*"}')
    assert json.loads(client.recv(WAIT_S))["op"] == "subscribed"
    return client


def test_a_client_that_stops_reading_slows_nobody_and_learns_what_it_lost(server: Server) -> None:
    total, burst = 4000, 100
    arrived = threading.Semaphore(0)
    received: list[int] = []

    with Client(url(server)) as fast:
        ask(fast, op="subscribe", query="*")

        def read() -> None:
            while len(received) < total:
                received.append(next_message(fast)["data"]["seq"])
                arrived.release()

        reader = threading.Thread(target=read)
        stalled = stalled_client(server)
        reader.start()
        slowest_s = 0.0
        for first in range(1, total + 1, burst):
            started = time.monotonic()
            for seq in range(first, first + burst):
                publish(server, event(seq))
            assert all(arrived.acquire(timeout=WAIT_S) for _ in range(burst)), "the fast client is held up"
            slowest_s = max(slowest_s, time.monotonic() - started)
            assert max(len(peer.outbox) for peer in server._board.peers) <= switchboard.QUEUE_LIMIT
        reader.join(WAIT_S)
    assert received == list(range(1, total + 1))
    assert slowest_s < 2.0

    expected, got, lost = 1, 0, 0
    while expected <= total:  # now it reads again
        message = json.loads(stalled.recv(WAIT_S))
        if message["type"] == LOST_TYPE:
            assert message["data"]["lost"] > 0
            lost += message["data"]["lost"]
            expected += message["data"]["lost"]
        else:
            assert message["data"]["seq"] == expected, "a loss that was not told where it happened"
            expected += 1
            got += 1
    assert got + lost == total
    # Its queue and the buffers of two sockets are all that it had: the rest did not wait anywhere.
    assert got < 1000
    publish(server, event(total + 1))
    assert json.loads(stalled.recv(WAIT_S))["data"]["seq"] == total + 1  # and it lives on, on time
    stalled.close()


def test_close_does_not_wait_for_a_client_that_does_not_read(server: Server) -> None:
    stalled = stalled_client(server)
    with Client(url(server)) as client:
        for seq in range(2000):
            publish(server, event(seq))
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 4.0
        with pytest.raises(ConnectionError, match="1001"):
            client.receive(WAIT_S)
    stalled.close()
    publish(server, event(1))  # too late, and harmless
    server.close()


def test_publish_never_waits_for_the_server_thread(program: Program) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(text: str) -> Query:
        entered.set()
        assert leave.wait(WAIT_S)
        return query(text)

    server = Server(0, slow, program.on_unsubscribe)
    publish(server, event(1))  # before the start: nobody is there
    server.start()
    with Client(url(server)) as client:
        client.send({"op": "subscribe", "query": DOG.text})
        assert entered.wait(WAIT_S)
        for seq in range(2, 102):
            publish(server, event(seq))  # a publish that waited would never come back
        leave.set()
        assert next_message(client)["op"] == "subscribed"
        assert [next_message(client)["data"]["seq"] for _ in range(100)] == list(range(2, 102))
    server.close()


def test_port_in_use(server: Server, program: Program) -> None:
    with pytest.raises(InputError, match=f"port {server.port} .*choose another port") as caught:
        Server(server.port, program.on_subscribe, program.on_unsubscribe).start()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="99999"):
        Server(99_999, program.on_subscribe, program.on_unsubscribe)


def test_client_says_who_is_not_there(server: Server) -> None:
    server.close()
    with pytest.raises(ConnectionError, match="refused"):
        Client(url(server))
    for wrong in ("ws://127.0.0.1:99999", "ws://", "http://127.0.0.1:1", "ws://[::1"):
        with pytest.raises(InputError, match="is not an address"):
            Client(wrong)


# ---- ZeroMQ ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher(0)
    yield publisher
    publisher.close()


def joined(publisher: Publisher, prefix: str) -> Subscriber:
    """A subscriber that the publisher has heard of: a PUB socket sends nothing to those it has not."""
    subscriber = Subscriber(publisher.address, prefix)
    deadline = time.monotonic() + WAIT_S
    while subscriber.receive(0.01) != b"hello":
        assert time.monotonic() < deadline
        publisher.publish(prefix, b"hello")
    while subscriber.receive(0.1) is not None:
        pass
    return subscriber


def test_zeromq_delivers_in_order_what_the_prefix_asks_for(publisher: Publisher) -> None:
    gaps, prefix = GapCounter(), "livemoments/door/"
    with joined(publisher, prefix) as subscriber:
        for seq in range(1, 301):
            for sent in (event(seq), event(seq, stream="doors"), event(seq, asked=CAT), status(seq)):
                publisher.publish(topic(sent), encode(sent, "run1"))
        numbers: dict[str, list[int]] = {}
        for _ in range(900):
            payload = subscriber.receive(WAIT_S)
            assert payload is not None
            message = json.loads(payload)
            gaps.count(message)
            assert message["data"]["stream"] == "door"
            numbers.setdefault(message.get("subject", "status"), []).append(message["data"]["seq"])
        assert numbers == {key: list(range(1, 301)) for key in (DOG.id, CAT.id, "status")}
        assert gaps.total == 0
        assert subscriber.receive(QUIET_S) is None


def test_zeromq_drops_at_the_high_water_mark_and_the_numbers_show_it(publisher: Publisher) -> None:
    # 100 MB: more than the 2 x HIGH_WATER messages of both queues and what a kernel buffers for a socket.
    gaps, got, total, long = GapCounter(), 0, 5000, query("x" * 20_000)
    with joined(publisher, "livemoments/") as subscriber:
        started = time.monotonic()
        for seq in range(1, total + 1):
            publisher.publish("livemoments/door/long", encode(event(seq, asked=long), "run1"))
        assert time.monotonic() - started < WAIT_S  # it did not wait for a reader that was not reading
        while (payload := subscriber.receive(0.5)) is not None:
            gaps.count(json.loads(payload))
            got += 1
        assert HIGH_WATER <= got < total
        publisher.publish("livemoments/door/long", encode(event(total + 1, asked=long), "run1"))
        payload = subscriber.receive(WAIT_S)
        assert payload is not None
        gaps.count(json.loads(payload))
        assert gaps.total == total - got > 0


def test_zeromq_port_in_use_and_nobody_there(publisher: Publisher) -> None:
    port = int(publisher.address.rpartition(":")[2])
    with pytest.raises(InputError, match=f"port {port} .*choose another port"):
        Publisher(port)
    with pytest.raises(InputError, match="99999"):
        Publisher(99_999)
    with pytest.raises(InputError, match="is not an address"):
        Subscriber("tcp://nonsense", "")
    with joined(publisher, "") as subscriber:
        publisher.close()
        with pytest.raises(ConnectionError, match="has gone"):
            while True:
                assert subscriber.receive(WAIT_S) is not None
    publisher.publish("livemoments/", b"too late, and harmless")
    with pytest.raises(ConnectionError, match="no ZeroMQ publisher"):
        Subscriber(publisher.address, "", timeout_s=0.2)
