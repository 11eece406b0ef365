"""WebSocket and ZeroMQ on real sockets of 127.0.0.1: who gets what, and what a client cannot do to the others."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets.exceptions
from websockets.asyncio import client as asyncio_client
from websockets.sync.client import connect

from kernels.errors import InputError
from stream.config.schema import Limits
from stream.deliver.log import KEPT, EventLog
from stream.deliver.websocket import Client, Server
from stream.deliver.zeromq import HIGH_WATER, Publisher, Subscriber
from stream.events import LOST_TYPE, GapCounter, encode, topic
from stream.types import Query
from tests.sockets import (
    QUIET_S,
    WAIT_S,
    Program,
    Queries,
    ask,
    next_event,
    next_message,
    quiet,
    stalled_client,
    wait_for,
)
from tests.test_events import DOG, event, query, status

CAT = query("a cat sleeps")


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


# ---- who gets what ---------------------------------------------------------------------------------------------------


def test_events_reach_those_who_subscribed(program: Program) -> None:
    with (
        Client(program.url, WAIT_S) as dog,
        Client(program.url, WAIT_S) as everything,
        Client(program.url, WAIT_S) as silent,
    ):
        assert ask(dog, op="subscribe", query=DOG.text) == {
            "op": "subscribed",
            "query_id": DOG.id,
            "query": DOG.text,
            "stream": "*",
            "lognumber": 0,
        }
        caught_up = [next_message(dog) for _ in program.names]
        assert caught_up == [
            {"op": "caught_up", "query_id": DOG.id, "stream": name, "lognumber": 0} for name in program.names
        ]
        assert ask(everything, op="subscribe", query="*")["query_id"] == "*"
        entries = program.tell(event(1), event(1, asked=CAT), status(1), event(2))
        assert [dog.receive(WAIT_S) for _ in range(3)] == [entries[i].payload for i in (0, 2, 3)]
        assert [everything.receive(WAIT_S) for _ in range(4)] == [entry.payload for entry in entries]
        assert quiet(dog)  # no cat
        assert silent.receive(0) is None
        assert program.wanted() == {DOG.text}  # "*" starts nothing


def test_a_subscription_is_to_a_query_and_a_stream(program: Program) -> None:
    wants = {
        "all": [("*", "*")],
        "dog": [("*", DOG.text), ("door", DOG.text)],  # twice over: it still gets each event once
        "door": [("door", "*")],
        "dog at door": [("door", DOG.text)],
        "nothing": [],
    }
    sent = [event(1), event(1, stream="yard"), event(1, asked=CAT), event(1, stream="yard", asked=CAT), status(1)]
    expected = {"all": [0, 1, 2, 3, 4, 5], "dog": [0, 1, 4, 5], "door": [0, 2, 4], "dog at door": [0, 4], "nothing": []}
    clients = {name: Client(program.url, WAIT_S) for name in wants}
    for name, client in clients.items():
        for stream, text in wants[name]:
            assert ask(client, op="subscribe", stream=stream, query=text)["op"] == "subscribed"
    entries = program.tell(*sent, status(1, "yard"))
    for name, client in clients.items():
        got = [next_event(client)["lognumber"] for _ in expected[name]]
        assert got == [entries[i].number for i in expected[name]], name
        assert quiet(client), name
        client.__exit__()


def test_subscriptions_come_and_go(program: Program) -> None:
    with Client(program.url, WAIT_S) as first:
        with Client(program.url, WAIT_S) as second:
            ask(first, op="subscribe", query=DOG.text, stream="door")
            ask(second, op="subscribe", query=DOG.text)
            ask(second, op="subscribe", query=CAT.text)
            assert (program.wanted("door"), program.wanted("yard")) == ({DOG.text, CAT.text}, {DOG.text, CAT.text})
            assert ask(first, op="list")["subscriptions"] == [{"query_id": DOG.id, "query": DOG.text, "stream": "door"}]
            unsubscribed = ask(second, op="unsubscribe", query=f"  {DOG.text} ")  # the same query
            assert unsubscribed == {"op": "unsubscribed", "query_id": DOG.id, "query": DOG.text, "stream": "*"}
            assert "no subscription" in ask(second, op="unsubscribe", query=DOG.text)["message"]
            program.tell(event(1))
            assert next_event(first)["data"]["seq"] == 1
            assert quiet(second)
            # The first client still holds the dog.
            assert (program.wanted("door"), program.wanted("yard")) == ({DOG.text, CAT.text}, {CAT.text})
        wait_for(lambda: program.wanted("door") == {DOG.text})  # the second went away with the cat
        ask(first, op="subscribe", query=DOG.text, stream="door")  # again: it is held once
        first.send({"op": "unsubscribe", "query": DOG.text, "stream": "door"})
        wait_for(lambda: program.wanted("door") == set())
        assert program.interest.asked() == []


def test_another_threshold_is_another_query(program: Program) -> None:
    with Client(program.url, WAIT_S) as client:
        plain = ask(client, op="subscribe", query=DOG.text)
        low = ask(client, op="subscribe", query=DOG.text, threshold=0.3)
        assert low["threshold"] == 0.3 and low["query_id"] != plain["query_id"]
        program.tell(event(1, asked=program.interest.encode(DOG.text, 0.3)))
        assert next_event(client)["subject"] == low["query_id"]
        ask(client, op="unsubscribe", query=DOG.text, threshold=0.3)
        assert [each["query_id"] for each in ask(client, op="list")["subscriptions"]] == [DOG.id]
        assert "no subscription" in ask(client, op="unsubscribe", query=DOG.text, threshold=0.3)["message"]


def test_a_refused_query_is_told_to_its_client_alone(program: Program) -> None:
    with Client(program.url, WAIT_S) as good, Client(program.url, WAIT_S) as bad:
        ask(good, op="subscribe", query=DOG.text)
        assert ask(bad, op="subscribe", query="!!") == {"op": "error", "message": "cannot look for !!"}
        assert ask(bad, op="list")["subscriptions"] == []
        program.tell(event(1))
        assert next_event(good)["data"]["seq"] == 1  # and nothing came before it
        assert quiet(bad)


def test_what_operators_ask(program: Program) -> None:
    with Client(program.url, WAIT_S) as client:
        assert ask(client, op="add_stream", stream="hall", source="test:") == {"op": "stream_added", "stream": "hall"}
        assert "already" in ask(client, op="add_stream", stream="hall", source="test:")["message"]
        program.tell(status(1))
        streams = ask(client, op="streams")
        assert [each["stream"] for each in streams["streams"]] == ["door", "yard", "hall"] and streams["lognumber"] == 1
        answer = ask(client, op="why", query=DOG.text, stream="hall", threshold=0.25)
        assert answer["op"] == "why" and answer["query_id"] == f"{DOG.id}-at-0.25"
        assert [(each["stream"], each["threshold"]) for each in answer["streams"]] == [("hall", 0.25)]
        assert ask(client, op="remove_stream", stream="hall") == {"op": "stream_removed", "stream": "hall"}
        assert 'no stream "hall"' in ask(client, op="why", query=DOG.text, stream="hall")["message"]
        assert 'no stream "hall"' in ask(client, op="remove_stream", stream="hall")["message"]
        assert program.wanted() == set()  # to ask why starts nothing


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_subscriptions_of_a_client_are_limited() -> None:
    with Program(limits=Limits(queries_per_client=5)) as program, Client(program.url, WAIT_S) as client:
        for index in range(5):
            assert ask(client, op="subscribe", query=f"thing {index}")["op"] == "subscribed"
        assert "5 subscriptions" in ask(client, op="subscribe", query="one more")["message"]
        assert ask(client, op="subscribe", query="thing 0")["op"] == "subscribed"  # it has this one
        ask(client, op="unsubscribe", query="thing 0")
        assert ask(client, op="subscribe", query="one more")["op"] == "subscribed"


def test_queries_in_all_are_limited() -> None:
    with (
        Program(limits=Limits(queries=2)) as program,
        Client(program.url, WAIT_S) as client,
        Client(program.url, WAIT_S) as other,
    ):
        assert ask(client, op="subscribe", query="thing 1")["op"] == "subscribed"
        assert ask(client, op="subscribe", query="thing 2")["op"] == "subscribed"
        assert "2 queries run already" in ask(other, op="subscribe", query="thing 3")["message"]
        assert ask(other, op="list")["subscriptions"] == []
        assert ask(other, op="subscribe", query="thing 2")["op"] == "subscribed"  # it runs
        ask(client, op="unsubscribe", query="thing 1")
        assert ask(other, op="subscribe", query="thing 3")["op"] == "subscribed"


def test_clients_are_limited() -> None:
    with Program(limits=Limits(clients=2)) as program:
        with Client(program.url, WAIT_S) as first, Client(program.url, WAIT_S) as second:
            with Client(program.url, WAIT_S) as third, pytest.raises(ConnectionError, match=r"1013.*2 clients"):
                third.receive(WAIT_S)
            for client in (first, second):
                assert ask(client, op="list")["op"] == "list"
        wait_for(lambda: program.server.clients == 0)
        with Client(program.url, WAIT_S) as again:
            assert ask(again, op="list")["op"] == "list"


def test_messages_of_a_client_are_limited() -> None:
    with Program(limits=Limits(messages_per_second=2)) as program, Client(program.url, WAIT_S) as client:
        ask(client, op="subscribe", query="*")
        answers = [ask(client, op="list") for _ in range(12)]
        assert [answer["op"] for answer in answers[:9]] == ["list"] * 9  # a burst of five seconds' worth
        assert answers[-1] == {"op": "error", "message": "more than 2 messages a second: slow down"}
        with Client(program.url, WAIT_S) as other:
            assert ask(other, op="list")["op"] == "list"  # each has its own rate
        program.tell(event(1))
        assert next_event(client)["data"]["seq"] == 1  # and it is told as before
        time.sleep(0.6)
        assert ask(client, op="list")["op"] == "list"


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
    ('{"op":"subscribe","query":"\\u0000"}', 'needs "query"'),
    ('{"op":"subscribe","query":["a"]}', 'needs "query"'),
    (json.dumps({"op": "subscribe", "query": "x" * 5000}), "5000 characters"),
    ('{"op":"subscribe","query":"a","stream":3}', '"stream" is a name'),
    ('{"op":"subscribe","query":"a","stream":""}', '"stream" is a name'),
    ('{"op":"subscribe","query":"a","threshold":"high"}', '"threshold" is a number'),
    ('{"op":"subscribe","query":"a","threshold":NaN}', '"threshold" is a number'),
    ('{"op":"subscribe","query":"*","threshold":0.5}', "one query"),
    ('{"op":"subscribe","query":"a","cooldown":-1}', '"cooldown" is a number'),
    ('{"op":"subscribe","query":"a","cooldown":true}', '"cooldown" is a number'),
    ('{"op":"subscribe","query":"a","backfill":1e999}', '"backfill" is a number'),
    ('{"op":"subscribe","query":"a","since":1.5}', '"since" is the number'),
    ('{"op":"subscribe","query":"a","since":[]}', '"since" is a number'),
    ('{"op":"unsubscribe","query":"never asked"}', "no subscription"),
    ('{"op":"why","query":"*"}', "one query"),
    ('{"op":"why","query":"a","stream":"attic"}', 'no stream "attic"'),
    ('{"op":"add_stream","stream":"attic"}', 'needs "source"'),
    ('{"op":"remove_stream"}', 'needs "stream"'),
    (b"\x00\xff", "binary"),
    (b'{"op":"list"}', "binary"),
]


def test_bad_messages_get_one_clear_line_and_the_connection_survives(program: Program) -> None:
    with Client(program.url, WAIT_S) as other, connect(program.url) as client:
        ask(other, op="subscribe", query="*")
        for message, why in BAD_MESSAGES:
            client.send(message)
            answer = json.loads(client.recv(WAIT_S))
            assert answer["op"] == "error" and why in answer["message"], (message[:40], answer)
            assert "\n" not in answer["message"] and len(answer["message"]) < 200
        client.send('{"op":"list"}')
        assert json.loads(client.recv(WAIT_S)) == {"op": "list", "subscriptions": []}
        assert other.receive(0) is None


def test_a_message_too_large_ends_only_its_own_connection(program: Program) -> None:
    most = Limits().message_bytes
    with Client(program.url, WAIT_S) as other, connect(program.url) as client:
        ask(other, op="subscribe", query="*")
        client.send(" " * (most - 13) + '{"op":"list"}')
        assert json.loads(client.recv(WAIT_S))["op"] == "list"  # as large as it may be
        client.send("x" * (most + 1))
        with pytest.raises(websockets.exceptions.ConnectionClosedError, match="1009"):
            client.recv(WAIT_S)
        program.tell(event(1))
        assert next_event(other)["data"]["seq"] == 1


# ---- clients that do not read ----------------------------------------------------------------------------------------


def drive(program: Program, total: int, burst: int = 100) -> float:
    """Tells `total` events while one client reads. How long it waited for a burst at most, in seconds."""
    slowest_s = 0.0
    with Client(program.url, WAIT_S) as fast:
        ask(fast, op="subscribe", query="*")
        for first in range(1, total + 1, burst):
            started = time.monotonic()
            for seq in range(first, first + burst, 10):
                program.tell(*(event(each) for each in range(seq, seq + 10)))
            assert [next_event(fast)["data"]["seq"] for _ in range(burst)] == list(range(first, first + burst))
            slowest_s = max(slowest_s, time.monotonic() - started)
    return slowest_s


def test_a_client_that_stops_reading_slows_nobody_and_gets_everything_later(tmp_path: Path) -> None:
    total = KEPT + 1904  # so that it needs the disk
    with Program(EventLog(tmp_path / "events.db")) as program:
        stalled = stalled_client(program)
        assert drive(program, total, burst=500) < 5.0
        for seq in range(1, total + 1):
            message = json.loads(stalled.recv(WAIT_S))
            assert (message["type"] != LOST_TYPE) and message["data"]["seq"] == seq
        program.tell(event(total + 1))
        assert json.loads(stalled.recv(WAIT_S))["data"]["seq"] == total + 1  # and it lives on, on time
        stalled.close()


def test_a_client_that_stops_reading_learns_what_the_log_holds_no_more() -> None:
    total = 4000
    with Program(EventLog(None, max_bytes=400_000)) as program:
        stalled = stalled_client(program)
        assert drive(program, total) < 2.0
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
        assert got + lost == total and lost > total / 2
        program.tell(event(total + 1))
        assert json.loads(stalled.recv(WAIT_S))["data"]["seq"] == total + 1
        stalled.close()


def test_180_clients_are_told_at_once_while_20_never_read(program: Program) -> None:
    readers, silent, bursts, burst = 180, 20, 10, 20
    long = query("x" * 3000)  # 600 kB in all: more than sockets hold
    slowest_s = 0.0

    async def subscribed() -> asyncio_client.ClientConnection:
        link = await asyncio_client.connect(program.url, compression=None, max_queue=1, close_timeout=0.1)
        await link.send('{"op":"subscribe","query":"*"}')
        assert json.loads(await link.recv())["op"] == "subscribed"
        return link

    async def take(link: asyncio_client.ClientConnection) -> list[int]:
        return [json.loads(await link.recv())["lognumber"] for _ in range(burst)]

    async def run() -> None:
        nonlocal slowest_s
        links = [await subscribed() for _ in range(readers + silent)]
        for first in range(1, bursts * burst, burst):
            started = time.monotonic()
            for seq in range(first, first + burst):
                program.tell(event(seq, asked=long))
            async with asyncio.timeout(WAIT_S):
                taken = await asyncio.gather(*map(take, links[:readers]))
            slowest_s = max(slowest_s, time.monotonic() - started)
            assert taken == [list(range(first, first + burst))] * readers
        behind = sorted(peer.position for peer in program.server.board.peers)
        assert behind[silent - 1] < bursts * burst == behind[silent]
        async with asyncio.timeout(WAIT_S):  # and one of those has not lost anything
            assert [n for _ in range(bursts) for n in await take(links[-1])] == list(range(1, bursts * burst + 1))
        for link in links:
            link.transport.abort()

    asyncio.run(run())
    assert slowest_s < 3.0  # server and clients share this process


def test_close_does_not_wait_for_a_client_that_does_not_read(program: Program) -> None:
    stalled = stalled_client(program)
    with Client(program.url, WAIT_S) as client:
        for seq in range(2000):
            program.tell(event(seq))
        started = time.monotonic()
        program.server.close()
        assert time.monotonic() - started < 4.0
        with pytest.raises(ConnectionError, match="1001"):
            client.receive(WAIT_S)
    stalled.close()
    program.tell(event(2001))  # too late, and harmless
    program.server.close()
    assert program.wanted() == set()


def test_events_do_not_wait_for_a_query_that_is_encoded() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Queries):
        def encode(self, text: str, threshold: float | None) -> Query:
            entered.set()
            assert leave.wait(WAIT_S)
            return super().encode(text, threshold)

    program = Program()
    program.interest = Slow(10, program.run_queries)
    program.tell(event(1))  # before the start: nobody is there
    with program, Client(program.url, WAIT_S) as client, Client(program.url, WAIT_S) as other:
        ask(other, op="subscribe", query="*")
        client.send({"op": "subscribe", "query": DOG.text})
        assert entered.wait(WAIT_S)
        for seq in range(2, 102):
            program.tell(event(seq))
        assert [next_event(other)["data"]["seq"] for _ in range(100)] == list(range(2, 102))
        assert ask(other, op="streams")["op"] == "streams"
        leave.set()
        assert next_message(client)["op"] == "subscribed"


# ---- addresses -------------------------------------------------------------------------------------------------------


def test_port_in_use(program: Program) -> None:
    with pytest.raises(InputError, match=f"port {program.server.port} .*choose another port") as caught:
        Server(program, program.log, port=program.server.port).start()
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="99999"):
        Server(program, program.log, port=99_999)
    with pytest.raises(InputError, match="cannot serve on 192"):  # no address of this machine
        Server(program, program.log, port=0, host="192.0.2.1", token="0123456789abcdef").start()


def test_client_says_who_is_not_there(program: Program) -> None:
    program.server.close()
    with pytest.raises(ConnectionError, match="refused"):
        Client(program.url, WAIT_S)
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
